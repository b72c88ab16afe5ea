"""Stops a training whose loss or weights are no longer usable, and remembers the examples that could not be read."""

import math
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ..errors import InputError
from .checkpoints import newest_whole

LARGEST_WEIGHT = 65504  # of half precision; weights of models that work are far below
TOLERATED = 2  # micro-batches in a row without a finite loss


class TrainingHealth:
    """Looks at every loss of a training without making a step wait for the device.

    Losses are counted on the device; the counter is read when the Trainer logs or saves.
    """

    def __init__(self):
        self.bad_losses, self.problems = None, {}

    def add(self, loss: torch.Tensor, problems: list[str]):
        """Takes a micro-batch's loss, and what was wrong with its examples."""
        finite = torch.isfinite(loss.detach())
        in_a_row = torch.zeros_like(finite, dtype=torch.long) if self.bad_losses is None else self.bad_losses
        self.bad_losses = torch.where(finite, 0, in_a_row + 1)
        self.problems.update(dict.fromkeys(problems))

    def check(self, trainer, grad_norm):
        """Raises InputError if the last losses of any rank were NaN or infinite.

        One such loss or gradient norm is enough if a checkpoint is about to be saved, because it would hold the damage;
        then the weights are looked at too.
        With fp16, single ones are normal: loss scaling skips those steps.
        """
        bad = max(gather_object([0 if self.bad_losses is None else int(self.bad_losses)]))
        saving = trainer.control.should_save and not trainer.args.fp16
        bad_norm = saving and grad_norm is not None and not math.isfinite(grad_norm)
        if bad <= (0 if saving else TOLERATED) and not bad_norm:
            if trainer.control.should_save:
                self.check_weights(trainer)
            return
        rate = max(group["lr"] for group in trainer.optimizer.param_groups)
        raise InputError(
            f"the {'loss' if bad else 'gradient norm'} was NaN or infinite in the last {bad or 1} micro-batches up to "
            f"step {trainer.state.global_step}, at a learning rate of {rate:.3g}: lower --learning_rate or "
            f"--max_grad_norm, or use --bf16 or --fp32. {_last_checkpoint(trainer)}"
        )

    def check_weights(self, trainer):
        """Raises InputError if a weight that trains is NaN or larger than `LARGEST_WEIGHT` on any rank.

        Every rank must call it before the model is saved: no loss has been computed since the last update yet.
        """
        if names := [name for name in gather_object([unusable_weight(trainer.model)]) if name]:
            raise InputError(
                f"the update of step {trainer.state.global_step} has made the weight {names[0]} NaN or larger than "
                f"{LARGEST_WEIGHT}, so the model is not saved: lower --learning_rate or --wd. "
                + _last_checkpoint(trainer)
            )

    def skipped(self) -> list[str]:
        """What was wrong with each example that any rank has left out. Every rank must call it."""
        return sorted(set(gather_object(list(self.problems))))


def _last_checkpoint(trainer) -> str:
    last = newest_whole(Path(trainer.args.output_dir))
    return f"The last good checkpoint is {last}" if last else "There is no checkpoint yet"


@torch.no_grad()
def unusable_weight(model: torch.nn.Module) -> str | None:
    """The name of a weight that trains and is NaN or too large; None if there is none. ZeRO-3 leaves each rank with a
    part of each weight, of which it looks at its own."""
    named = [(name, getattr(p, "ds_tensor", p).detach()) for name, p in model.named_parameters() if p.requires_grad]
    named = [(name, tensor) for name, tensor in named if tensor.numel() and tensor.is_floating_point()]
    if not named:
        return None
    largest = torch.stack([torch.linalg.vector_norm(tensor, math.inf).float() for _, tensor in named])  # also NaN
    wrong = ~(largest <= LARGEST_WEIGHT)
    return named[int(wrong.nonzero()[0])][0] if wrong.any() else None
