"""Which flags contradict one another, and which values make no sense.

Every rule is a function of the flags and of the few facts about the machine that are passed in: it reads no file,
changes nothing, and raises InputError with one line. `check_flags` applies all of them.
"""

import json

from .deepspeed_config import zero_stage
from .errors import InputError
from .number_limits import LARGEST_COUNT, check_numbers, most_workers

# Each of these flags only says how something is done; the flag beside it says that it is done at all.
NEEDS = {
    "adapter": "use_lora",
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
    "early_stopping_patience": "eval_steps",
    "early_stopping_on": "early_stopping_patience",
}


def check_flags(
    args, trainer: dict, given: set[str], world_size: int, has_accelerator: bool, launcher: dict[str, str],
    cores: int | None = None,
):  # fmt: skip
    """Raises InputError for the first rule that the flags break.

    args: a script's flags; trainer: all fields of TrainingArguments, with the content of its json under "deepspeed";
    given: names of the flags on the command line. launcher: environment variables that `accelerate launch` has set.
    cores: of this machine's CPUs; None if that is not known.
    """
    check_values(args, trainer, cores)
    check_vision_training(args, given)
    check_needed_flags(args, trainer, given)
    check_trained_parts(args, given)
    check_deepspeed(args, trainer["deepspeed"] or {})
    check_launcher(launcher)
    check_micro_batches(args, given, world_size, has_accelerator)
    if args.evaluate_only and args.dry_run:
        raise InputError("--evaluate_only and --dry_run contradict each other: give one")


def check_values(args, trainer: dict, cores: int | None):
    check_numbers(trainer | vars(args))
    workers = trainer["dataloader_num_workers"]
    if cores and workers > most_workers(cores):
        raise InputError(
            f"--dataloader_num_workers is {workers}, must be at most {most_workers(cores)} on this machine, which has "
            f"{cores} CPU cores: more processes only take memory"
        )
    options = trainer.get("lr_scheduler_kwargs")
    if isinstance(options, str):
        try:
            is_object = isinstance(json.loads(options), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise InputError(f"--lr_scheduler_kwargs is {options[:100]}, must be a JSON object")
    if args.data_revision and args.data_dir:
        raise InputError(f"--data_revision {args.data_revision} is for data on the Hub, and contradicts --data_dir")
    if args.loss_on not in ("all", "last"):
        raise InputError(f"--loss_on is {args.loss_on}, must be all or last")
    if args.on_bad_example not in ("error", "skip"):
        raise InputError(f"--on_bad_example is {args.on_bad_example}, must be error or skip")
    if args.early_stopping_on not in ("metric", "loss"):
        raise InputError(f"--early_stopping_on is {args.early_stopping_on}, must be metric or loss")


def check_needed_flags(args, trainer: dict, given: set[str]):
    if "adapter" in given and "model_revision" in given and "model_name_or_path" not in given:
        raise InputError("--model_revision is of --model_name_or_path: give that too, or --adapter OWNER/NAME@REVISION")
    for flag, needed in NEEDS.items():
        if flag == "adapter" and args.evaluate_only:  # which evaluates the adapter, and trains nothing
            continue
        if flag in given and not getattr(args, needed, trainer.get(needed)):
            raise InputError(f"--{flag} has no effect without --{needed}")


def check_vision_training(args, given: set[str]):
    """The rules about --vision_training, which names the parts of the vision model that train fully."""
    value = args.vision_training
    if value == "default":
        return
    reasons = {
        "freeze_vision_model": "which trains nothing of the vision model",
        "train_projector": "which says alone what trains",
        "quantize_vision": "because weights in 4 bits can't train",
        "cache_vision_features": "which changes the cached features",
    }
    for flag, reason in reasons.items():
        if getattr(args, flag):
            raise InputError(f"--{flag} contradicts --vision_training {value}, {reason}")
    if value == "projector" and "vision_lr" in given:
        raise InputError("--vision_lr has no effect with --vision_training projector, which leaves the tower as it is")
    if value == "tower" and "projector_lr" in given and not args.train_separators:
        raise InputError("--projector_lr has no effect with --vision_training tower, which trains no projector")


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
    if deepspeed and args.use_lora and args.vision_training != "default":
        raise InputError(
            f"--vision_training {args.vision_training} with adapters can't run under DeepSpeed, which would round "
            "the weights that train to half precision: leave out --deepspeed"
        )
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
    if tokens not in (None, "auto") and not (
        tokens.isdecimal() and len(tokens) < 20 and 1 <= int(tokens) <= LARGEST_COUNT
    ):
        raise InputError(
            f"--max_tokens_per_gpu must be auto, or a whole number of at least 1 and at most {LARGEST_COUNT}"
        )
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
