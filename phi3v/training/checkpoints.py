"""Checkpoints that appear whole or not at all.

The Trainer writes a checkpoint in OUTPUT_DIR/unfinished/; `publish` lists its files in a manifest and then moves it to
its place. A folder checkpoint-N is whole if all files in its manifest are there; without a manifest it is not whole.
"""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..console import say
from ..errors import InputError
from ..files import read_json, write_json
from .own_files import (
    MANIFEST,
    MARK,
    UNFINISHED,
    delete_own,
    free_name,
    is_checkpoint,
    is_folder,
    is_own_folder,
    strangers,
)
from .resuming import missing_files, problem_of_state
from .settings import problem_of_settings, short_json

PREFIX = "checkpoint-"
# What reading JSON of any other form can raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
kept_for_others = set()  # checkpoints that are not deleted, because they hold files that no run has written
DISK_FULL = re.compile(r"No space left|quota exceeded|file write failed|unexpected pos")  # in libraries' messages


def step_of(checkpoint: Path) -> int:
    """The step in the name of a folder checkpoint-N, which may also be called abandoned-checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def numbered(output_dir: Path) -> list[Path]:
    """Whatever is called checkpoint-N, the highest number first."""
    found = (path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=step_of, reverse=True)


def checkpoints(output_dir: Path) -> list[Path]:
    """All folders checkpoint-N, whole or not, the newest first."""
    return [path for path in numbered(output_dir) if path.is_dir()]


def newest_whole(output_dir: Path) -> Path | None:
    return next((path for path in checkpoints(output_dir) if damage(path) is None), None)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below the folder, by relative path, without the manifest."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, MARK))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def publish(unfinished: Path, settings: dict, keep: int | None):
    """Moves a written checkpoint from UNFINISHED to its place; then deletes older whole ones until `keep` are left.

    settings: what the run's result depends on, stored in the manifest.
    """
    for path in unfinished.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # otherwise the rename may reach the disk before the content does
    write_json(unfinished / MANIFEST, {"files": file_sizes(unfinished), "settings": settings})
    (unfinished / MARK).unlink(missing_ok=True)  # from now on, the manifest says what this folder is
    output_dir = unfinished.parent.parent
    target, step = output_dir / unfinished.name, step_of(unfinished)
    if os.path.lexists(target):
        if not is_checkpoint(target):
            raise InputError(f"{target} has appeared, which no run has written: the new checkpoint is in {unfinished}")
        aside = free_name(target.with_name(f"abandoned-{target.name}"))
        os.replace(target, aside if strangers(target) else unfinished.with_name("replaced"))
    os.replace(unfinished, target)
    up_to_now = [path for path in checkpoints(output_dir) if step_of(path) <= step and damage(path) is None]
    for old in up_to_now[keep:] if keep else []:
        if not is_folder(old) or strangers(old):
            if old not in kept_for_others:
                kept_for_others.add(old)
                say(f"{old} is kept, because no run has written {', '.join(strangers(old)[:3]) or 'it'}")
        else:
            os.replace(old, unfinished.with_name(old.name))  # a half-deleted folder must not look like a checkpoint
    clear_unfinished(output_dir)


def being_written(output_dir: Path) -> list[Path]:
    """What has the name of something that runs write in UNFINISHED; UNFINISHED itself if that is not a folder."""
    folder = output_dir / UNFINISHED
    if not is_folder(folder):
        return [folder] if os.path.lexists(folder) else []
    return [path for path in folder.iterdir() if re.fullmatch(rf"{PREFIX}\d+|best|replaced|replaced-best", path.name)]


def clear_unfinished(output_dir: Path):
    """Deletes what a run has left in UNFINISHED, and that folder itself if there is nothing else in it."""
    for path in being_written(output_dir):
        if is_own_folder(path):
            delete_own(path)
    with contextlib.suppress(OSError):
        (output_dir / UNFINISHED).rmdir()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole. Compares the sizes of files, not their contents."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files, settings = manifest["files"], manifest["settings"]
        if not (isinstance(files, dict) and isinstance(settings, dict)):
            raise TypeError("files and settings must be objects")
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except UNREADABLE as e:
        return f"its {MANIFEST} can't be read ({' '.join(str(e).split())[:100]})"
    found = file_sizes(checkpoint)
    for name, size in files.items():
        if name not in found:
            return f"its {name} is missing"
        if found[name] != size:
            return f"its {name} has {found[name]:,} bytes, not {short_json(size)}"
    if problem := problem_of_settings(settings):
        return f"its {MANIFEST} {problem}"
    try:
        problem = problem_of_state(read_json(checkpoint / "trainer_state.json"), step_of(checkpoint))
    except UNREADABLE:
        problem = "can't be read"
    if problem:
        return f"its trainer_state.json {problem}"
    if name := missing_files(found.keys()):
        return f"its {name} is missing"
    if special := [p for p in checkpoint.rglob("*") if p.exists() and not (p.is_file() or p.is_dir())]:
        return f"its {special[0].relative_to(checkpoint)} is not a regular file"
    return None


def find_checkpoint(asked: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and what to tell the user about it.

    asked: --resume_from_checkpoint: a folder, "auto" for the newest whole checkpoint of `output_dir`, or None.
    Raises InputError if the folder is not a whole checkpoint.
    """
    if asked is None:
        return None, []
    if asked != "auto":
        if (problem := damage(Path(asked))) is not None:
            raise InputError(
                f"--resume_from_checkpoint {asked} is not a whole checkpoint: {problem}; give another one, or auto"
            )
        return Path(asked), [f"resuming from {asked}"]
    messages = []
    for path in checkpoints(output_dir):
        if (problem := damage(path)) is None:
            return path, [*messages, f"resuming from {path}"]
        messages.append(f"warning: {path} is skipped: {problem}")
    return None, [*messages, f"no whole checkpoint in {output_dir}: training starts at step 0"]


def stored_settings(checkpoint: Path | None) -> dict:
    """The settings of the run that wrote the checkpoint; none without a checkpoint."""
    return read_json(checkpoint / MANIFEST)["settings"] if checkpoint else {}


def refuse_pickles():
    """Makes every later torch.load in this process, DeepSpeed's too, refuse to run code from a file. It still loads
    tensors, plain values, and the few harmless classes that DeepSpeed's checkpoints hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


@contextlib.contextmanager
def disk_full_as_input_error(folder: Path):
    """While `folder` is written: turns what libraries raise when the disk is full into an InputError, and deletes what
    was half written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        text = " ".join(str(e).split())
        output_dir = folder.parent.parent if folder.parent.name == UNFINISHED else folder
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(output_dir).free == 0
        if not (full or DISK_FULL.search(text)):
            raise
        clear_unfinished(output_dir)
        kept = newest_whole(output_dir)
        raise InputError(
            f"{folder} could not be written, because the disk is full or a quota is used up ({text[:150]}): free some "
            "space and resume with --resume_from_checkpoint auto, "
            + (f"from {kept}" if kept else "from the start, because there is no checkpoint yet")
        ) from None
