"""LoRA adapters in PEFT's format: adding, saving, loading and merging them into their base model."""

import os
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from ..errors import InputError
from ..files import let_others_read
from .lora import use_less_traffic
from .lora_config import PREFIX, WEIGHTS, adapter_shapes, lora_config, read_adapter_config
from .modeling_phi3v import Phi3VForCausalLM
from .vision_parts import check_same_parts, load_parts, parameters_of, parts_beside, parts_of
from .weights import check_shapes, shapes_in, weight_files


def add_adapter(
    model: Phi3VForCausalLM, config: LoraConfig, train_separators: bool = False, vision_training: str = "default"
) -> PeftModel:
    """Freezes the model and adds new adapters to it. The adapters are in fp32, whatever the model's dtype is.

    train_separators: also trains the row and image separators; vision_training: a key of VISION_TRAINING, the parts of
        the vision model that train fully. They are in fp32 too. PEFT does not save them; `save_parts` does, and
        `load_adapter` loads them.
    """
    return _add(model, config, parts_of(vision_training, train_separators))


def _add(model: Phi3VForCausalLM, config: LoraConfig, parts: tuple[str, ...]) -> PeftModel:
    fully = parameters_of(model, parts)
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
    for parameter in fully.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return adapted


def _save_pretrained(model: PeftModel, save_directory: str | Path, **kwargs):
    # If lm_head has an adapter, PEFT would also save the base layer, which has not changed.
    PeftModel.save_pretrained(model, save_directory, **{"save_embedding_layers": False} | kwargs)
    if kwargs.get("is_main_process", True):
        let_others_read(save_directory)


def check_adapter(model: torch.nn.Module, folder: Path):
    """Raises InputError unless a saved adapter fits the model, which may be on the meta device."""
    lora_config(folder, model)
    parts_beside(model, folder)


def load_adapter(model: Phi3VForCausalLM, folder: str | Path) -> PeftModel:
    """Adds a saved adapter to its base model, and loads the weights that were trained with it, if there are any. Raises
    InputError for an adapter that can't be loaded exactly."""
    config = lora_config(Path(folder), model)
    load_parts(model, Path(folder))
    adapted = PeftModel.from_pretrained(model, folder, config=config)
    use_less_traffic(adapted)
    _check_finite(adapted, folder)
    return adapted


def _check_finite(adapted: PeftModel, folder: str | Path):
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and not parameter.isfinite().all():
            raise InputError(f"{folder}: the adapter's weights {name} hold NaN or infinity")


def continue_adapter(model: Phi3VForCausalLM, folder: str | Path, revision: str | None = None) -> PeftModel:
    """Freezes the model and adds a saved adapter to it, to train it further, with whatever was trained beside it. All
    of that is in fp32, and equal to what was saved.

    model: the base model; on the meta device it gets adapters without weights. revision: of the base.
    Raises InputError for an adapter that can't be loaded exactly, or can't be trained and saved again.
    """
    folder = Path(folder)
    saved, config, parts = read_adapter_config(folder), lora_config(folder, model), parts_beside(model, folder)
    if config.modules_to_save:
        raise InputError(
            f"{folder} holds whole modules ({', '.join(config.modules_to_save)}) beside its adapter, which can't be "
            "trained further: merge it with tools/merge_adapter.py, and train from the result"
        )
    within = parameters_of(model, set(parts) - {"separators"})
    if both := [name for name in config.target_modules if any(own.startswith(f"{name}.") for own in within)]:
        raise InputError(f"{folder} has an adapter and whole weights of {both[0]}: it can't be trained further")
    # PEFT warns if it replaces the base's name.
    config.base_model_name_or_path, config.revision = None, revision
    adapted = _add(model, config, parts)
    model.model.vision_embed_tokens.freeze_unused()  # DDP would wait for gradients of adapters that are never run
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(adapted.peft_config["default"], name, saved.get(name))  # in place of a list of all layers
    if model.device.type != "meta":
        load_parts(model, folder)
        weights = load_file(folder / WEIGHTS)
        for name in [name for name in weights if "lora_" not in name]:  # PEFT may have saved what has not changed
            own, tensor = model.get_parameter(name.removeprefix(PREFIX)), weights.pop(name)
            if not torch.equal(tensor.to(own.dtype), own.cpu()):
                raise InputError(
                    f"{folder} holds {name.removeprefix(PREFIX)}, which differs from the base's and can't be trained "
                    "further: merge it with tools/merge_adapter.py, and train from the result"
                )
        set_peft_model_state_dict(adapted, weights)
        _check_finite(adapted, folder)
    return adapted


def check_resumable(model: PeftModel | Phi3VForCausalLM, folder: Path):
    """Raises InputError unless a checkpoint holds exactly the weights of the model that is trained. The Trainer itself
    would keep the weights of whatever is missing."""
    if inner := [path for path in folder.glob("*/adapter_*") if path.parent.is_dir()]:
        raise InputError(f"{inner[0].parent} holds a second adapter, which no run of these scripts has saved")
    if isinstance(model, PeftModel):
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
        found = {f"{PREFIX}{name}": shape for name, shape in adapter_shapes(folder).items()}
        check_same_parts(model, folder)
    else:
        wanted, found = model.state_dict(), shapes_in(weight_files(folder))
    check_shapes(found, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, str(folder))


def inner_model(model: torch.nn.Module) -> Phi3VForCausalLM:
    """The Phi3VForCausalLM in `model`, which is that itself or a wrapper around it, such as a PeftModel."""
    return next(module for module in model.modules() if isinstance(module, Phi3VForCausalLM))
