"""Which files and folders a run of these scripts has written. Only those may be deleted, moved or overwritten.

Some files say it themselves: `RECORDS`. The weights and the processor of a run have names that other programs use too;
they count as written by a run if such a record lies beside them. Earlier versions have written the same files.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InputError
from ..files import open_regular, read_json

MANIFEST = "complete.json"  # written last: a checkpoint without it is not whole
UNFINISHED = "unfinished"  # in the output folder: what is being written
LOCK = ".locked-by-a-run"  # folder_lock.py: there while a run is in the folder, and after one that was killed
MARK = ".written-by-a-run"  # empty; first file in a folder that is filled or deleted step by step

FULL_MODEL = r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
ADAPTER = r"adapter_config\.json|adapter_model\.safetensors|(separators|vision)\.safetensors"
PROCESSOR = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|preprocessor_config\.json|processor_config\.json|training_args\.bin"
)
REPORTS = r"README\.md|report\.html|eval_before\.json|eval_after\.json|finished\.json"
EVALUATION = r"evaluation(-[\w.-]+)?\.(json|html)"  # with the split; without one by earlier versions, and in best/
STATE = (
    r"trainer_state\.json|complete\.json|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|latest"
    r"|zero_to_fp32\.py|\w+_states\.pt"
)
HALF_WRITTEN = r"\.tmp\w{6}|.+\.[0-9a-f]{32}\.partial|\.written-by-a-run|\.locked-by-a-run"  # the first: by safetensors
BY_THE_SYSTEM = r"\.nfs[0-9a-f]+|\.DS_Store"  # the first: what NFS makes of a deleted file that is still open
WRITTEN = re.compile(
    "|".join((FULL_MODEL, ADAPTER, PROCESSOR, REPORTS, EVALUATION, STATE, HALF_WRITTEN, BY_THE_SYSTEM))
)


def _head(path: Path, size: int = 65536) -> str:
    with open_regular(path) as file:
        return file.read(size).decode("utf-8", errors="replace")


def _is_page(path: Path) -> bool:
    policy = "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    return policy in _head(path, 1024)


def _is_card(path: Path) -> bool:
    text = _head(path)
    return text.startswith("---\n") and "from phi3v import Phi3VForCausalLM, Phi3VProcessor" in text


def _is_report(path: Path) -> bool:
    start = r'\{\s*("step": \d+,\s*)?"metric": "(.*)",\s*"\2": [^,]*,\s*"num_examples": \d+,\s*"predictions": \['
    return re.match(start, _head(path, 1024)) is not None


def _is_settings(path: Path) -> bool:
    content = read_json(path)
    return isinstance(content, dict) and {"model_name_or_path", "batch_size", "world_size"} <= content.keys()


def _says(key: str, *values: str) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        content = read_json(path)
        return isinstance(content, dict) and (content.get(key) in values if values else key in content)

    return check


# Names of files that say themselves whether a run wrote them, and how they are recognised.
RECORDS = {
    "README.md": _is_card,
    "eval_before.json": _is_report,
    "eval_after.json": _is_report,
    "report.html": _is_page,
    "finished.json": _is_settings,
}
OTHERS = {
    "config.json": _says("model_type", "phi3_v"),
    "adapter_config.json": _says("peft_type"),
    "preprocessor_config.json": _says("image_processor_type", "Phi3VImageProcessor"),
    "processor_config.json": _says("processor_class", "Phi3VProcessor"),
}


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether there is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _passes(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return is_regular(path) and check(path)
    except (OSError, InputError):
        return False


def _check_of(name: str) -> Callable[[Path], bool] | None:
    """How a file of this name is recognised as a run's, if it says so itself."""
    if re.fullmatch(EVALUATION, name):
        return _is_page if name.endswith(".html") else _is_report
    return RECORDS.get(name) or OTHERS.get(name)


def _is_denied(path: Path) -> bool:
    """Whether a file with a name that runs use says that no run wrote it."""
    check = _check_of(path.name)
    try:
        return check is not None and not check(path)
    except (OSError, InputError):  # it was being written when its run was killed; records appear whole
        return path.name in RECORDS


def has_record(folder: Path) -> bool:
    """Whether a file in the folder says that a run wrote it."""
    return any(_passes(folder / name, check) for name, check in RECORDS.items())


def is_own_file(path: Path, folder_has_record: bool) -> bool:
    """Whether a run wrote this file of an output folder. folder_has_record: `has_record` of that folder."""
    if check := RECORDS.get(path.name):
        return _passes(path, check)
    if not is_regular(path) or not WRITTEN.fullmatch(path.name):
        return False
    if re.fullmatch(EVALUATION, path.name):
        return _passes(path, _check_of(path.name))
    return folder_has_record and not _is_denied(path)


def is_checkpoint(folder: Path) -> bool:
    """Whether a run wrote this folder checkpoint-N, damaged or not: it appears with its manifest."""
    return is_folder(folder) and is_regular(folder / MANIFEST)


def is_best(folder: Path) -> bool:
    """Whether a run wrote this folder as that of its best model."""
    try:
        content = read_json(folder / "evaluation.json") if is_folder(folder) else None
    except (OSError, InputError):
        return False
    return isinstance(content, dict) and all(type(content.get(key)) is int for key in ("step", "num_examples"))


def strangers(folder: Path) -> list[str]:
    """Relative paths of what lies in a folder of a run and was not written by it: files with other names, links, pipes.
    The manifest of a checkpoint may list more names."""
    listed = ()
    if is_regular(folder / MANIFEST):
        try:
            listed = read_json(folder / MANIFEST)["files"]
        except (OSError, InputError, KeyError, TypeError):
            pass
    found = []
    for root, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(root, name)))]:
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            is_known = WRITTEN.fullmatch(name) or isinstance(listed, dict) and relative in listed
            if not (is_known and is_regular(path)) or _is_denied(path):
                found.append(relative)
    return sorted(found)


def is_own_folder(folder: Path) -> bool:
    """Whether a run wrote all of this folder, which it has not finished or which it was deleting."""
    if not is_folder(folder) or strangers(folder):
        return False
    if any(is_regular(folder / name) for name in (MARK, MANIFEST)) or has_record(folder):
        return True
    if not any(path.stat().st_size for path in folder.rglob("*") if path.is_file()):
        return True  # there is nothing to lose
    # What earlier versions have left, which knew no mark: what they were writing, or a dry run in the middle of it.
    if folder.parent.name == UNFINISHED:
        return any((folder / name).is_file() for name in ("config.json", "adapter_model.safetensors"))
    inner = (*folder.glob(f"{UNFINISHED}/*"), *folder.glob("checkpoint-*"))
    return any(is_folder(path) and is_own_folder(path) for path in inner)


def claim(folder: Path):
    """Makes a folder with the mark in it, before anything else is written there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def delete_own(folder: Path):
    """Deletes a folder that a run has written, but not what lies in it and was not written by a run.

    A mark is deleted last: if this process is killed meanwhile, the next run knows what the rest of the folder is.
    """
    if not is_folder(folder):
        return
    foreign, mark = set(strangers(folder)), folder / MARK
    mark.touch()
    for root, _, files in os.walk(folder, topdown=False):
        for path in (Path(root, name) for name in files):
            if path != mark and str(path.relative_to(folder)) not in foreign:
                with contextlib.suppress(OSError):  # NFS keeps a file that is still open, and deletes it later
                    path.unlink()
        if Path(root) != folder:
            _remove_if_empty(Path(root))
    mark.unlink()
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path):
    with contextlib.suppress(OSError):
        folder.rmdir()


def free_name(path: Path) -> Path:
    """`path`, or if there is something of that name: abandoned-2-NAME for abandoned-NAME, and so on."""
    first, _, rest = path.name.partition("-")
    numbered = (path.with_name(f"{first}-{number}-{rest}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def refuse_foreign(output_dir: Path, foreign: Iterable[str]):
    """Raises InputError if there is anything in the output folder that the run would overwrite, and no run wrote."""
    if names := sorted(foreign):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise InputError(
            f"--output_dir {output_dir} holds {', '.join(names[:5])}{more}, which no run of these scripts has written "
            "and this run would overwrite: choose another --output_dir, or move that away"
        )
