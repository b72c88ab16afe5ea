"""LoRA adapters in PEFT's format, and merging them into a checkpoint of the Hub's form."""

from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from ..files import let_others_read
from .modeling_phi3v import Phi3VForCausalLM

SEPARATORS = ("model.vision_embed_tokens.sub_GN", "model.vision_embed_tokens.glb_GN")
SEPARATORS_FILE = "separators.safetensors"


def add_adapter(model: Phi3VForCausalLM, config: LoraConfig, train_separators: bool = False) -> PeftModel:
    """Freezes the model and puts fresh adapters on it, kept in fp32 whatever the model's dtype.

    train_separators: trains the row and image separators as well. They are bare parameters, which PEFT does not
        save: `save_separators` and `load_adapter` do.
    """
    for module in model.modules():
        # On some CPUs bitsandbytes repacks weights when it first infers, rounding them once more, and the layers pass
        # on no gradient afterwards: an evaluation before training would ruin the training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the adapter's weights; an fp32 input is larger
    adapted.save_pretrained = partial(_save_pretrained, adapted)
    adapted.create_or_update_model_card = lambda folder: None  # PEFT's is a form of blanks; a run writes its own
    for name in SEPARATORS if train_separators else ():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return adapted


def _save_pretrained(model: PeftModel, save_directory: str | Path, **kwargs):
    # An adapter on lm_head makes PEFT save the whole base layer beside it, which did not change.
    PeftModel.save_pretrained(model, save_directory, **{"save_embedding_layers": False} | kwargs)
    if kwargs.get("is_main_process", True):
        let_others_read(save_directory)


def save_separators(model: PeftModel, folder: Path):
    """Writes trained separators beside the adapter; does nothing where they are not trained."""
    base = model.get_base_model()
    parameters = {name: base.get_parameter(name) for name in SEPARATORS}
    if all(p.requires_grad for p in parameters.values()):
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, folder / SEPARATORS_FILE)
        let_others_read(folder)


@torch.no_grad()
def load_separators(model: Phi3VForCausalLM, folder: Path):
    """Copies separators that were saved with an adapter into its base model, if there are any."""
    if (folder / SEPARATORS_FILE).is_file():
        for name, tensor in load_file(folder / SEPARATORS_FILE).items():
            model.get_parameter(name).copy_(tensor)


def load_adapter(model: Phi3VForCausalLM, folder: str | Path) -> PeftModel:
    """Puts a saved adapter, and its separators if it has any, on its base model."""
    load_separators(model, Path(folder))
    return PeftModel.from_pretrained(model, folder)


def merge_adapter(model: Phi3VForCausalLM, folder: str | Path) -> Phi3VForCausalLM:
    """The base model with a saved adapter merged into its weights, without any trace of PEFT.

    A model that was loaded in 4 bits is dequantised first, so that the result computes what was trained.
    """
    if getattr(model, "is_quantized", False):
        model = model.dequantize().float()
    return load_adapter(model, folder).merge_and_unload()


def inner_model(model: torch.nn.Module) -> Phi3VForCausalLM:
    """The Phi3VForCausalLM in `model`, which is that itself or a wrapper around it, such as a PeftModel."""
    return next(module for module in model.modules() if isinstance(module, Phi3VForCausalLM))
