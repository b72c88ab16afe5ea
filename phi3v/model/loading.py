"""Loads a saved model or adapter, in 4 bits or not, and refuses a model that lacks weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from ..errors import InputError
from ..files import read_json
from ..hub import fetch_model
from ..hub_names import is_hub_name, split_revision
from .adapters import check_adapter, load_adapter
from .configuration_phi3v import Phi3VConfig
from .folder import check_files, check_processor_fits
from .generation import name_unused_settings
from .modeling_phi3v import Phi3VForCausalLM
from .weights import check_shapes, shapes_in, weight_files

REVISION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
IS_IT_WHOLE = ": is it a whole Phi-3.5-vision?"


def not_quantized(quantize_vision: bool) -> list[str]:
    """Name patterns of the modules that QLoRA leaves in half precision: the output layer and, without
    `quantize_vision`, the tower and the projector, which lose accuracy in 4 bits."""
    return ["lm_head"] + ([] if quantize_vision else [".*vision_embed_tokens"])


def nf4_config(compute_dtype: torch.dtype, quantize_vision: bool = False) -> BitsAndBytesConfig:
    """The quantisation of QLoRA's base: weights in NF4 with quantised scales (Dettmers et al., 2023, arXiv 2305.14314).

    compute_dtype: in which matrix products are computed; quantize_vision: as in `not_quantized`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=not_quantized(quantize_vision),
    )


def check_complete(loading_info: dict, name: str):
    """Raises InputError if weights were missing, because `from_pretrained` gives these random values.

    loading_info: what `from_pretrained(…, output_loading_info=True)` returns beside the model.
    name: the model's name in the message.
    """
    if missing := sorted(loading_info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{name} lacks the weights {', '.join(missing[:3])}{more}{IS_IT_WHOLE}")


def base_and_adapter(name: str | Path) -> tuple[str, str | None, Path | None]:
    """(base model, its revision, folder of the adapter) if `name` is a folder with an adapter; (name, None, None) for
    anything else.

    A folder that the adapter names is looked for as it is named, and then from the adapter's folder. Raises InputError
    if the adapter does not name its base.
    """
    config = Path(name) / "adapter_config.json"
    if not config.exists():
        return str(name), None, None
    content = read_json(config)
    content = content if isinstance(content, dict) else {}
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(base, str) or not base:
        raise InputError(f"{config} does not name a base_model_name_or_path")
    if not (revision is None or isinstance(revision, str) and REVISION.fullmatch(revision)):
        raise InputError(f"{config}: revision is {revision!r:.80}, must be a branch, a tag or a commit of the base")
    try:
        if not Path(base).is_dir() and (Path(name) / base).is_dir():
            base = str(Path(name) / base)
        Path(base).exists()
    except (OSError, ValueError):  # a name with NUL, or one that is too long
        raise InputError(f"{config}: base_model_name_or_path is {base!r:.80}, which can't be a folder's name") from None
    return base, revision, Path(name)


def refuse_adapter(name: str, folder: Path):
    """Raises InputError if a folder, which --model_name_or_path names, holds an adapter."""
    base, _, adapter = base_and_adapter(folder)
    if adapter:
        raise InputError(
            f"--model_name_or_path {name} holds an adapter: give its base {base}, with --adapter {name} to train the "
            "adapter further, or merge them with tools/merge_adapter.py, or --evaluate_only"
        )


@dataclass(frozen=True)
class Saved:
    """A saved model, or an adapter and its base, on this machine.

    folder: of the model or the adapter; adapter: the same for an adapter, None for a model.
    base: name of the whole model; base_folder: where it lies.
    commits: of the repositories on the Hub that these are from, by name.
    """

    folder: Path
    adapter: Path | None
    base: str
    base_folder: Path
    commits: dict[str, str]


def find_saved(
    name: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    weights: bool = True,
    adapter_weights: bool = False,
    check: Callable[[Path], None] | None = None,
    base_help: str = "",
) -> Saved:
    """Finds a model, or an adapter and its base, in local folders or in the Hub's cache, to which it fetches them.

    name: a folder, or a repository on the Hub; revision: of that repository.
    base: the adapter's base, if it is not the one that the adapter names: a folder, or owner/name or
        owner/name@revision. The base that it names is loaded at the commit with which the adapter was trained.
    weights: whether weights are fetched and checked too; adapter_weights: whether those of `name` are fetched anyway.
    check: called with the folder of `name` before its weights are fetched.
    Raises InputError if something can't be fetched, which for a base ends in `base_help`; if an adapter does not name
    its base; and for files that can't be read or do not fit together.
    """

    def look(folder: Path):
        check_files(folder)
        if check:
            check(folder)

    folder = fetch_model(name, weights or adapter_weights, revision, look)
    commits = {name: folder.name} if is_hub_name(name) else {}
    named_base, base_revision, adapter = base_and_adapter(folder)
    if adapter is None:
        saved = Saved(folder, None, name, folder, commits)
        check_saved(saved, weights)
        return saved
    if base:
        named_base, base_revision = split_revision(base, "base")
    elif not is_hub_name(named_base):
        base_revision = None

    def look_at_base(folder: Path):
        check_files(folder)
        if base_and_adapter(folder)[2]:
            raise InputError(
                f"{named_base}, the base of the adapter {name}, is an adapter itself, must be a whole model"
            )

    try:
        base_folder = fetch_model(named_base, weights, base_revision, look_at_base)
        if is_hub_name(named_base):
            commits[named_base] = base_folder.name
        saved = Saved(folder, adapter, named_base, base_folder, commits)
        config = check_saved(saved, weights)
    except InputError as e:
        raise InputError(f"{e}{base_help}") from None
    if weights:
        check_adapter(outline_of(config), adapter)
    return saved


def outline_of(config: Phi3VConfig) -> Phi3VForCausalLM:
    """The model on the meta device, where it has no weights and takes no memory."""
    with torch.device("meta"):
        return Phi3VForCausalLM(config)


def check_saved(saved: Saved, weights: bool) -> Phi3VConfig:
    """The configuration of a whole model, or of an adapter's base.

    Raises InputError if it can't be used, if the tokenizer and the image processor do not fit it, and with `weights` if
    the saved weights are not exactly those that it describes.
    """
    try:
        config = Phi3VConfig.from_pretrained(saved.base_folder)
        if weights:
            found = shapes_in(weight_files(saved.base_folder))
            wanted = outline_of(config).state_dict()
            check_shapes(found, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, saved.base, IS_IT_WHOLE)
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"{saved.base} can't be loaded ({' '.join(str(e).split())})") from None
    for folder in {saved.folder, saved.base_folder}:
        check_processor_fits(folder, config)
    if weights:
        name_unused_settings(saved.base_folder)
    return config


def load_saved(
    saved: Saved,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | str | None = None,
    with_adapter: bool = True,
):
    """Loads what a run has saved: a Phi3VForCausalLM, or a PeftModel that wraps the base of a saved adapter.

    with_adapter: without it, loads the base alone.
    device: where the weights are loaded to. `quantization` needs it.
    Raises InputError if weights are missing, and whatever `from_pretrained` raises.
    """
    model, loading_info = Phi3VForCausalLM.from_pretrained(
        saved.base_folder,
        use_safetensors=True,  # never unpickles
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        device_map=None if device is None else {"": device},
    )
    check_complete(loading_info, saved.base)
    return load_adapter(model, saved.adapter) if saved.adapter and with_adapter else model
