"""Stopping a run in time: a signal makes all ranks finish their step, write a checkpoint, and leave."""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback

from ..console import say, tell
from ..data.loading import on_long_wait
from ..launch import command_to_evaluate, command_to_resume
from ..signals import PREEMPTED, stop_signals
from .checkpoints import newest_whole, step_of

LONGEST_WAIT = 20  # seconds for a batch after a signal; torchrun kills its processes after 30
# When a run stops after a signal.
AFTER_STEP = "after this step, with a checkpoint"
AFTER_BATCH = "after this batch of the evaluation; there is nothing new to save"
AFTER_IMAGE = "after this image; the features that are written stay in the cache"
AFTER_SAVING = "once the model is saved"
AFTER_REPORTS = "once the reports are written"


class Interrupted(SystemExit):
    """Ends a process that a signal has stopped, with the exit status PREEMPTED."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Preemption(TrainerCallback):
    """Stops all ranks after their current step, with a checkpoint, when any rank receives SIGINT, SIGTERM or SIGUSR1.

    Ranks tell one another once a step, in the process group that they train with: torchrun cannot always set up another
    one after a restart. While a run has nothing to save, a signal ends the process at once.

    advice: lines about how to go on after the run was stopped; none for a dry run.
    on_leaving: called before an evaluation is left that has nothing to save.
    """

    def __init__(self, dry_run: bool = False):
        self.stopped, self.dry_run, self.advice = False, dry_run, []
        self.leaving, self.on_leaving = False, lambda: None
        stop_signals.install()
        on_long_wait[:] = [self.give_up]

    @property
    def ending(self) -> list[str] | None:
        """For the report: `advice` if a signal is ending this run, otherwise None."""
        return self.advice if self.leaving or self.stopped else None

    def has_signal(self) -> bool:
        """Whether this rank has received a signal."""
        stop_signals.take()
        return stop_signals.count > 0

    def requested(self) -> bool:
        """Whether any rank has received a signal. Every rank must call it equally often."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.has_signal()
        flag = torch.full((1,), int(self.has_signal()), device=PartialState().device)  # the host does not wait for this
        dist.all_reduce(flag)
        return flag.item() > 0

    def give_up(self, waited: float):
        """Raises Interrupted if this rank has received a signal and has waited too long for a batch, so that it can't
        finish its step. waited: in seconds."""
        if self.has_signal() and waited >= LONGEST_WAIT:
            reason = f"the processes that prepare images have made no batch for {waited:.0f} s"
            tell(f"stops waiting, as a signal has come: {reason}", to_stderr=True)
            self.leaving, self.advice = True, [] if self.dry_run else [f"resume with: {command_to_resume()}"]
            raise Interrupted

    def check(self):
        """Prints `advice` and raises Interrupted if any rank has received a signal: for evaluations outside training,
        which leave nothing to save."""
        if self.requested():
            say(*self.advice)
            self.leaving = True
            self.on_leaving()
            raise Interrupted

    def on_train_begin(self, args, state, control, **kwargs):
        stop_signals.until = AFTER_STEP
        # A checkpoint holds the logging and saving intervals of the run that wrote it; this run's flags decide.
        state.compute_steps(args, state.max_steps)
        # The Trainer would delete other checkpoints than the best; `publish` decides which are deleted.
        state.best_model_checkpoint = state.best_global_step = None

    def model_saved(self, output_dir: Path, step: int):
        """From now on there is nothing but the evaluation left to do. step: the last one of the training."""
        newest = newest_whole(output_dir)
        resumes = newest and step_of(newest) == step
        rest = command_to_resume() if resumes else command_to_evaluate(output_dir)
        self.advice = [] if self.dry_run else [f"the trained model is saved; evaluate it with: {rest}"]

    def stop_training(self, control):
        self.advice = [] if self.dry_run else [f"resume with: {command_to_resume()}"]
        self.stopped = control.should_save = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested():
            self.stop_training(control)

    def on_train_end(self, args, state, control, **kwargs):
        stop_signals.until = AFTER_SAVING
