"""Parts of the vision model that train fully, where the language model has adapters or is frozen, and their file.

PEFT saves adapters alone. The weights that train beside them are saved next to the adapter under the Hub's names, in
VISION_FILE, or in SEPARATORS_FILE if they are the separators alone.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..errors import InputError
from ..files import let_others_read
from .modeling_phi3v import Phi3VForCausalLM
from .weights import check_shapes, shapes_in

VISION = "model.vision_embed_tokens."
SEPARATORS = (f"{VISION}sub_GN", f"{VISION}glb_GN")
SEPARATORS_FILE, VISION_FILE = "separators.safetensors", "vision.safetensors"
# The names of a part's weights begin like this.
PARTS = {"tower": (f"{VISION}img_processor.",), "projector": (f"{VISION}img_projection.",), "separators": SEPARATORS}
# The values of --vision_training, and which parts each of them trains fully.
VISION_TRAINING = {"default": (), "all": tuple(PARTS), "tower": ("tower",), "projector": ("projector",)}


def parts_of(vision_training: str, train_separators: bool = False) -> tuple[str, ...]:
    """The parts that these flags train fully, beside adapters or alone."""
    wanted = {*VISION_TRAINING[vision_training], *(("separators",) if train_separators else ())}
    return tuple(part for part in PARTS if part in wanted)


def vision_training_of(parts: Iterable[str]) -> str | None:
    """The value of --vision_training that trains these parts, with --train_separators or without; None if none does."""
    found = set(parts)
    if {"tower", "projector"} <= found:
        return "all" if found == set(PARTS) else None
    return next((part for part in ("tower", "projector") if part in found), "default")


def parameters_of(model: Phi3VForCausalLM, parts: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The weights of these parts, by name. The tower's last layer and its norm, which are never run, are left out."""
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    unused = {p for module in model.model.vision_embed_tokens.unused_modules() for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if name.startswith(prefixes) and p not in unused}


def train_vision_alone(model: Phi3VForCausalLM, vision_training: str) -> Phi3VForCausalLM:
    """Freezes all of the model but the parts that --vision_training names."""
    model.requires_grad_(False)
    for parameter in parameters_of(model, parts_of(vision_training)).values():
        parameter.requires_grad_(True)
    return model


def trained_fully(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The weights of the base model that train beside its adapter, by their names in the base model."""
    named = model.get_base_model().named_parameters()
    return {name: p for name, p in named if p.requires_grad and "lora_" not in name}


def save_parts(model: PeftModel, folder: Path):
    """Saves the weights that train fully beside the adapter, if there are any."""
    if trained := trained_fully(model):
        file = SEPARATORS_FILE if trained.keys() == set(SEPARATORS) else VISION_FILE
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, folder / file)
        let_others_read(folder)


def round_parts(model: PeftModel, dtype: torch.dtype):
    """Rounds the weights of VISION_FILE to the dtype in which the saved model will be loaded."""
    trained = trained_fully(model)
    for parameter in trained.values() if trained.keys() != set(SEPARATORS) else ():
        parameter.data = parameter.data.to(dtype)


def files_beside(folder: Path) -> list[Path]:
    """The files with weights that were trained fully beside the adapter in a folder."""
    return [folder / name for name in (SEPARATORS_FILE, VISION_FILE) if os.path.lexists(folder / name)]


def parts_beside(model: Phi3VForCausalLM, folder: Path) -> tuple[str, ...]:
    """Which parts were saved with an adapter. The model may be on the meta device, or have adapters.

    Raises InputError if a file holds anything but whole parts, and if two of them hold the same part."""
    found = []
    for path in files_beside(folder):
        shapes, parts = shapes_in([path]), ["separators"]
        if path.name == VISION_FILE:
            parts = [part for part in PARTS if parameters_of(model, [part]).keys() & shapes.keys()]
        wanted = {name: tuple(p.shape) for name, p in parameters_of(model, parts).items()}
        check_shapes(shapes, wanted, str(path))
        found += parts
    if len(found) > len(set(found)):
        raise InputError(f"{folder} holds separators in {SEPARATORS_FILE} and in {VISION_FILE}: delete one of them")
    return tuple(part for part in PARTS if part in found)


@torch.no_grad()
def load_parts(model: Phi3VForCausalLM, folder: Path):
    """Loads the weights that were saved with an adapter, if there are any, into its base model. Raises InputError for
    files that `parts_beside` refuses, and for weights that are NaN or infinite."""
    parts_beside(model, folder)
    for path in files_beside(folder):
        for name, tensor in load_file(path).items():
            if not tensor.isfinite().all():
                raise InputError(f"{folder}: the adapter's weights {name} hold NaN or infinity")
            model.get_parameter(name).copy_(tensor)


def check_same_parts(model: PeftModel, folder: Path):
    """Raises InputError unless a checkpoint holds exactly the weights that train fully beside the adapter."""
    base = model.get_base_model()
    found, wanted = parameters_of(base, parts_beside(base, folder)).keys(), trained_fully(model).keys()
    if different := sorted(found ^ wanted):
        what = "lacks" if different[0] in wanted else "holds"
        raise InputError(f"{folder} {what} {different[0]}: it is no checkpoint of a run that trains the same parts")
