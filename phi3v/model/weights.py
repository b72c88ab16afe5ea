"""The names, types and shapes of saved weights, read before anything is loaded or allocated."""

import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..files import open_regular
from ..hub import INDEX, shards_of

Shape = tuple[int, ...]
SHARD_SIZE = "5GB"  # of saved models, as on the Hub; transformers would write files of up to 50 GB
# In the older checkpoints of others, and not in the model: a copy of the text embedding, and buffers.
IGNORED = (".vision_embed_tokens.wte.weight", ".position_ids", ".inv_freq")
FLOATS = {"F64", "F32", "F16", "BF16"}
# What bitsandbytes saves beside a weight in 4 or 8 bits, whose own shape and type are others then.
OF_QUANTIZED = re.compile(r"(.*)\.(weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\.\w+|SCB|weight_format)")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a whole model. Raises InputError if one is missing; files of other kinds are not read,
    because loading a pickle can run code."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        more = f"; {pickles[0]:.80} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise InputError(f"{folder} has no model.safetensors{more}")
    files = [folder / name for name in shards_of(folder / INDEX)]
    if missing := [path.name for path in files if not path.exists()]:
        raise InputError(f"{folder} lacks {missing[0]:.80}, which its {INDEX} names")
    return files


def shapes_in(files: Iterable[Path]) -> dict[str, Shape]:
    """The shape of every tensor in safetensors files. Raises InputError for files that are none, for types that are not
    floating-point numbers, and for a tensor that is there twice. Weights in 4 or 8 bits have no shape, ()."""
    shapes, kinds = {}, {}
    for path in files:
        open_regular(path).close()
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    if name in shapes:
                        raise InputError(f"{path} holds {name:.200}, which another of its model's files holds too")
                    piece = file.get_slice(name)
                    shapes[name], kinds[name] = tuple(piece.get_shape()), piece.get_dtype()
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path} can't be read as safetensors ({' '.join(str(e).split()):.200})") from None
    beside = {name: match[1] for name in shapes if (match := OF_QUANTIZED.fullmatch(name))}
    quantized = {f"{module}.weight" for module in beside.values()} & shapes.keys()
    for name, kind in kinds.items():
        if kind not in FLOATS and name not in beside and name not in quantized and not name.endswith(IGNORED):
            raise InputError(f"{name:.200} holds numbers of type {kind}, must be one of {', '.join(sorted(FLOATS))}")
    return {name: () if name in quantized else shape for name, shape in shapes.items() if name not in beside}


def check_shapes(found: dict[str, Shape], wanted: dict[str, Shape], source: str, help: str = ""):
    """Raises InputError, which ends in `help`, unless the saved weights are exactly those of the model."""
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"lacks the weights {_some(missing)}")
    if extra := sorted(name for name in found.keys() - wanted.keys() if not name.endswith(IGNORED)):
        problems.append(f"holds weights that the model does not have, {_some(extra)}")
    wrong = [name for name in sorted(found.keys() & wanted.keys()) if found[name] not in ((), wanted[name])]
    if wrong:
        name = wrong[0]
        more = f", and {len(wrong) - 1} more have other shapes" if len(wrong) > 1 else ""
        problems.append(f"holds {name} of shape {list(found[name])}, must be {list(wanted[name])}{more}")
    if problems:
        raise InputError(f"{source} {'; it '.join(problems)}{help}")


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.200}" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
