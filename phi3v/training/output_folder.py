"""Prepares the output folder: checks the room on the disk, and moves away what an earlier run has left there."""

import itertools
import math
import os
import re
import shutil
from pathlib import Path

from accelerate.utils import gather_object

from ..console import say
from ..errors import InputError
from ..files import read_json
from ..ranks import is_first
from .checkpoints import being_written, checkpoints, clear_unfinished, file_sizes, numbered, step_of, stored_settings
from .early_stopping import take_record
from .folder_lock import lock_folder
from .own_files import (
    ADAPTER,
    EVALUATION,
    FULL_MODEL,
    PROCESSOR,
    RECORDS,
    REPORTS,
    UNFINISHED,
    claim,
    delete_own,
    free_name,
    has_record,
    is_best,
    is_checkpoint,
    is_folder,
    is_own_file,
    is_own_folder,
    refuse_foreign,
    strangers,
)
from .settings import check_settings, problem_of_settings, with_defaults

FINISHED = "finished.json"  # the settings of a run that has done everything asked for
BEST = "best"  # folder of the model that has evaluated best
BEST_EVALUATION = "evaluation.json"  # in BEST: the step and the evaluation of that model
REPLACED_BEST = "replaced-best"  # in UNFINISHED: the former BEST, while the new one takes its place
ANEW = "without --resume_from_checkpoint, its results are moved to earlier-N and training begins anew"
DISK_SPEED = 5e8  # bytes/s, a guess at how fast checkpoints are written
TORCHRUN_PATIENCE = 25  # seconds: torchrun kills 30 s after it has passed on a signal


def make_output_dir(folder: Path, may_hold_checkpoints: bool, args):
    """Makes the output folder, and locks it unless --evaluate_only is given, which overwrites nothing. Raises
    InputError if that can't be done, and if there are checkpoints that this run would neither resume nor evaluate."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output_dir {folder} can't be made: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder} is not writable")
    if not args.evaluate_only:
        lock_folder(folder, args.dry_run)
    if not may_hold_checkpoints and numbered(folder) and not is_own_file(folder / FINISHED, False):
        raise InputError(
            f"--output_dir {folder} holds checkpoints: resume with --resume_from_checkpoint auto, or choose another"
        )


def check_output(output_dir: Path, args, report_to):
    """Raises InputError if this run would overwrite something in its output folder that no run has written.

    args: a script's flags; report_to: the trackers, as --report_to names them.
    """
    if args.dry_run:
        if os.path.lexists(output_dir) and not is_own_folder(output_dir):
            inside = strangers(output_dir) if is_folder(output_dir) else []
            refuse_foreign(output_dir.parent, [str(Path(output_dir.name, name)) for name in inside or [""]])
        return
    if args.evaluate_only:  # its files have names that are free
        return
    foreign = _foreign_files(output_dir, "|".join((REPORTS, PROCESSOR, ADAPTER if args.use_lora else FULL_MODEL)))
    foreign += [path.name for path in numbered(output_dir) if not is_checkpoint(path)]
    foreign += [str(path.relative_to(output_dir)) for path in being_written(output_dir) if not is_own_folder(path)]
    best, runs = output_dir / BEST, output_dir / "runs"
    foreign += [BEST] if args.keep_best and os.path.lexists(best) and not is_best(best) else []
    foreign += ["runs"] if "tensorboard" in str(report_to) and os.path.lexists(runs) and not runs.is_dir() else []
    refuse_foreign(output_dir, foreign)


def enter_output(output_dir: Path, args, report_to):
    """Raises InputError as `check_output` does. With --dry_run, empties the folder, in which a dry run may have been
    stopped, and marks it as this run's."""
    check_output(output_dir, args, report_to)
    if args.dry_run and is_first():
        delete_own(output_dir)
        claim(output_dir)


def folder_for_evaluation(model: str) -> str | None:
    """Where --evaluate_only writes unless --output_dir is given: beside the model's files. Beside the folder for a
    checkpoint and a best model, which a training may delete. None for a model on the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    return str(folder.parent if is_checkpoint(folder) or is_best(folder) else folder)


def _foreign_files(output_dir: Path, names: str) -> list[str]:
    """What has one of these names, a regular expression, and was not written by a run."""
    recorded = has_record(output_dir)
    with os.scandir(output_dir) as entries:
        found = [Path(entry) for entry in entries if re.fullmatch(names, entry.name)]
    return [path.name for path in found if not is_own_file(path, recorded)]


def is_finished(args, training_args, settings: dict) -> str | None:
    """A text that says which finished run with the same settings `--resume_from_checkpoint auto` finds in the output
    folder; None if it finds none.

    Raises InputError if that run had other settings; with --resume_anyway, training resumes instead.
    """
    finished = Path(training_args.output_dir) / FINISHED
    if training_args.resume_from_checkpoint != "auto" or not finished.is_file():
        return None
    before = read_json(finished)
    if problem := problem_of_settings(before):
        raise InputError(f"{finished} {problem}: delete it, or choose another --output_dir")
    early, how = take_record(before, args)
    now = settings | early | {"cached": before.get("cached")}  # known only once training has begun
    if args.max_tokens_per_gpu == "auto":
        now["tokens"] = before.get("tokens")  # likewise, because a micro-batch is measured
    before = with_defaults(before, now, args, training_args)
    if before != now and args.resume_anyway:
        return None
    check_settings(before, now, finished, anyway=False)
    return f"a finished run{how}"


def better_model(output_dir: Path, after: dict) -> dict[str, str]:
    """For the report: where the best model lies, if an earlier one was better than the last; otherwise nothing.

    after: the report of the evaluation after training."""
    folder, metric = output_dir / BEST, after["metric"]
    if not is_best(folder):
        return {}
    best = read_json(folder / BEST_EVALUATION)
    if best["num_examples"] != after["num_examples"] or not best[metric] > after[metric]:
        return {}
    return {"better model": f"a better one, {metric} {best[metric]:.4f} at step {best['step']:,}, is in {folder}"}


def prepare_output(
    args,
    training_args,
    settings: dict,
    checkpoint: Path | None,
    model_bytes: float,
    checkpoint_bytes: float,
    steps: int | None = None,
):
    """Makes the output folder ready for training. Every rank calls it; only rank 0 changes files.

    settings: as `settings_of` returns them; checkpoint: to resume from, or None.
    model_bytes, checkpoint_bytes: what the model and one checkpoint will take on the disk.
    steps: of the whole training, if they are known.
    Raises InputError for a checkpoint of other settings, for a disk without enough room, and as `check_output` does.
    """
    output_dir = Path(training_args.output_dir)
    if checkpoint:
        before = with_defaults(stored_settings(checkpoint), settings, args, training_args)
        check_settings(before, settings, checkpoint, args.resume_anyway)
    if not is_first():
        return
    if not args.dry_run:
        check_output(output_dir, args, training_args.report_to)
    check_space(output_dir, model_bytes, checkpoint_bytes, checkpoints_kept(training_args, steps), bool(checkpoint))
    best, replaced = output_dir / BEST, output_dir / UNFINISHED / REPLACED_BEST
    if is_best(replaced) and not os.path.lexists(best):  # an earlier run died in between
        os.replace(replaced, best)
    if checkpoint is None or checkpoint.resolve().parent != output_dir.resolve():
        set_aside_results(output_dir)
    (output_dir / FINISHED).unlink(missing_ok=True)
    clear_unfinished(output_dir)
    if checkpoint:
        set_aside_later(output_dir, step_of(checkpoint))
    if hint := shutdown_hint(checkpoint_bytes):
        say(hint)


def checkpoints_kept(training_args, steps: int | None) -> int:
    """How many checkpoints lie in the output folder at the same time, as far as --save_total_limit says."""
    if training_args.save_strategy == "no":
        return 0
    kept, every = training_args.save_total_limit or 1, training_args.save_steps
    if steps:
        kept = min(kept, math.ceil(steps / (every if every >= 1 else math.ceil(steps * every))))
    return kept


def set_aside_later(output_dir: Path, step: int):
    """Renames checkpoints of steps after `step`, and the best model if it is from later: they are damaged, or of a
    training that took another course, and would look like this run's."""
    later = [path for path in checkpoints(output_dir) if step_of(path) > step and is_checkpoint(path)]
    best = output_dir / BEST
    if is_best(best) and read_json(best / BEST_EVALUATION)["step"] > step:
        later.append(best)
    for path in later:
        target = path.with_name(f"abandoned-{path.name}")
        if (is_best(target) or is_checkpoint(target)) and not strangers(target):
            delete_own(target)
        os.replace(path, free_name(target))


def set_aside_results(output_dir: Path):
    """Moves what an earlier run has left into a folder earlier-N, so that it is not lost, with the checkpoints of a run
    that has finished."""
    names = "|".join((REPORTS, PROCESSOR, ADAPTER, FULL_MODEL, EVALUATION))
    recorded = has_record(output_dir)
    found = [path for path in output_dir.iterdir() if re.fullmatch(names, path.name) and is_own_file(path, recorded)]
    found += [output_dir / BEST] if is_best(output_dir / BEST) else []
    if not any(path.suffix == ".safetensors" or path.name in (BEST, FINISHED) for path in found):
        return
    if any(path.name == FINISHED for path in found):
        found += [path for path in numbered(output_dir) if is_checkpoint(path)]
    number = next(n for n in itertools.count(1) if not os.path.lexists(output_dir / f"earlier-{n}"))
    target = output_dir / f"earlier-{number}"
    target.mkdir()
    # The files that say what the others are go last, in case that this process is killed meanwhile.
    for path in sorted(found, key=lambda path: (path.name in RECORDS, path.name == FINISHED)):
        os.replace(path, target / path.name)
    say(f"{output_dir}: what an earlier run has left is in earlier-{number} now")


def check_same_folder(checkpoint: Path | None, output_dir: Path):
    """Raises InputError if the ranks would resume from different checkpoints, because they see different folders."""
    found = gather_object([checkpoint and checkpoint.name])
    if len(set(found)) > 1:
        raise InputError(
            f"--output_dir {output_dir} is not the same folder for all processes: they would resume from {found}; give "
            "a folder that every node sees"
        )


def check_space(output_dir: Path, model_bytes: float, checkpoint_bytes: float, kept: int, resumes: bool = True):
    """Raises InputError if the disk has no room for the model and the checkpoints.

    resumes: whether the checkpoints that are there are this run's, and will be deleted. Those of a finished run stay.

    There must be room for one checkpoint more than are kept, because an old one is deleted only when the new one is
    whole.
    """
    needed = model_bytes + checkpoint_bytes * (kept + 1 if kept else 0)
    present = sum(sum(file_sizes(path).values()) for path in checkpoints(output_dir)) if kept and resumes else 0
    free = shutil.disk_usage(output_dir).free + present
    if needed > free:
        raise InputError(
            f"--output_dir {output_dir} has {free / 2**30:.1f} GiB of room, and needs about {needed / 2**30:.1f}: the "
            f"model {model_bytes / 2**30:.1f}, checkpoints {checkpoint_bytes / 2**30:.1f} each; free some, choose "
            "another disk, or lower --save_total_limit"
        )


def shutdown_hint(checkpoint_bytes: float) -> str | None:
    """Advice if writing a checkpoint will take longer than torchrun waits after a signal; None if it will not."""
    seconds = checkpoint_bytes / DISK_SPEED
    if seconds < TORCHRUN_PATIENCE:
        return None
    return (
        f"a checkpoint has about {checkpoint_bytes / 2**30:.0f} GiB: give torchrun --shutdown-timeout "
        f"{math.ceil(seconds / 60) * 120}, because it kills 30 s after Ctrl-C or a SIGTERM, before the checkpoint is "
        "written"
    )
