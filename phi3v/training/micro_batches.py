"""How a run divides its optimizer steps into micro-batches that fit into memory."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from ..data.conversations import ConversationDataset
from ..errors import NEEDS_LESS, InputError, is_out_of_memory
from . import activation_checkpointing
from .checkpoints import newest_whole
from .estimate import Plan
from .forecast import describe
from .hardware import compute_dtype, device_memory
from .measure import measured_passes
from .outline import estimate_run
from .settings import micro_batch_tokens
from .steps import plan_steps
from .workload import workload_of_packing

ROUNDS = 8  # of measuring and correcting; two are usual
STEP_DOWN = 0.8  # by which micro-batches shrink after memory has run out


class MicroBatches:
    """The micro-batches of a run.

    estimate: what training takes on each device; plan: how large micro-batches are and what is recomputed.
    After `divide`: steps, the number of optimizer steps, and sampler, this rank's micro-batches.
    After `measure`, both plan and sampler may have changed.

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
        self.asked, self.budget = micro_batch_tokens(args.max_tokens_per_gpu, checkpoint, stored), device_memory()
        self.kind = activation_checkpointing.kind_from_flag(training_args.activation_checkpointing)
        self.planned = None
        self._plan()

    def _plan(self):
        args, without_gpu = self.args, self.args.estimate and not torch.accelerator.is_available()
        if args.max_tokens_per_gpu == "auto" and not without_gpu:
            self.plan = self.estimate.plan_to_fill(args.batch_size, self.asked, self.kind, self.budget)
        else:
            tokens = None if without_gpu and self.asked == "auto" else self.asked
            self.plan = self.estimate.plan(args.batch_size, args.batch_size_per_gpu, tokens, self.kind, self.budget)

    def describe(self) -> list[str]:
        """The lines that --estimate prints."""
        filled = self.args.batch_size if self.args.max_tokens_per_gpu == "auto" else None
        epochs = self.training_args.num_train_epochs
        return describe(self.estimate, self.plan.workload, epochs, filled, self.kind).split("\n")

    def divide(self, original_length: int):
        """Chooses the micro-batches of every step. original_length: as in `StepSampler`."""
        self.original_length = original_length
        self.steps, self.sampler = plan_steps(
            self.args, self.training_args, self.train_dataset, self.plan.tokens, original_length
        )

    def measure(self, model, collate: Callable) -> list[str]:
        """On an accelerator, computes the largest micro-batch that is filled by tokens, and plans anew if it takes more
        memory than is expected. All ranks make the same plan, by what takes most on any of them. Every rank calls it.

        model: a Phi3VForCausalLM, or a PeftModel around one, which nothing else holds yet; it moves to the device.
        collate: makes a micro-batch of examples.
        Returns a line that says which limit was chosen, and how. Raises InputError if the memory does not suffice for
        the smallest micro-batch that may be chosen.
        """
        device = self.training_args.device
        if device.type == "cpu" or not self.plan.tokens:
            return []
        if not self.estimate.is_measurable:
            room = f"{self.plan.budget / 2**30:.1f} GiB are planned with"
            return [f"{self._limit()}; nothing is measured under ZeRO-3, so {room}"]
        for _ in range(ROUNDS):
            measured, expected, what = self._measured(model, collate, device)
            took = "did not fit" if measured == float("inf") else f"took {measured / 2**30:.2f} GiB"
            line = f"the two passes of {what} {took}, and {expected / 2**30:.2f} GiB were estimated"
            if measured <= self.estimate.correction * expected:
                break
            earlier, failed = self.plan, measured == float("inf")
            # Without enough memory nobody knows how much would have been needed.
            self.estimate.correction = self.estimate.correction / STEP_DOWN if failed else measured / expected
            self._plan()
            while failed and self._is_like(earlier) and self.plan.memory.peak <= self.plan.budget:
                self.estimate.correction /= STEP_DOWN
                self._plan()
            if self._is_like(earlier):
                if failed:
                    raise InputError(f"memory ran out when {what} were tried before training: {self.advice(None)}")
                break
            self.divide(self.original_length)
        return [f"{self._limit()}; {line}"]

    def _is_like(self, earlier: Plan) -> bool:
        return (self.plan.tokens, self.plan.checkpointing) == (earlier.tokens, earlier.checkpointing)

    def _limit(self) -> str:
        way = "as many as fit" if self.asked == "auto" else "as this run began"
        if self.args.max_tokens_per_gpu != "auto":
            way = "as --max_tokens_per_gpu says"
        return f"limit      up to {self.plan.tokens:,} tokens in a micro-batch, {way}"

    def _measured(self, model, collate: Callable, device: torch.device) -> tuple[float, float, str]:
        """(the most bytes that the largest micro-batch takes on any rank, the bytes that are expected without
        correction, what it consists of)."""
        examples = self.largest()
        batch = collate(self.train_dataset.__getitems__(examples))
        batch.pop("problems")
        workload = workload_of_packing(batch["packing"])
        dtype = compute_dtype(self.training_args)
        # DeepSpeed uses no autocast. It will round adapters in fp32 to the dtype of the base.
        rounded = any(p.is_floating_point() and p.dtype != dtype for p in model.parameters())
        autocast = dtype if dtype != torch.float32 and (rounded or not self.training_args.deepspeed) else None
        own = measured_passes(model, batch, device, autocast, self.plan.checkpointing)
        what = f"{len(examples)} examples with {workload.tokens:,} tokens and {workload.crops} crops"
        return max(gather_object([own])), self.estimate.passes(workload, self.plan.checkpointing), what

    def largest(self) -> list[int]:
        """The examples of the micro-batch, of all ranks and steps, that is expected to take most memory."""
        sampler, contents = self.sampler, {}
        for own in sampler.every_micro_batch():
            contents.setdefault((sampler.tokens(own), sampler.crops(own)), own)
        candidates, crops = [], -1
        for size in sorted(contents, reverse=True):  # those for which no other has more tokens and more crops
            if size[1] > crops:
                candidates.append(size)
                crops = size[1]

        def expected(size: tuple[int, int]) -> float:
            workload = self.estimate.workload_of_examples(self.train_dataset.sizes[i] for i in contents[size])
            workload = replace(workload, tokens=size[0], crops=size[1])
            return self.estimate.passes(workload, self.plan.checkpointing)

        return contents[max(candidates, key=expected)]

    def advice(self, checkpoint: Path | None) -> str:
        """What to do after memory has run out. checkpoint: to resume from, or None."""
        longest = max(size.tokens for size in self.train_dataset.sizes)
        fullest = max(map(self.sampler.tokens, self.sampler.every_micro_batch()))
        lower = max(longest, int(STEP_DOWN * fullest))
        if lower < fullest:
            flags = f"--max_tokens_per_gpu {lower}"
        elif self.plan.checkpointing != "all":
            flags = "--activation_checkpointing true"
        else:
            return f"no micro-batch can be smaller than the longest example, which has {longest:,} tokens; {NEEDS_LESS}"
        place = "" if self.plan.tokens or lower >= fullest else " in place of --batch_size_per_gpu"
        if checkpoint is None:
            return f"start again with {flags}{place}; there is no checkpoint yet"
        changed = " --resume_anyway" if "tokens" in flags else ""
        return f"give {flags}{place} and --resume_from_checkpoint {checkpoint}{changed}"

    @contextlib.contextmanager
    def advising(self, trainer):
        """Training with `trainer` in this context raises InputError with advice if memory runs out after it has begun
        with the first micro-batch."""
        try:
            yield
        except Exception as e:
            if not (trainer.meter.has_begun and is_out_of_memory(e)):
                raise
            step, checkpoint = trainer.state.global_step + 1, newest_whole(Path(self.training_args.output_dir))
            raise InputError(f"memory ran out in optimizer step {step}: {self.advice(checkpoint)}") from None

    def training_arguments(self) -> TrainingArguments:
        """The run's TrainingArguments with what is planned; the same object as long as nothing has changed."""
        planned = {
            "gradient_accumulation_steps": self.sampler.accumulation,
            "activation_checkpointing": activation_checkpointing.flag_for_trainer(self.plan.checkpointing),
        }
        if planned != self.planned:
            self.planned, self.with_plan = planned, replace(self.training_args, **planned)
        return self.with_plan
