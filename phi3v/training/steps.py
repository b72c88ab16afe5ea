"""How many optimizer steps a training has, and which examples each rank computes in each of them."""

import math

from ..data.conversations import ConversationDataset
from ..data.sampler import StepSampler, sampler_for


def shares_images(args) -> bool:
    """Whether questions about the same image share one copy of its tokens in a micro-batch. All kinds of attention can
    compute that. The sampler, which counts tokens, and the collator, which makes the rows, both ask here.

    args: a script's flags.
    """
    return args.share_images


def plan_steps(
    args, training_args, train_dataset: ConversationDataset, max_tokens: int | None, original_length: int
) -> tuple[int, StepSampler]:
    """The number of optimizer steps of the whole training, and this rank's micro-batches of each.

    args: a script's flags; training_args: a TrainingArguments; train_dataset: with its `sizes`.
    max_tokens: the most that a micro-batch has; None for --batch_size_per_gpu examples.
    original_length: as in `StepSampler`.
    """
    steps_per_epoch = math.ceil(len(train_dataset) / args.batch_size)
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
    return steps, sampler_for(
        train_dataset,
        train_dataset.sizes,
        args.batch_size,
        examples_per_gpu=args.batch_size_per_gpu,
        max_tokens=max_tokens,
        share_images=shares_images(args),
        original_length=original_length,
        seed=training_args.seed,
        epochs=math.ceil(steps / steps_per_epoch),
        rank=training_args.process_index,
        world_size=training_args.world_size,
    )
