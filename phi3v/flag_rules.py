"""Which flags contradict one another, and which values make no sense.

Every rule is a function of the flags and of the few facts about the machine that are passed in: it reads no file,
changes nothing, and raises InputError with one line. `check_flags` applies all of them.
"""

import math

from .deepspeed_config import zero_stage
from .errors import InputError

# Flags that count something.
COUNTS = (
    "batch_size",
    "batch_size_per_gpu",
    "num_crops",
    "max_new_tokens",
    "max_train_samples",
    "max_eval_samples",
    "lora_rank",
    "estimate_gpus",
    "max_length",
)
# Flags that are amounts or rates: above 0, and finite.
POSITIVE = ("learning_rate", "vision_lr", "projector_lr", "lora_alpha_ratio", "num_train_epochs", "cache_vision_gib")
# Each of these flags only says how something is done; the flag beside it says that it is done at all.
NEEDS = {
    "train_projector": "freeze_vision_model",
    "cache_vision_features": "freeze_vision_model",
    "cache_vision_gib": "cache_vision_features",
    "quantize_vision": "use_qlora",
    "lora_rank": "use_lora",
    "lora_alpha_ratio": "use_lora",
    "lora_dropout": "use_lora",
    "use_dora": "use_lora",
    "train_separators": "use_lora",
    "estimate_gpus": "estimate",
    "resume_anyway": "resume_from_checkpoint",
    "keep_best": "eval_steps",
}
MOST_CROPS = 16  # an image: the model was trained with no more


def check_flags(
    args, trainer: dict, given: set[str], world_size: int, has_accelerator: bool, launcher: dict[str, str]
):  # fmt: skip
    """Raises InputError for the first rule that the flags break.

    args: a script's flags; trainer: all fields of TrainingArguments, with the content of its json under "deepspeed";
    given: names of the flags on the command line. launcher: environment variables that `accelerate launch` has set.
    """
    check_values(args, trainer, given)
    check_needed_flags(args, trainer, given)
    check_trained_parts(args, given)
    check_deepspeed(args, trainer["deepspeed"] or {})
    check_launcher(launcher)
    check_micro_batches(args, given, world_size, has_accelerator)
    if args.evaluate_only and args.dry_run:
        raise InputError("--evaluate_only and --dry_run contradict each other: give one")


def check_values(args, trainer: dict, given: set[str]):
    for name in COUNTS:
        if name in given and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.num_crops > MOST_CROPS:
        raise InputError(f"--num_crops is {args.num_crops}, but the model was trained with at most {MOST_CROPS}")
    if not 0 <= args.lora_dropout < 1:
        raise InputError(f"--lora_dropout is {args.lora_dropout}, must be at least 0 and below 1")
    for name in POSITIVE:
        value = getattr(args, name, trainer.get(name))
        if value is not None and not 0 < value < math.inf:  # this also refuses NaN
            raise InputError(f"--{name} is {value}, must be above 0")
    if args.data_revision and args.data_dir:
        raise InputError(f"--data_revision {args.data_revision} is for data on the Hub, and contradicts --data_dir")
    for name in ("save_steps", "eval_steps"):
        if name in given and not trainer[name] > 0:
            raise InputError(f"--{name} is {trainer[name]}, must be above 0")
    least = {"save_total_limit": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 0, "seed": 0}
    for name, low in least.items():
        if trainer[name] is not None and trainer[name] < low:
            raise InputError(f"--{name} is {trainer[name]}, must be at least {low}")
    if args.on_bad_example not in ("error", "skip"):
        raise InputError(f"--on_bad_example is {args.on_bad_example}, must be error or skip")


def check_needed_flags(args, trainer: dict, given: set[str]):
    for flag, needed in NEEDS.items():
        if flag in given and not getattr(args, needed, trainer.get(needed)):
            raise InputError(f"--{flag} has no effect without --{needed}")


def check_trained_parts(args, given: set[str]):
    if args.freeze_vision_model:
        for flag in ("vision_lr", "projector_lr", "quantize_vision", "train_separators"):
            if flag in given and not (flag == "projector_lr" and args.train_projector):
                raise InputError(f"--{flag} contradicts --freeze_vision_model")
    if args.use_lora and args.train_projector:
        raise InputError("--train_projector contradicts --use_lora, which trains nothing but adapters")
    if args.cache_vision_features and args.train_projector:
        raise InputError("--cache_vision_features contradicts --train_projector, which changes the cached features")


def check_deepspeed(args, deepspeed: dict):
    if "optimizer" in deepspeed and (args.vision_lr or args.projector_lr):
        raise InputError(
            "--vision_lr and --projector_lr need the Trainer's optimizer: remove the one in the DeepSpeed json"
        )
    if deepspeed and args.train_separators:
        raise InputError("--train_separators can't run under DeepSpeed: leave out --deepspeed")
    if zero_stage(deepspeed) == 3:
        if args.use_qlora:
            raise InputError("--use_qlora can't run under ZeRO-3, which can't split 4-bit weights: remove --deepspeed")
        if args.cache_vision_features:
            raise InputError(
                "--cache_vision_features can't run under ZeRO-3, where all processes must compute the same layers"
            )


def check_launcher(launcher: dict[str, str]):
    for kind in ("deepspeed", "fsdp", "megatron_lm", "parallelism_config"):
        if launcher.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() in ("true", "1"):
            raise InputError(f"accelerate launch: leave out --use_{kind}; the script's --deepspeed decides on sharding")
    if launcher.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise InputError("accelerate launch: give --mixed_precision no; use the script's own --bf16 and --fp16")
    if launcher.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError("accelerate launch: leave out --dynamo_backend; the model can't be compiled as a whole")


def check_micro_batches(args, given: set[str], world_size: int, has_accelerator: bool):
    tokens = args.max_tokens_per_gpu
    if tokens not in (None, "auto") and not (tokens.isdecimal() and int(tokens) > 0):
        raise InputError("--max_tokens_per_gpu must be auto, or a whole number of at least 1")
    if tokens == "auto" and args.estimate and not has_accelerator:
        raise InputError("--max_tokens_per_gpu auto depends on a GPU's memory, and there is no GPU here: give a number")
    if tokens and "batch_size_per_gpu" in given:
        raise InputError("--max_tokens_per_gpu and --batch_size_per_gpu contradict each other: give one")
    at_once = world_size * args.batch_size_per_gpu  # examples that all processes handle at the same time
    if args.batch_size % at_once and not args.evaluate_only:
        raise InputError(
            f"--batch_size {args.batch_size} must be a multiple of processes x --batch_size_per_gpu, "
            f"{world_size} x {args.batch_size_per_gpu}"
        )
