"""Prepares the output folder: checks the room on the disk, and moves away what an earlier run has left there."""

import itertools
import math
import os
import shutil
from pathlib import Path

from accelerate.utils import gather_object

from ..console import say
from ..errors import InputError
from ..files import read_json
from ..ranks import is_first
from .checkpoints import UNFINISHED, checkpoints, clear_unfinished, file_sizes, step_of, stored_settings
from .settings import check_settings, with_defaults

FINISHED = "finished.json"  # the settings of a run that has done everything asked for
BEST = "best"  # folder of the model that has evaluated best
BEST_EVALUATION = "evaluation.json"  # in BEST: the step and the evaluation of that model
REPLACED_BEST = "replaced-best"  # in UNFINISHED: the former BEST, while the new one takes its place
# Everything a run writes except checkpoints. It is moved away before a new run; otherwise it would look like the new
# run's results.
RESULTS = (
    BEST, FINISHED, "tokenizer*.json", "preprocessor_config.json", "processor_config.json",
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
    "README.md", "report.html", "eval_before.json", "eval_after.json", "evaluation.json", "evaluation.html",
)  # fmt: skip
DISK_SPEED = 5e8  # bytes/s, a guess at how fast checkpoints are written
TORCHRUN_PATIENCE = 25  # seconds: torchrun kills 30 s after it has passed on a signal


def is_finished(args, training_args, settings: dict) -> bool:
    """Whether `--resume_from_checkpoint auto` finds a finished run with the same settings in the output folder.

    Raises InputError if that run had other settings; with --resume_anyway, training resumes instead.
    """
    finished = Path(training_args.output_dir) / FINISHED
    if training_args.resume_from_checkpoint != "auto" or not finished.is_file():
        return False
    before = read_json(finished)
    now = settings | {"cached": before.get("cached")}  # known only once training has begun
    before = with_defaults(before, now, args, training_args)
    if before != now and args.resume_anyway:
        return False
    check_settings(before, now, finished, anyway=False)
    return True


def prepare_output(
    args, training_args, settings: dict, checkpoint: Path | None, model_bytes: float, checkpoint_bytes: float
):
    """Makes the output folder ready for training. Every rank calls it; only rank 0 changes files.

    settings: as `settings_of` returns them; checkpoint: to resume from, or None.
    model_bytes, checkpoint_bytes: what the model and one checkpoint will take on the disk.
    Raises InputError for a checkpoint of other settings, and for a disk without enough room.
    """
    output_dir = Path(training_args.output_dir)
    if checkpoint:
        before = with_defaults(stored_settings(checkpoint), settings, args, training_args)
        check_settings(before, settings, checkpoint, args.resume_anyway)
    if not is_first():
        return
    kept = (training_args.save_total_limit or 1) if training_args.save_strategy != "no" else 0
    check_space(output_dir, model_bytes, checkpoint_bytes, kept)
    best = output_dir / BEST
    if (output_dir / UNFINISHED / REPLACED_BEST).exists() and not best.exists():  # an earlier run died in between
        os.replace(output_dir / UNFINISHED / REPLACED_BEST, best)
    if checkpoint is None or checkpoint.resolve().parent != output_dir.resolve():
        set_aside_results(output_dir)
    (output_dir / FINISHED).unlink(missing_ok=True)
    clear_unfinished(output_dir)
    if checkpoint:
        set_aside_later(output_dir, step_of(checkpoint))
    if hint := shutdown_hint(checkpoint_bytes):
        say(hint)


def set_aside_later(output_dir: Path, step: int):
    """Renames checkpoints of steps after `step`, and the best model if it is from later: they are damaged, or of a
    training that took another course, and would look like this run's."""
    later = [path for path in checkpoints(output_dir) if step_of(path) > step]
    record = output_dir / BEST / BEST_EVALUATION
    if record.is_file() and read_json(record)["step"] > step:
        later.append(output_dir / BEST)
    for path in later:
        target = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)


def set_aside_results(output_dir: Path):
    """Moves what an earlier run has left into a folder earlier-N, so that it is not lost."""
    found = [path for pattern in RESULTS for path in output_dir.glob(pattern)]
    if not any(path.suffix == ".safetensors" or path.name == BEST for path in found):
        return
    number = next(n for n in itertools.count(1) if not (output_dir / f"earlier-{n}").exists())
    (output_dir / f"earlier-{number}").mkdir()
    for path in found:
        os.replace(path, output_dir / f"earlier-{number}" / path.name)
    say(f"{output_dir}: the model of an earlier run is in earlier-{number} now")


def check_same_folder(checkpoint: Path | None, output_dir: Path):
    """Raises InputError if the ranks would resume from different checkpoints, because they see different folders."""
    found = gather_object([checkpoint and checkpoint.name])
    if len(set(found)) > 1:
        raise InputError(
            f"--output_dir {output_dir} is not the same folder for all processes: they would resume from {found}; give "
            "a folder that every node sees"
        )


def check_space(output_dir: Path, model_bytes: float, checkpoint_bytes: float, checkpoints_kept: int):
    """Raises InputError if the disk has no room for the model and the checkpoints.

    There must be room for one checkpoint more than are kept, because an old one is deleted only when the new one is
    whole.
    """
    needed = model_bytes + checkpoint_bytes * (checkpoints_kept + 1 if checkpoints_kept else 0)
    present = sum(sum(file_sizes(path).values()) for path in checkpoints(output_dir)) if checkpoints_kept else 0
    free = shutil.disk_usage(output_dir).free + present
    if needed > free:
        raise InputError(
            f"--output_dir {output_dir} has {free / 2**30:.1f} GiB of room, and needs about {needed / 2**30:.1f}: the "
            f"model {model_bytes / 2**30:.1f}, checkpoints {checkpoint_bytes / 2**30:.1f} each; free some, choose "
            "another disk, or lower --save_total_limit"
        )


def shutdown_hint(checkpoint_bytes: float) -> str | None:
    """Advice if writing a checkpoint will take longer than torchrun waits after a SIGTERM; None if it will not."""
    seconds = checkpoint_bytes / DISK_SPEED
    if seconds < TORCHRUN_PATIENCE:
        return None
    return (
        f"a checkpoint has about {checkpoint_bytes / 2**30:.0f} GiB: give torchrun --shutdown-timeout "
        f"{math.ceil(seconds / 60) * 120}, because it kills 30 s after a SIGTERM, before the checkpoint is written"
    )
