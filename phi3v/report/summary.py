"""Descriptions of a run: what it will do, its data, its mode, its packages, and settings that often go wrong."""

import importlib.metadata
import math
from collections.abc import Sequence

from transformers import TrainingArguments

from ..deepspeed_config import zero_stage

LARGE = 1e9  # parameters; the rates below hold for models of this size and larger, not for small ones
# (lowest, highest) learning rate of each mode; outside of these, training has hardly ever gone well.
SENSIBLE_RATES = {"full": (1e-6, 1e-4), "frozen": (5e-6, 3e-4), "lora": (5e-5, 1e-3), "projector": (5e-6, 2e-3)}
# What --vision_training trains, for the description of a mode.
VISION = {"all": "vision model", "tower": "vision tower", "projector": "projector"}


def describe_run(
    model,
    args,
    training_args: TrainingArguments,
    about: dict,
    *,
    precision: str,
    max_tokens: int | None,
    steps: int,
    n_parameters: int,
) -> list[str]:
    """Seven lines about what will happen: what is trained, on which data, in how many steps, with which optimizer, in
    how much memory, with which attention, and where the output goes.

    args: the recipe's flags.
    about: "data" as `describe_sizes` returns it; "memory", the plan for the memory, and "attention", as texts.
    precision: "bf16", "fp16" or "fp32".
    max_tokens: the most tokens of a micro-batch; None if micro-batches have a fixed number of examples instead.
    steps: optimizer steps of the whole run.
    n_parameters: of the whole model, trained or not.
    """
    data = about["data"]
    counts = {"language model": 0, "vision tower": 0, "projector and separators": 0}
    for name, parameter in model.named_parameters():
        n = getattr(parameter, "ds_numel", parameter.numel())
        part = "language model"
        if "vision_embed_tokens" in name:
            part = "vision tower" if "img_processor" in name else "projector and separators"
        counts[part] += n if parameter.requires_grad else 0
    trained = ", ".join(f"{part} {n:,}" for part, n in counts.items() if n)
    micro_batch = f"up to {max_tokens:,} tokens" if max_tokens else f"{args.batch_size_per_gpu} examples"
    parallel = "one process"
    if training_args.deepspeed:
        parallel = f"DeepSpeed ZeRO-{zero_stage(training_args.deepspeed)}"
    elif training_args.world_size > 1:
        parallel = "DDP"
    warmup = training_args.get_warmup_steps(steps)
    saving = "no checkpoints (--save_steps)"
    if training_args.save_strategy != "no":
        saving = f"a checkpoint every {training_args.save_steps:g} steps"
    lines = {
        "trains": f"{sum(counts.values()):,} of {n_parameters:,} parameters ({describe_mode(args)}): {trained}; "
        f"{precision}, {parallel}",
        "data": f"{data['training examples']} examples of {data['an example']}; {data['images of an example']}; "
        f"{data['evaluation examples']} for evaluation",
        "steps": f"{steps:,} of {args.batch_size} examples: {training_args.world_size} processes x micro-batch of "
        f"{micro_batch} x {training_args.gradient_accumulation_steps} accumulated",
        "optimizer": f"{training_args.optim.value}, rate {training_args.learning_rate:g}, "
        f"{training_args.lr_scheduler_type.value}, {warmup} of warm-up, weight decay {training_args.weight_decay:g}",
        "memory": about["memory"],
        "attention": about["attention"],
        "output": f"{training_args.output_dir}, {saving}",
    }
    return [f"{name:10} {text}" for name, text in lines.items()]


def describe_mode(args) -> str:
    """The mode that the flags ask for: "full", "frozen vision", "LoRA", "QLoRA without vision",
    "vision tower alone", "LoRA and the whole projector", …"""
    vision = VISION.get(args.vision_training)
    if not args.use_lora and vision:
        return f"{vision} alone"
    if not args.use_lora:
        return "frozen vision" if args.freeze_vision_model else "full"
    mode = ("QDoRA" if args.use_dora else "QLoRA") if args.use_qlora else "DoRA" if args.use_dora else "LoRA"
    if vision:
        return f"{mode} and the whole {vision}"
    return f"{mode} without vision" if args.freeze_vision_model else mode


def questionable_settings(
    args, training_args: TrainingArguments, n_parameters: int, sizes: Sequence, steps: int
) -> list[str]:
    """A warning for each setting that is allowed but known to go wrong, with what to do instead.

    n_parameters: of the whole model; sizes: the `Size` of each training example; steps: optimizer steps of the run.
    """
    found = []
    kind = "lora" if args.use_lora else "frozen" if args.freeze_vision_model else "full"
    kind = "projector" if kind == "full" and args.vision_training == "projector" else kind
    low, high = SENSIBLE_RATES[kind]
    rate = training_args.learning_rate
    if n_parameters >= LARGE and not low <= rate <= high:
        found.append(
            f"--learning_rate {rate:g} is {'low' if rate < low else 'high'} for {describe_mode(args)}: "
            f"{low:g} to {high:g} is usual"
        )
    if training_args.get_warmup_steps(steps) >= steps > 1:
        found.append(
            f"--warmup_steps {training_args.warmup_steps:g} is as long as the run of {steps} steps: the learning rate "
            "never reaches its full value; give a fraction of the run, such as 0.03"
        )
    if steps < 20 and not args.dry_run:
        found.append(f"{steps} optimizer steps are few: lower --batch_size or raise --num_train_epochs")
    if training_args.fp16 and not training_args.deepspeed and not args.use_lora and n_parameters >= LARGE:
        found.append("fp16 without DeepSpeed keeps everything in fp32 on each GPU: leave out --deepspeed none")
    if training_args.save_strategy != "no" and training_args.save_steps >= 1 and training_args.save_steps > steps:
        found.append(
            f"--save_steps {training_args.save_steps:g} is more than the {steps} steps of the run: "
            "no checkpoint will be saved"
        )
    if args.keep_best and (training_args.eval_strategy == "no" or training_args.eval_steps > steps >= 1):
        found.append("--keep_best sees no evaluation during training: give --eval_steps below the number of steps")
    patience, every = args.early_stopping_patience, training_args.eval_steps or 0
    evaluations = math.ceil(steps / every) - 1 if every >= 1 else math.inf
    if patience and evaluations <= patience and not args.dry_run:
        found.append(
            f"--early_stopping_patience {patience} can't end this run early, which has "
            f"{evaluations} evaluations before its last step: lower it, or --eval_steps"
        )
    if args.vision_training != "default" and not args.use_lora and not any(size.crops for size in sizes):
        found.append(f"--vision_training {args.vision_training} learns nothing, because no training example has images")
    without = sum(size.targets == 0 for size in sizes)
    if without:
        found.append(f"{without} examples have no answer to learn from")
    return [f"warning: {text}" for text in found]


def describe_sizes(sizes: list, n_evaluation: int) -> dict[str, str]:
    """How many examples there are and how long they are, as texts.

    sizes: the `Size` of each training example; n_evaluation: how many evaluation examples there are.
    """
    tokens, crops = (sorted(getattr(s, name) for s in sizes) for name in ("tokens", "crops"))
    middle = len(sizes) // 2

    def span(values, unit):
        if values[0] == values[-1]:
            return f"{values[0]:,} {unit}"
        return f"{values[0]:,} to {values[-1]:,} {unit}, median {values[middle]:,}"

    return {
        "training examples": f"{len(sizes):,}",
        "evaluation examples": f"{n_evaluation:,}",
        "an example": span(tokens, "tokens"),
        "images of an example": span(crops, "crops"),
    }


def versions() -> dict[str, str]:
    """The installed version of each package that can change results."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")
    return {name: importlib.metadata.version(name) for name in packages}
