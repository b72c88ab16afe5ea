"""Checkpoints that appear whole or not at all, what they belong to, and stopping in time to write one."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerCallback

from ..errors import InputError
from ..files import write_json

MANIFEST = "complete.json"  # written last: a checkpoint without it was never finished
UNFINISHED = "unfinished"  # the folder in which a checkpoint is written
FINISHED = "finished.json"  # in the output folder, when everything asked for was done
BEST = "best"  # folder in the output folder, for the model that has evaluated best
BEST_EVALUATION = "evaluation.json"  # in it
REPLACED_BEST = "replaced-best"  # in UNFINISHED, for the moment in which another takes its place
# What a run leaves, other than checkpoints. Of an earlier run in the same folder it would be taken for the new one's.
RESULTS = (
    BEST, FINISHED, "tokenizer*.json", "preprocessor_config.json", "processor_config.json",
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
    "README.md", "report.html", "eval_before.json", "eval_after.json", "evaluation.json", "evaluation.html",
)  # fmt: skip
# Flags that processes may have each of their own.
OWN = {
    "local_rank",
    "data_dir",
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "log_level",
    "log_level_replica",
    "no_tqdm",
    "disable_tqdm",
    "run_name",
    "cache_vision_features",
}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)  # what odd JSON ends in
REPEATS = 5.0  # seconds within which a signal is the same one again
DISK_SPEED = 5e8  # bytes/s, to say whether a checkpoint can be written within the time that torchrun leaves
PREEMPTED = 75  # the exit status of a run that was told to stop, and wrote a checkpoint: EX_TEMPFAIL, try again

# Settings that say how a run is watched or carried out; with all others a run would be another one.
NEUTRAL = {
    "output_dir",
    "data_dir",  # what is in it counts, not where it lies
    "estimate",
    "estimate_gpus",
    "check_data",
    "resume_anyway",
    "resume_from_checkpoint",
    "no_tqdm",
    "no_eval_before",
    "max_eval_samples",
    "max_new_tokens",
    "eval_split",
    "max_tokens_per_gpu",  # its resolved value is compared
    "on_bad_example",
    "cache_vision_features",  # where; whether there is one counts
    "cache_vision_gib",
    "keep_best",
    "preset",  # what it sets counts
    "dry_run",
    "evaluate_only",
    "per_device_eval_batch_size",
    "logging_steps",
    "logging_first_step",
    "logging_strategy",
    "eval_steps",
    "eval_strategy",
    "do_eval",  # follows from it
    "eval_delay",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "run_name",
    "project",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "ddp_timeout",
    "activation_checkpointing",  # computes the same again
    "activation_checkpointing_kwargs",
    "local_rank",
    "use_cpu",
}
# Settings with which the optimizer's state has another form, so that nothing could go on from it.
STRUCTURAL = {
    "world_size": "start as many processes as before",
    "deepspeed": "give the --deepspeed of before",
    "freeze_vision_model": "train the same part of the model",
    "train_projector": "train the same part of the model",
    "train_separators": "train the same part of the model",
    "use_lora": "train the same part of the model",
    "use_qlora": "train the same part of the model",
    "quantize_vision": "train the same part of the model",
    "lora_rank": "train the same adapters",
    "use_dora": "train the same adapters",
    "model_name_or_path": "give the model of before",
    "bf16": "compute in the precision of before",
    "fp16": "compute in the precision of before",
    "optim": "give the --optim of before",
    # The optimizer's state holds these, and what is given now would be passed over.
    **dict.fromkeys(
        (
            "learning_rate",
            "vision_lr",
            "projector_lr",
            "wd",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
        ),
        "give the optimizer's settings of before",
    ),
}


def settings_of(args, training_args, **more) -> dict:
    """What a run's result depends on, as JSON has it.

    args: the recipe's dataclass; training_args: a TrainingArguments; more: what else the result depends on.
    """
    values = training_args.to_dict() | vars(args) | {"world_size": training_args.world_size} | more
    values = {name: value for name, value in values.items() if name not in NEUTRAL and "token" not in name.split("_")}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def model_fingerprint(name: str) -> str | None:
    """Differs where the weights in a folder do, as far as their sizes and some of their bytes tell; None for a model of
    the Hub."""
    files = sorted(Path(name).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16] if files else None


def check_settings(stored: dict, now: dict, source: Path, anyway: bool):
    """Raises InputError with all that differs; with `anyway`, only with what nothing could go on from."""
    names = [name for name in sorted(stored.keys() | now.keys()) if stored.get(name) != now.get(name)]
    hard = [name for name in names if name in STRUCTURAL]
    if not names or anyway and not hard:
        return
    lines = [f"{source} was written with other settings:"]
    lines += [f"  {name}: {_short(stored.get(name))} then, {_short(now.get(name))} now" for name in names]
    ways = "; ".join(dict.fromkeys(STRUCTURAL[name] for name in hard))
    if hard:
        lines.append(f"to go on from it, {ways}; or train anew from its weights, in another --output_dir")
    else:
        lines.append("give those of before, or --resume_anyway to go on with the new ones")
    raise InputError("\n".join(lines))


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def publish(unfinished: Path, settings: dict, keep: int | None):
    """Moves a written checkpoint out of the folder UNFINISHED, and of it and the whole ones before deletes all but the
    newest `keep`."""
    for path in unfinished.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before what it renames
    write_json(unfinished / MANIFEST, {"files": _sizes(unfinished), "settings": settings})
    output_dir = unfinished.parent.parent
    target, step = output_dir / unfinished.name, _step(unfinished)
    if target.exists():
        os.replace(target, unfinished.with_name("replaced"))
    os.replace(unfinished, target)
    earlier = [path for path in checkpoints(output_dir) if _step(path) <= step and damage(path) is None]
    for old in earlier[keep:] if keep else []:
        os.replace(old, unfinished.with_name(old.name))  # so that no half of it can be taken for a checkpoint
    clear_unfinished(output_dir)


def set_aside_later(output_dir: Path, resumed: Path | None):
    """Renames checkpoints of later steps than the one that training goes on from: they are damaged, or of a training
    that went another way, and would be taken for the newest."""
    for path in checkpoints(output_dir):
        if resumed is not None and _step(path) > _step(resumed):
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)


def set_aside_results(output_dir: Path):
    """Moves what an earlier run has left into a folder of its own, so that nothing of it is lost or taken for new."""
    found = [path for pattern in RESULTS for path in output_dir.glob(pattern)]
    if not any(path.suffix == ".safetensors" or path.name == BEST for path in found):
        return
    number = next(n for n in itertools.count(1) if not (output_dir / f"earlier-{n}").exists())
    (output_dir / f"earlier-{number}").mkdir()
    for path in found:
        os.replace(path, output_dir / f"earlier-{number}" / path.name)
    print(f"{output_dir}: the model of an earlier run is in earlier-{number} now", flush=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def clear_unfinished(output_dir: Path):
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders checkpoint-N, the newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Sizes are looked at, not contents."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, _ = dict(manifest["files"]), dict(manifest["settings"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except UNREADABLE as e:
        return f"its {MANIFEST} can't be read ({' '.join(str(e).split())[:100]})"
    found = _sizes(checkpoint)
    for name, size in files.items():
        if name not in found:
            return f"its {name} is missing"
        if found[name] != size:
            return f"its {name} has {found[name]:,} bytes, not {_short(size)}"
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if int(state["global_step"]) != int(checkpoint.name.rpartition("-")[2]):
            return f"its trainer_state.json is of step {state['global_step']}"
    except UNREADABLE:
        return "its trainer_state.json can't be read"
    return None


def find_checkpoint(asked: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, what to tell about it). Raises InputError for a given folder that is no whole
    checkpoint; "auto" takes the newest whole one."""
    if asked is None:
        return None, []
    if asked != "auto":
        if (problem := damage(Path(asked))) is not None:
            raise InputError(
                f"--resume_from_checkpoint {asked} is no whole checkpoint: {problem}; take another, or auto"
            )
        return Path(asked), [f"resuming from {asked}"]
    messages = []
    for path in checkpoints(output_dir):
        if (problem := damage(path)) is None:
            return path, [*messages, f"resuming from {path}"]
        messages.append(f"warning: {path} is left aside: {problem}")
    return None, [*messages, f"no whole checkpoint in {output_dir}: training starts at step 0"]


def open_checkpoint(args, training_args) -> tuple[Path | None, dict]:
    """(the checkpoint that training goes on from, the settings that it was written with), said on rank 0; (None, {})
    where it starts anew. Raises InputError as `find_checkpoint` does, and where processes have other flags."""
    flags = json.loads(json.dumps(training_args.to_dict() | vars(args), default=str))
    check_flags_equal({name: value for name, value in flags.items() if name not in OWN})
    output_dir = Path(training_args.output_dir)
    if args.dry_run and training_args.process_index == 0:
        shutil.rmtree(output_dir, ignore_errors=True)  # of one that was broken off
        output_dir.mkdir()
    resume, messages = find_checkpoint(training_args.resume_from_checkpoint, output_dir)
    if training_args.process_index == 0:
        for message in messages:
            print(message, flush=True)
    check_agreement(resume, output_dir)
    refuse_pickles()
    return resume, stored_settings(resume) if resume else {}


def stored_settings(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["settings"]


def tokens_to_fill(asked: int | str | None, resume: Path | None, stored: dict) -> int | str | None:
    """--max_tokens_per_gpu; for "auto" what it came to in the run that is gone on with. Raises InputError."""
    if asked != "auto" or resume is None:
        return asked
    if not stored.get("tokens"):
        raise InputError(f"--max_tokens_per_gpu auto: {resume} was trained without it; leave it out here too")
    return stored["tokens"]


def check_flags_equal(flags: dict):
    """Raises InputError where processes have other ones: they would wait for one another without end."""
    first, *others = gather_object([flags])
    for rank, other in enumerate(others, 1):
        if names := [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]:
            differences = "; ".join(f"{name}: {_short(first.get(name))}, {_short(other.get(name))}" for name in names)
            raise InputError(f"processes 0 and {rank} were started with other flags: {differences}")


def prepare_output(
    training_args, settings: dict, resume: Path | None, anyway: bool, model_bytes: float, checkpoint_bytes: float
) -> bool:
    """Gets the output folder ready, so that what is in it afterwards is of this run. False where there is nothing left
    to do, as the run has been finished.

    settings: as `settings_of` gives them; resume, anyway: the checkpoint to go on from, and whether to do so with other
    settings. Raises InputError for settings that differ, and for a disk without room.
    """
    output_dir, is_first = Path(training_args.output_dir), training_args.process_index == 0
    finished = output_dir / FINISHED
    if training_args.resume_from_checkpoint == "auto" and finished.is_file():
        before = json.loads(finished.read_text(encoding="utf-8"))
        now = settings | {"cached": before.get("cached")}  # which is only found out in training
        if before == now or not anyway:
            check_settings(before, now, finished, anyway=False)
            if is_first:
                print(f"{output_dir} holds a finished run: there is nothing left to do")
            return False
    if resume:
        check_settings(stored_settings(resume), settings, resume, anyway)
    if is_first:
        kept = (training_args.save_total_limit or 1) if training_args.save_strategy != "no" else 0
        check_space(output_dir, model_bytes, checkpoint_bytes, kept)
        best = output_dir / BEST
        if (output_dir / UNFINISHED / REPLACED_BEST).exists() and not best.exists():
            os.replace(output_dir / UNFINISHED / REPLACED_BEST, best)
        if resume is None or resume.resolve().parent != output_dir.resolve():
            set_aside_results(output_dir)
        finished.unlink(missing_ok=True)
        clear_unfinished(output_dir)
        set_aside_later(output_dir, resume)
        record = best / BEST_EVALUATION
        if resume and record.is_file() and json.loads(record.read_text(encoding="utf-8"))["step"] > _step(resume):
            shutil.rmtree(output_dir / f"abandoned-{BEST}", ignore_errors=True)
            os.replace(best, output_dir / f"abandoned-{BEST}")
        if hint := shutdown_hint(checkpoint_bytes):
            print(hint, flush=True)
    return True


def check_agreement(resumed: Path | None, output_dir: Path):
    """Raises InputError where processes would go on from different checkpoints."""
    found = gather_object([resumed and resumed.name])
    if len(set(found)) > 1:
        raise InputError(
            f"--output_dir {output_dir} is not the same for all processes: they would go on from {found}; give a "
            "folder that every node sees"
        )


def refuse_pickles():
    """From here on torch.load makes nothing but tensors, plain values and DeepSpeed's few harmless classes, whoever
    calls it: DeepSpeed itself would run what a file tells it to."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def check_space(output_dir: Path, model_bytes: float, checkpoint_bytes: float, checkpoints_kept: int):
    """Raises InputError if the disk has no room for the model and for one checkpoint more than are kept, because an old
    one is deleted when the new one is there."""
    needed = model_bytes + checkpoint_bytes * (checkpoints_kept + 1 if checkpoints_kept else 0)
    present = sum(sum(_sizes(path).values()) for path in checkpoints(output_dir)) if checkpoints_kept else 0
    free = shutil.disk_usage(output_dir).free + present
    if needed > free:
        raise InputError(
            f"--output_dir {output_dir} has {free / 2**30:.1f} GiB of room, and needs about {needed / 2**30:.1f}: the "
            f"model {model_bytes / 2**30:.1f}, checkpoints {checkpoint_bytes / 2**30:.1f} each; free some, choose "
            "another disk, or lower --save_total_limit"
        )


def shutdown_hint(checkpoint_bytes: float) -> str | None:
    """What to tell a user whose checkpoints take longer than torchrun waits."""
    seconds = checkpoint_bytes / DISK_SPEED
    if seconds < 25:
        return None
    return (
        f"a checkpoint has about {checkpoint_bytes / 2**30:.0f} GiB: to have it written after a SIGTERM, give torchrun "
        f"--shutdown-timeout {math.ceil(seconds / 60) * 120}, as it kills after 30 s by itself"
    )


class Interrupted(SystemExit):
    """Ends a process that was told to stop, with the status PREEMPTED."""

    def __init__(self):
        super().__init__(PREEMPTED)


def ignore_signals(worker: int):
    """For processes that load data: a signal to all processes of a job is for the one that trains."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Preemption(TrainerCallback):
    """On SIGTERM or SIGUSR1 to any rank, all ranks finish their step, write a checkpoint, and leave.

    Another signal, REPEATS seconds or more after the first, ends the process at once. Ranks agree once a step, over the
    group that they train with: another one could not always be set up again after a restart by torchrun.
    """

    def __init__(self):
        self.signals, self.first, self.stopped, self.pid = 0, 0.0, False, os.getpid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if os.getpid() != self.pid:  # a process that loads data, and has not started to ignore signals
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self.signals and now - self.first < REPEATS:  # torchrun passes on what the whole job has got already
            return
        self.signals += 1
        self.first = now
        if self.signals > 1:
            os.write(2, f"{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        os.write(2, f"{name}: stopping after this step, with a checkpoint; once more leaves at once\n".encode())

    def has_signal(self) -> bool:
        """Whether this rank has got a signal."""
        return self.signals > 0

    def requested(self) -> bool:
        """Whether any rank has got a signal. Every rank must ask equally often."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.signals > 0
        flag = torch.tensor([self.signals], device=PartialState().device)
        dist.all_reduce(flag)
        return flag.item() > 0

    def check(self):
        """Raises Interrupted where a signal has come. Outside training, where there is nothing to save."""
        if self.requested():
            raise Interrupted

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # how often to log and save: as the flags have it, not a checkpoint

    def stop_training(self, control):
        self.stopped = control.should_save = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested():
            self.stop_training(control)


class Health:
    """Watches a training for numbers that are none, and for examples that could not be read.

    The losses are counted on the device and looked at when the Trainer logs or saves, so that no step waits.
    """

    def __init__(self):
        self.bad_losses, self.problems = None, {}

    def add(self, loss: torch.Tensor, problems: list[str]):
        """A micro-batch's loss, and what was wrong with its examples."""
        finite = torch.isfinite(loss.detach())
        last = torch.zeros_like(finite, dtype=torch.long) if self.bad_losses is None else self.bad_losses
        self.bad_losses = torch.where(finite, 0, last + 1)
        self.problems.update(dict.fromkeys(problems))

    def check(self, trainer, grad_norm):
        """Raises InputError where the last losses of any rank were no finite numbers: three of them, or one if what
        came of it would be saved, as with a gradient's norm. fp16's loss scaling leaves such steps out."""
        bad = max(gather_object([0 if self.bad_losses is None else int(self.bad_losses)]))
        saving = trainer.control.should_save and not trainer.args.fp16
        bad_norm = saving and grad_norm is not None and not math.isfinite(grad_norm)
        if bad < (1 if saving else 3) and not bad_norm:
            return
        last = next((path for path in checkpoints(Path(trainer.args.output_dir)) if damage(path) is None), None)
        rate = max(group["lr"] for group in trainer.optimizer.param_groups)
        raise InputError(
            f"the {'loss' if bad else 'gradient'} was no finite number in the last {bad or 1} micro-batches up to step "
            f"{trainer.state.global_step}, at a learning rate of {rate:.3g}: lower --learning_rate or "
            "--max_grad_norm, or use --bf16 or --fp32. "
            + (f"The last good checkpoint is {last}" if last else "There is no checkpoint yet")
        )

    def skipped(self) -> list[str]:
        """What was wrong with the examples that all ranks left out."""
        return sorted(set(gather_object(list(self.problems))))


@contextlib.contextmanager
def naming_full_disk(folder: Path):
    """Turns what libraries raise where a disk is full into an InputError, and takes away what was half written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        text = " ".join(str(e).split())
        output_dir = folder.parent.parent if folder.parent.name == UNFINISHED else folder
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(output_dir).free == 0
        if not (full or re.search(r"No space left|quota exceeded|file write failed|unexpected pos", text)):
            raise
        clear_unfinished(output_dir)
        kept = next((path for path in checkpoints(output_dir) if damage(path) is None), None)
        raise InputError(
            f"{folder} could not be written, as the disk is full or a quota is used up ({text[:150]}): free some space "
            f"and go on with --resume_from_checkpoint auto, "
            + (f"from {kept}" if kept else "from the start, as there is no checkpoint")
        ) from None
