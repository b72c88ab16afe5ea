"""Stopping a run in time: a signal makes all ranks finish their step, write a checkpoint, and leave."""

import os
import signal
import time

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback

from ..console import tell
from ..data.loading import on_long_wait
from ..workers import STOP_SIGNALS

PREEMPTED = 75  # exit status of a run that was stopped by a signal: EX_TEMPFAIL of sysexits.h, "try again"
LONGEST_WAIT = 20  # seconds for a batch after a signal; torchrun kills its processes after 30
SAME_SIGNAL = 5.0  # seconds: torchrun passes on a signal that the whole job has received already


class Interrupted(SystemExit):
    """Ends a process that a signal has stopped, with the exit status PREEMPTED."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Preemption(TrainerCallback):
    """Stops all ranks after their current step, with a checkpoint, when any rank receives SIGTERM or SIGUSR1.

    A second signal, SAME_SIGNAL seconds or more after the first, ends the process at once. Ranks tell one another once
    a step, in the process group that they train with: torchrun cannot always set up another one after a restart.
    """

    def __init__(self):
        self.num_signals, self.last_signal, self.stopped, self.pid = 0, 0.0, False, os.getpid()
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        on_long_wait[:] = [self.give_up]

    def _on_signal(self, number, frame):
        if os.getpid() != self.pid:  # a DataLoader's process that does not ignore signals yet
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self.num_signals and now - self.last_signal < SAME_SIGNAL:
            return
        self.num_signals += 1
        self.last_signal = now
        if self.num_signals > 1:
            os.write(2, f"{name} again: leaving at once\n".encode())
            os._exit(128 + number)
        os.write(2, f"{name}: stopping after this step, with a checkpoint; another signal leaves at once\n".encode())

    def has_signal(self) -> bool:
        """Whether this rank has received a signal."""
        return self.num_signals > 0

    def requested(self) -> bool:
        """Whether any rank has received a signal. Every rank must call it equally often."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.has_signal()
        flag = torch.full((1,), self.num_signals, device=PartialState().device)  # the host does not wait for this
        dist.all_reduce(flag)
        return flag.item() > 0

    def give_up(self, waited: float):
        """Raises Interrupted if this rank has received a signal and has waited too long for a batch, so that it can't
        finish its step. waited: in seconds."""
        if self.has_signal() and waited >= LONGEST_WAIT:
            reason = f"the processes that prepare images have made no batch for {waited:.0f} s"
            tell(f"stops waiting, as a signal has come: {reason}", to_stderr=True)
            raise Interrupted

    def check(self):
        """Raises Interrupted if any rank has received a signal: for the time outside training, when there is nothing
        to save."""
        if self.requested():
            raise Interrupted

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint holds the logging and saving intervals of the run that wrote it; this run's flags decide.
        state.compute_steps(args, state.max_steps)
        # The Trainer would delete other checkpoints than the best; `publish` decides which are deleted.
        state.best_model_checkpoint = state.best_global_step = None

    def stop_training(self, control):
        self.stopped = control.should_save = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested():
            self.stop_training(control)
