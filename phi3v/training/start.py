"""What a run starts from: the model, which is looked at before anything is loaded, and then found or fetched."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..console import say
from ..errors import InputError
from ..files import read_json
from ..hub import fetch_model
from ..hub_names import is_hub_name, split_revision
from ..model.configuration_phi3v import Phi3VConfig
from ..model.folder import check_files
from ..model.loading import Saved, base_and_adapter, find_saved, outline_of, refuse_adapter
from ..model.lora_config import lora_config
from ..model.vision_parts import parts_beside, vision_training_of
from .adapter_rate import choose_rates_beside_adapters
from .checkpoints import MANIFEST
from .output_folder import BEST, BEST_EVALUATION, FINISHED

# Folders in an output folder that a run moves or deletes.
OWN_FOLDERS = re.compile(r"best|checkpoint-\d+|unfinished|dry_run")
# In a merged model, if a run saved the adapter's processor: which adapter and which base were merged.
MERGED = "merged.json"
# What an adapter decides on, and how messages say it.
DECIDED = {
    "lora_rank": "rank",
    "lora_alpha_ratio": "alpha as a multiple of the rank",
    "lora_dropout": "dropout",
    "use_dora": "DoRA",
    "freeze_vision_model": "frozen vision model",
    "train_separators": "trained separators",
    "vision_training": "whole parts of the vision model",
}


def check_model(args, output_dir: str):
    """Raises InputError for a model folder that can't be used, and for one that the run would move away."""
    if not args.evaluate_only:
        refuse_adapter(args.model_name_or_path, Path(args.model_name_or_path))
    base = base_and_adapter(args.model_name_or_path)[0]
    _check_model_folder(base)
    folder = Path(output_dir).resolve()
    if args.evaluate_only:
        return
    held = "is what --output_dir {} holds, and it would be moved away when training begins: choose another --output_dir"
    if Path(base).resolve() in (folder, folder / BEST):
        raise InputError(f"--model_name_or_path {base} {held.format(output_dir)}")
    adapter = Path(args.adapter).resolve() if args.adapter else None
    if adapter == folder or adapter and adapter.parent == folder and OWN_FOLDERS.fullmatch(adapter.name):
        raise InputError(f"--adapter {args.adapter} {held.format(output_dir)}")


def _check_model_folder(name: str):
    folder = Path(name)
    is_hub_name = name.count("/") == 1 and folder.parts[0] not in ("/", ".", "..", "~") and not folder.parent.is_dir()
    if is_hub_name:
        return
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except OSError:
        raise InputError(f"--model_name_or_path {name}: there is no such folder with a config.json in it") from None
    except InputError as e:
        raise InputError(f"--model_name_or_path {name}: {e}") from None
    except (ValueError, AttributeError):
        raise InputError(f"--model_name_or_path {name}: its config.json is not a JSON object") from None
    if model_type != "phi3_v":
        raise InputError(f"--model_name_or_path {name} holds a model of type {model_type}, must be phi3_v")


def num_crops_of_run(name: str | Path) -> int | None:
    """--num_crops of the run that saved this model or adapter; None if no run of these scripts did."""
    folder = Path(name)
    marks = (FINISHED, BEST_EVALUATION, MANIFEST, MERGED, "adapter_config.json")
    try:
        return read_json(folder / "preprocessor_config.json")["num_crops"] if _has_any(folder, marks) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def explicit_flags(given: set[str]) -> list[str]:
    """Of the flags on the command line, those of which an adapter says what they are, and --model_name_or_path."""
    return sorted(given & {*DECIDED, "model_name_or_path"})


def base_of_adapter(args) -> str:
    """--model_name_or_path; if it is not given, the base of a local adapter that is trained further.

    Raises InputError if the folder holds no adapter."""
    if not args.adapter or is_hub_name(split_revision(args.adapter, "adapter")[0]):
        return args.model_name_or_path
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        raise InputError(f"--adapter {args.adapter} has no adapter_config.json: give the output folder of a LoRA run")
    named = base_and_adapter(args.adapter)[0]
    return args.model_name_or_path if "model_name_or_path" in args.explicit else named


def find_start(args, check: Callable[[Path], None]) -> Saved:
    """Finds the model to train or to evaluate, or the adapter of --adapter and its base, and fetches it from the Hub.

    args: a script's flags, of which those that say where the model is become exact: --model_revision is the commit, and
    so is what --adapter has behind the @.
    check: called with the folder of the base, and of an adapter that is evaluated. Weights are not fetched yet, unless
        there is an adapter.
    Raises InputError as `find_saved` and `check` do.
    """
    name, weights = args.model_name_or_path, not (args.estimate or args.check_data)
    if args.adapter:
        saved = _find_adapter(args, weights)
        if not args.evaluate_only:
            adopt_adapter(args)
    else:
        saved = find_saved(name, args.model_revision, weights=weights, check=check)
        args.model_revision = saved.commits.get(name)
    if saved.adapter:
        check(saved.base_folder)
    return saved


def _find_adapter(args, weights: bool) -> Saved:
    name, revision = split_revision(args.adapter, "adapter")
    folder = fetch_model(name, weights=False, revision=revision, check=check_files)
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"--adapter {args.adapter} has no adapter_config.json: it must be an adapter")
    base, warnings = _base_given(args, folder)
    if is_hub_name(name):
        revision, args.adapter = folder.name, f"{name}@{folder.name}"
    hint = "" if base else ": give --model_name_or_path"
    saved = find_saved(name, revision, base=base, weights=weights, adapter_weights=True, base_help=hint)
    say(*warnings)
    args.model_name_or_path, args.model_revision = saved.base, saved.commits.get(saved.base)
    args.adapter_folder = str(saved.adapter)
    has_processor = (folder / "preprocessor_config.json").is_file()
    return saved if has_processor else replace(saved, folder=saved.base_folder)


def _base_given(args, folder: Path) -> tuple[str | None, list[str]]:
    """The base that --model_name_or_path gives, and a warning if it is not the one that the adapter in `folder` names.
    None for the one that it names, at its commit."""
    if "model_name_or_path" not in args.explicit:
        return None, []
    base, own = args.model_name_or_path, args.model_revision
    named, revision, _ = base_and_adapter(folder)
    same = base == named or not is_hub_name(base) and Path(base).resolve() == Path(named).resolve()
    if same and own in (None, revision):
        return None, []
    base = f"{base}@{own}" if own else base
    named = f"{named}@{revision}" if is_hub_name(named) and revision else named
    return base, [f"warning: {args.adapter} was trained on {named}; --model_name_or_path {base} is used in its place"]


def adopt_adapter(args):
    """Sets the flags on which the adapter of --adapter decides, and says what they are.

    Raises InputError if a flag on the command line contradicts the adapter, and for an adapter that can't be loaded.
    """
    folder = Path(args.adapter_folder)
    outline = outline_of(Phi3VConfig.from_pretrained(args.model_name_or_path, revision=args.model_revision))
    config, parts = lora_config(folder, outline), parts_beside(outline, folder)
    vision = vision_training_of(parts)
    if vision is None:
        raise InputError(
            f"--adapter {args.adapter} has a tower and a projector without separators, which can't be trained"
        )
    found = {
        "lora_rank": config.r,
        "lora_alpha_ratio": config.lora_alpha / config.r,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "freeze_vision_model": not parts and not any("vision_embed_tokens" in name for name in config.target_modules),
        "train_separators": "separators" in parts and vision != "all",
        "vision_training": vision,
    }
    for flag, value in found.items():
        given = getattr(args, flag)
        is_same = math.isclose(given, value) if isinstance(value, float) else given == value
        if flag in args.explicit and not is_same:
            raise InputError(
                f"--{flag} {given} contradicts --adapter {args.adapter}, where it is {value}: leave it out"
            )
        setattr(args, flag, value)
    values = ", ".join(f"{DECIDED[flag]} {value:g}" for flag, value in found.items() if type(value) in (int, float))
    values += "".join(f", {DECIDED[flag]}" for flag, value in found.items() if value is True)
    values += f", {DECIDED['vision_training']}: {vision}" if vision != "default" else ""
    say(f"adapter    {args.adapter} is trained further on {args.model_name_or_path}; its own: {values}")
    choose_rates_beside_adapters(args)
