"""How a run divides its optimizer steps into micro-batches that fit into memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments

from ..data.conversations import ConversationDataset
from . import activation_checkpointing
from .forecast import describe
from .hardware import device_memory
from .outline import estimate_run
from .settings import micro_batch_tokens
from .steps import plan_steps


class MicroBatches:
    """The micro-batches of a run.

    estimate: what training takes on each device; plan: how large micro-batches are and what is recomputed.
    After `divide`: steps, the number of optimizer steps, and sampler, this rank's micro-batches.

    args, training_args: as `parse_arguments` returns them; train_dataset: with its `sizes`.
    choose_trained: the script's function that freezes parts of a model or puts adapters on it.
    checkpoint: the folder to resume from, or None; stored: the settings in it.
    """

    def __init__(
        self,
        args,
        training_args: TrainingArguments,
        train_dataset: ConversationDataset,
        choose_trained: Callable,
        checkpoint: Path | None,
        stored: dict,
    ):
        self.args, self.training_args, self.train_dataset = args, training_args, train_dataset
        self.estimate = estimate_run(args, training_args, train_dataset.sizes, choose_trained)
        self.plan = self.estimate.plan(
            args.batch_size,
            args.batch_size_per_gpu,
            micro_batch_tokens(args.max_tokens_per_gpu, checkpoint, stored),
            activation_checkpointing.kind_from_flag(training_args.activation_checkpointing),
            device_memory(),
        )

    def describe(self) -> list[str]:
        """The lines that --estimate prints."""
        return describe(self.estimate, self.plan.workload, self.training_args.num_train_epochs).split("\n")

    def divide(self, original_length: int):
        """Chooses the micro-batches of every step. original_length: as in `StepSampler`."""
        self.steps, self.sampler = plan_steps(
            self.args, self.training_args, self.train_dataset, self.plan.tokens, original_length
        )

    def training_arguments(self) -> TrainingArguments:
        """The run's TrainingArguments with what is planned."""
        return replace(
            self.training_args,
            gradient_accumulation_steps=self.sampler.accumulation,
            activation_checkpointing=activation_checkpointing.flag_for_trainer(self.plan.checkpointing),
        )
