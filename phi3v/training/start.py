"""What a run starts from: the model, which is looked at before anything is loaded, and then found or fetched."""

import functools
from pathlib import Path

from ..errors import InputError
from ..files import read_json
from ..model.loading import Saved, base_and_adapter, find_saved, refuse_adapter
from .checkpoints import MANIFEST
from .output_folder import BEST, BEST_EVALUATION, FINISHED


def check_model(args, output_dir: str):
    """Raises InputError for a model folder that can't be used, and for one that the run would move away."""
    if not args.evaluate_only:
        refuse_adapter(args.model_name_or_path, Path(args.model_name_or_path))
    base = base_and_adapter(args.model_name_or_path)[0]
    _check_model_folder(base)
    folder = Path(output_dir).resolve()
    if not args.evaluate_only and Path(base).resolve() in (folder, folder / BEST):
        raise InputError(
            f"--model_name_or_path {base} is what --output_dir {output_dir} holds, and it would be moved away when "
            "training begins: choose another --output_dir"
        )


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
    marks = (FINISHED, BEST_EVALUATION, MANIFEST, "adapter_config.json")
    try:
        return read_json(folder / "preprocessor_config.json")["num_crops"] if _has_any(folder, marks) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def find_start(args) -> Saved:
    """Finds the model to train or to evaluate, and fetches it from the Hub. Sets --model_revision to its commit.

    args: a script's flags. Raises InputError as `find_saved` does.
    """
    name, weights = args.model_name_or_path, not (args.estimate or args.check_data)
    check = None if args.evaluate_only else functools.partial(refuse_adapter, name)
    saved = find_saved(name, args.model_revision, weights=weights, check=check)
    args.model_revision = saved.commits.get(name)
    return saved
