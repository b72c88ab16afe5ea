"""LoRA adapters in PEFT's format: adding, saving, loading and merging them into their base model."""

import os
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..files import let_others_read
from .lora import use_less_traffic
from .lora_config import PREFIX, adapter_shapes, lora_config
from .modeling_phi3v import Phi3VForCausalLM
from .weights import check_shapes, shapes_in, weight_files

SEPARATORS = ("model.vision_embed_tokens.sub_GN", "model.vision_embed_tokens.glb_GN")
SEPARATORS_FILE = "separators.safetensors"


def add_adapter(model: Phi3VForCausalLM, config: LoraConfig, train_separators: bool = False) -> PeftModel:
    """Freezes the model and adds new adapters to it. The adapters are in fp32, whatever the model's dtype is.

    train_separators: also trains the row and image separators. They are parameters without a module of their own, which
        PEFT does not save; `save_separators` and `load_adapter` do.
    """
    for module in model.modules():
        # On some CPUs, bitsandbytes repacks the weights at the first inference. This rounds them once more, and no
        # gradient passes through the layers afterwards: an evaluation before training would ruin the training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapted = get_peft_model(model, config)
    if os.path.isdir(base := adapted.peft_config["default"].base_model_name_or_path or ""):
        # So that the base is found from elsewhere too. PEFT takes what --model_name_or_path was.
        adapted.peft_config["default"].base_model_name_or_path = os.path.abspath(base)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # Inputs in fp32 would take more memory, and autocast casts the adapter's weights anyway.
            module.cast_input_dtype_enabled = False
    use_less_traffic(adapted)
    adapted.save_pretrained = partial(_save_pretrained, adapted)
    adapted.create_or_update_model_card = lambda folder: None  # a run writes its own; PEFT's is an empty form
    for name in SEPARATORS if train_separators else ():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return adapted


def _save_pretrained(model: PeftModel, save_directory: str | Path, **kwargs):
    # If lm_head has an adapter, PEFT would also save the base layer, which has not changed.
    PeftModel.save_pretrained(model, save_directory, **{"save_embedding_layers": False} | kwargs)
    if kwargs.get("is_main_process", True):
        let_others_read(save_directory)


def save_separators(model: PeftModel, folder: Path):
    """Saves the separators beside the adapter if they are trained."""
    base = model.get_base_model()
    parameters = {name: base.get_parameter(name) for name in SEPARATORS}
    if all(p.requires_grad for p in parameters.values()):
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, folder / SEPARATORS_FILE)
        let_others_read(folder)


def check_separators(model: Phi3VForCausalLM, folder: Path) -> bool:
    """Whether separators were saved with an adapter. Raises InputError if the file holds anything else."""
    path = folder / SEPARATORS_FILE
    if not os.path.lexists(path):
        return False
    wanted = {name: tuple(model.get_parameter(name).shape) for name in SEPARATORS}
    check_shapes(shapes_in([path]), wanted, str(path))
    return True


def check_adapter(model: torch.nn.Module, folder: Path):
    """Raises InputError unless a saved adapter fits the model, which may be on the meta device."""
    lora_config(folder, model)
    check_separators(model, folder)


@torch.no_grad()
def load_separators(model: Phi3VForCausalLM, folder: Path):
    """Loads the separators that were saved with an adapter, if there are any, into its base model."""
    if check_separators(model, folder):
        for name, tensor in load_file(folder / SEPARATORS_FILE).items():
            model.get_parameter(name).copy_(tensor)


def load_adapter(model: Phi3VForCausalLM, folder: str | Path) -> PeftModel:
    """Adds a saved adapter to its base model, and loads its separators if it has any. Raises InputError for an adapter
    that can't be loaded exactly."""
    config = lora_config(Path(folder), model)
    load_separators(model, Path(folder))
    adapted = PeftModel.from_pretrained(model, folder, config=config)
    use_less_traffic(adapted)
    for name, parameter in adapted.named_parameters():
        if ("lora_" in name or name.endswith(SEPARATORS)) and not parameter.isfinite().all():
            raise InputError(f"{folder}: the adapter's weights {name} hold NaN or infinity")
    return adapted


def check_resumable(model: PeftModel | Phi3VForCausalLM, folder: Path):
    """Raises InputError unless a checkpoint holds exactly the weights of the model that is trained. The Trainer itself
    would keep the weights of whatever is missing."""
    if inner := [path for path in folder.glob("*/adapter_*") if path.parent.is_dir()]:
        raise InputError(f"{inner[0].parent} holds a second adapter, which no run of these scripts has saved")
    if isinstance(model, PeftModel):
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        found = {f"{PREFIX}{name}": shape for name, shape in adapter_shapes(folder).items()}
    else:
        wanted, found = model.state_dict(), shapes_in(weight_files(folder))
    check_shapes(found, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, str(folder))


def inner_model(model: torch.nn.Module) -> Phi3VForCausalLM:
    """The Phi3VForCausalLM in `model`, which is that itself or a wrapper around it, such as a PeftModel."""
    return next(module for module in model.modules() if isinstance(module, Phi3VForCausalLM))
