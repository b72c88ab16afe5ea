"""Stops a training that no longer gets better, by the evaluations at --eval_steps."""

import math

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..console import say
from ..errors import InputError

EXAMPLES = "eval_examples"  # in the log history: how many examples an evaluation covers
STOPPED_AT = "stopped_early_at"  # in the record of a finished run: the step
OF_EARLY_STOPPING = {"early_stopping_patience", "early_stopping_on", STOPPED_AT}  # what `record` adds to settings


class EarlyStopping(TrainerCallback):
    """Stops training once `patience` evaluations in a row are not better than the best one before them.

    What it knows is what the Trainer's log history holds, which is part of every checkpoint. So a resumed run stops at
    the same step as one that was not interrupted, also with another patience. (transformers' EarlyStoppingCallback
    would take its patience from the checkpoint, and only if --restore_callback_states_from_checkpoint is given.)

    patience: None never stops; watched: "metric" or "loss".
    metric: the name of the metric; the trainer sets it.
    line: says that the training was stopped, and why; None until then.
    """

    def __init__(self, patience: int | None = None, watched: str = "metric"):
        self.patience, self.watched = patience, watched
        self.metric = self.line = None

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.patience and self.watched == "loss" and "eval_loss" not in metrics:
            raise InputError("--early_stopping_on loss: the evaluation set has no answer that is not empty")
        if state.global_step < state.max_steps:
            self._decide(args, state, control)

    def on_train_begin(self, args, state, control, **kwargs):
        """A checkpoint may be of the step at which its run stopped."""
        self.line = None
        evaluated = [entry["step"] for entry in state.log_history if self._key in entry]
        if evaluated and evaluated[-1] == state.global_step < state.max_steps:
            self._decide(args, state, control)

    @property
    def _key(self) -> str:
        return "eval_loss" if self.watched == "loss" else f"eval_{self.metric}"

    def _decide(self, args, state, control):
        if not self.patience:
            return
        best, best_step, since = self._progress(state.log_history)
        if since < self.patience:
            return
        name = "the validation loss" if self.watched == "loss" else self.metric
        span = f"{self.patience} evaluations" if self.patience > 1 else "evaluation"
        found = f"best {best:.4f} at step {best_step:,}" if best_step else "it was NaN from the first evaluation on"
        self.line = f"stopped early at step {state.global_step:,}: {name} has not improved in the last {span}; {found}"
        say(self.line)
        control.should_training_stop = True
        control.should_save |= args.save_strategy != SaveStrategy.NO  # as after the last step of every training

    def _progress(self, history: list[dict]) -> tuple[float, int | None, int]:
        """The best value, its step, and how many evaluations have come after it. Evaluations on another number of
        examples than the last one can't be compared with it, and do not count."""
        evaluations = [entry for entry in history if self._key in entry]
        comparable = [entry for entry in evaluations if entry.get(EXAMPLES) == evaluations[-1].get(EXAMPLES)]
        sign = -1 if self.watched == "loss" else 1
        best, best_step, since = -sign * math.inf, None, 0
        for entry in comparable:
            if sign * entry[self._key] > sign * best:  # never true for NaN
                best, best_step, since = entry[self._key], entry["step"], 0
            else:
                since += 1
        return best, best_step, since

    def facts(self) -> dict[str, str]:
        """For the report."""
        return {"early stopping": self.line} if self.line else {}

    def record(self, step: int) -> dict:
        """What the record of a finished run holds in addition to its settings, if it stopped early at this step. A run
        with another patience is another run: that one would perhaps have trained longer."""
        if not self.line:
            return {}
        return {"early_stopping_patience": self.patience, "early_stopping_on": self.watched, STOPPED_AT: step}


def take_record(stored: dict, args) -> tuple[dict, str]:
    """What `record` has stored is taken out of `stored`: returns the settings to compare it with, and how the run
    ended, as a text that continues "a finished run".

    stored: the content of a record of a finished run; args: the flags of this run.
    """
    if STOPPED_AT not in stored:
        return {}, ""
    step = stored.pop(STOPPED_AT)
    now = {name: getattr(args, name) for name in ("early_stopping_patience", "early_stopping_on")}
    return now, f", which stopped early at step {step:,}" if type(step) is int else ""
