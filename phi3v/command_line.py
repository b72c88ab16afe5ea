"""The flags of a script: a recipe's own, and the Trainer's beside them."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging as python_logging
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_bitsandbytes_available, logging

from .errors import InputError
from .model.loading import base_and_adapter
from .ranks import is_first, local_world_size, start_alone, world_size
from .training.checkpoints import BEST, BEST_EVALUATION, FINISHED, MANIFEST

# Flags of the Trainer that the recipe has under a name of its own, or that can't work here.
REFUSED = {
    "gradient_accumulation_steps": "it follows from --batch_size and --batch_size_per_gpu",
    "per_device_train_batch_size": "use --batch_size_per_gpu",
    "weight_decay": "use --wd",
    "disable_tqdm": "use --no-tqdm",
    "gradient_checkpointing": "use --activation_checkpointing",
    "gradient_checkpointing_kwargs": "use --activation_checkpointing",
    "activation_checkpointing_kwargs": "checkpointing is non-reentrant here, or the frozen parts would stop gradients",
    "train_sampling_strategy": "steps are drawn at random, and the load of processes is evened out within each",
    "dataloader_drop_last": "every example is trained on",
    "dataloader_persistent_workers": "the order of examples is drawn anew every epoch",
    "auto_find_batch_size": "the effective batch would change; lower --batch_size_per_gpu",
    "average_tokens_across_devices": "without it the loss would depend on how examples fall on processes",
    "no_average_tokens_across_devices": "without it the loss would depend on how examples fall on processes",
    "label_smoothing_factor": "the model computes its own loss, from the positions that have a label",
    "use_liger_kernel": "it has no kernels for this model",
    "remove_unused_columns": "all columns are the model's",
    "label_names": "labels are the model's own",
    "prediction_loss_only": "evaluation generates answers",
    "bf16_full_eval": "evaluation computes in the precision of training",
    "fp16_full_eval": "evaluation computes in the precision of training",
    "batch_eval_metrics": "evaluation generates answers",
    "include_for_metrics": "evaluation generates answers",
    "eval_accumulation_steps": "evaluation generates answers",
    "load_best_model_at_end": "use --eval_steps with --keep_best",
    "metric_for_best_model": "use --eval_steps with --keep_best",
    "greater_is_better": "use --eval_steps with --keep_best",
    "fsdp": "sharding is DeepSpeed's here: --deepspeed",
    "fsdp_config": "sharding is DeepSpeed's here: --deepspeed",
    "parallelism_config": "sharding is DeepSpeed's here: --deepspeed",
    "accelerator_config": "sharding is DeepSpeed's here: --deepspeed",
    "push_to_hub": "upload the output folder when you have looked at it",
    "use_cpu": "a CPU is used where there is no accelerator",
    "do_train": "training is what the script does",
    "do_eval": "evaluation always runs after training; --no_eval_before skips the one before",
    "do_predict": "evaluation always runs after training",
    "eval_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
    "save_only_model": "a checkpoint without the optimizer's state can't be resumed from",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 write a checkpoint already",
    "save_on_each_node": "checkpoints need one --output_dir that all nodes see",
    "data_seed": "the order of examples follows from --seed",
    "length_column_name": "lengths are counted",
    "logging_nan_inf_filter": "losses are logged as they are, and a run stops that has none",
    "no_logging_nan_inf_filter": "losses are logged as they are, and a run stops that has none",
    "eval_do_concat_batches": "evaluation generates answers",
    "eval_use_gather_object": "evaluation generates answers",
    "liger_kernel_config": "it has no kernels for this model",
}

# What `accelerate launch` has set, before the Trainer sets the same names for itself.
LAUNCHED = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}

# Flags of the recipes that count something.
COUNTS = {
    "batch_size",
    "batch_size_per_gpu",
    "num_crops",
    "max_new_tokens",
    "max_train_samples",
    "max_eval_samples",
    "lora_rank",
    "estimate_gpus",
    "max_length",
}
# Flags that say how something is done, and the flag that says to do it.
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


# Flags of the Trainer that --help describes; it names the others.
USUAL = {
    "output_dir": "where the model, reports and checkpoints go",
    "num_train_epochs": "passes over the training data",
    "max_steps": "optimizer steps, in place of epochs",
    "learning_rate": "after warm-up, at its highest",
    "lr_scheduler_type": "linear, cosine, constant, …",
    "warmup_steps": "a number of steps, or below 1 a share of all",
    "optim": "adamw_torch_fused, adamw_bnb_8bit, sgd, …",
    "max_grad_norm": "gradients are clipped to this norm",
    "seed": "of the order of examples, of new adapters and of dropout",
    "bf16": "bfloat16: the best precision where the GPU has it",
    "fp16": "half precision: the default on a GPU",
    "deepspeed": "a DeepSpeed json, or none for DDP; default: ds_config/zero2.json for full and frozen",
    "activation_checkpointing": "true or false: compute activations twice to save memory; default: as needed",
    "save_steps": "write a checkpoint every N steps; default: none",
    "save_total_limit": "keep the newest N checkpoints",
    "resume_from_checkpoint": "auto, or a folder checkpoint-N",
    "eval_steps": "evaluate every N steps; default: before and after training only",
    "per_device_eval_batch_size": "answers that a process generates at once",
    "logging_steps": "log every N steps",
    "report_to": "tensorboard, wandb, trackio, …, or none",
    "run_name": "of the run, in trackers",
    "dataloader_num_workers": "processes that prepare images, for each training process",
    "ddp_timeout": "seconds that processes wait for one another",
}


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, and its default where that says something."""

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
        if action.nargs in (0, "?"):
            return ", ".join(names)
        return f"{names[0]} {'N' if action.type in (int, float) else 'X'}"

    def _get_help_string(self, action):
        said = "default" in (action.help or "")
        if said or action.default in (None, argparse.SUPPRESS) or action.nargs in (0, "?"):
            return action.help
        return f"{action.help} (%(default)s)"


class _Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")

    def group(self, recipe_class: type):
        """Sorts the flags for --help: the recipe's as its `_groups` say, then the Trainer's."""
        titles, title = {}, None
        for field in dataclasses.fields(recipe_class):
            title = recipe_class._groups.get(field.name, title)
            titles[field.name] = title
        others = []
        for group in self._action_groups:
            group._group_actions = []
        self._action_groups = []
        groups = {}
        for action in self._actions:
            name = action.dest
            title = titles.get(name, "the Trainer's own, most used" if name in USUAL or name == "help" else None)
            is_opposite = f"--{name}" not in action.option_strings and f"--no_{name}" in action.option_strings
            if name in REFUSED or name.startswith("hub_") or is_opposite and name not in titles:
                action.help = argparse.SUPPRESS
            elif title is None:
                others.append(action.option_strings[0])
                action.help = argparse.SUPPRESS
            else:
                action.help = f"not --{name}" if is_opposite else USUAL.get(name, action.help)
                if title not in groups:
                    groups[title] = self.add_argument_group(title)
                groups[title]._group_actions.append(action)
        ordered = [*dict.fromkeys(titles.values()), *groups]
        self._action_groups = [groups[title] for title in dict.fromkeys(ordered)]
        self.epilog = f"The Trainer's others, as transformers' TrainingArguments has them: {', '.join(sorted(others))}"


def parse_flags(
    recipe_class: type,
    trainer_defaults: dict,
    presets: dict[str, dict],
    description: str,
    argv: list[str] | None = None,
):
    """Reads the command line.

    recipe_class: a dataclass with the recipe's flags, which come first in --help.
    trainer_defaults: what differs from TrainingArguments' own defaults; presets: for each --preset, what it sets.

    Returns an instance of `recipe_class`, a dict with all fields of TrainingArguments, and the set of flags given.
    Raises InputError for an unknown or refused flag, or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    for flag in sorted(given):
        if flag in REFUSED or flag.startswith("hub_"):
            raise InputError(f"--{flag} is not taken here: {REFUSED.get(flag, REFUSED['push_to_hub'])}")
    parser = _Parser(
        (recipe_class, TrainingArguments),
        usage="torchrun --nproc_per_node=N %(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.set_defaults(**trainer_defaults)
    parser.group(recipe_class)
    # The `deepspeed` launcher adds --local_rank, which the environment says as well.
    argv = [arg for arg in argv if not arg.startswith("--local_rank")]
    values = vars(parser.parse_args(argv))
    if (preset := values["preset"]) is not None:
        if not presets:
            raise InputError("--preset: no result of this task has been published, so there is none")
        if preset not in presets:
            raise InputError(f"--preset is {preset}, must be {', '.join(presets)}")
        parser.set_defaults(**presets[preset])
        values = vars(parser.parse_args(argv))
    recipe = recipe_class(**{field.name: values.pop(field.name) for field in dataclasses.fields(recipe_class)})
    return recipe, values, given


def check_flags(args, trainer: dict, given: set[str]) -> int:
    """Checks what all recipes have in common, and makes the output folder.

    args, trainer, given: as `parse_flags` returns them; `trainer["deepspeed"]` as `read_deepspeed_config` does.
    Returns the number of micro-batches that a process accumulates for an optimizer step. Raises InputError.
    """
    for name in sorted(COUNTS & given):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.num_crops > 16:
        raise InputError(f"--num_crops is {args.num_crops}, the model was trained with at most 16")
    if not 0 <= args.lora_dropout < 1:
        raise InputError(f"--lora_dropout is {args.lora_dropout}, must be at least 0 and below 1")
    for name in (
        "learning_rate",
        "vision_lr",
        "projector_lr",
        "lora_alpha_ratio",
        "num_train_epochs",
        "cache_vision_gib",
    ):
        value = getattr(args, name, trainer.get(name))
        if value is not None and not 0 < value < math.inf:  # nor NaN
            raise InputError(f"--{name} is {value}, must be above 0")
    for name in ("save_steps", "eval_steps"):
        if name in given and not trainer[name] > 0:
            raise InputError(f"--{name} is {trainer[name]}, must be above 0")
    if trainer["save_total_limit"] is not None and trainer["save_total_limit"] < 1:
        raise InputError(f"--save_total_limit is {trainer['save_total_limit']}, must be at least 1")
    for name, least in (("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0), ("seed", 0)):
        if trainer[name] < least:
            raise InputError(f"--{name} is {trainer[name]}, must be at least {least}")
    for flag, needed in NEEDS.items():
        if flag in given and not getattr(args, needed, trainer.get(needed)):
            raise InputError(f"--{flag} has no effect without --{needed}")
    frozen = args.freeze_vision_model and "--freeze_vision_model"
    for flag in ("vision_lr", "projector_lr", "quantize_vision", "train_separators"):
        if frozen and flag in given and not (flag == "projector_lr" and args.train_projector):
            raise InputError(f"--{flag} contradicts {frozen}")
    if args.use_lora and args.train_projector:
        raise InputError("--train_projector contradicts --use_lora: adapters are the only thing that trains")
    if args.use_qlora and not is_bitsandbytes_available():
        raise InputError("--use_qlora needs the package bitsandbytes: install it, or use --use_lora")
    deepspeed = trainer["deepspeed"] or {}
    if "optimizer" in deepspeed and (args.vision_lr or args.projector_lr):
        raise InputError(
            "--vision_lr and --projector_lr need the Trainer's optimizer: take it out of the DeepSpeed json"
        )
    if deepspeed and args.train_separators:
        raise InputError("--train_separators can't run under DeepSpeed: leave out --deepspeed")
    if args.use_qlora and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise InputError("--use_qlora can't run under ZeRO-3, which would split 4-bit weights: leave out --deepspeed")
    if args.cache_vision_features and args.train_projector:
        raise InputError("--cache_vision_features contradicts --train_projector: what it keeps would change")
    if args.cache_vision_features and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise InputError("--cache_vision_features can't run under ZeRO-3, where all processes compute the same layers")
    for kind in ("deepspeed", "fsdp", "megatron_lm", "parallelism_config"):
        if LAUNCHED.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() in ("true", "1"):
            raise InputError(f"accelerate launch: leave out --use_{kind}; sharding is the script's --deepspeed")
    if LAUNCHED.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise InputError("accelerate launch: give --mixed_precision no; the script has --bf16 and --fp16 of its own")
    if args.on_bad_example not in ("error", "skip"):
        raise InputError(f"--on_bad_example is {args.on_bad_example}, must be error or skip")
    if args.max_tokens_per_gpu not in (None, "auto"):
        try:
            args.max_tokens_per_gpu = int(args.max_tokens_per_gpu)
        except ValueError:
            args.max_tokens_per_gpu = 0
        if args.max_tokens_per_gpu < 1:
            raise InputError("--max_tokens_per_gpu must be auto, or a whole number of at least 1")
    if args.max_tokens_per_gpu == "auto" and args.estimate and not torch.accelerator.is_available():
        raise InputError("--max_tokens_per_gpu auto is by the memory of a GPU, and there is none here: give a number")
    if args.max_tokens_per_gpu and "batch_size_per_gpu" in given:
        raise InputError("--max_tokens_per_gpu and --batch_size_per_gpu contradict each other: give one")
    if args.evaluate_only or args.dry_run:
        trainer["resume_from_checkpoint"] = None  # so that either can be added to the command of a run
    if args.evaluate_only and args.dry_run:
        raise InputError("--evaluate_only and --dry_run contradict each other: give one")
    start_alone()
    step = world_size() * args.batch_size_per_gpu  # examples that all processes handle at once
    if args.batch_size % step and not args.evaluate_only:
        raise InputError(
            f"--batch_size {args.batch_size} can't be shared out: {world_size()} processes x --batch_size_per_gpu "
            f"{args.batch_size_per_gpu} must divide it"
        )
    base, adapter = base_and_adapter(args.model_name_or_path)
    if adapter and not args.evaluate_only:
        raise InputError(
            f"--model_name_or_path {adapter} holds an adapter: give its base {base}, or merge them with "
            "tools/merge_adapter.py, or --evaluate_only"
        )
    _check_model_folder(base)
    output_dir = Path(trainer["output_dir"]).resolve()
    if not args.evaluate_only and Path(base).resolve() in (output_dir, output_dir / BEST):
        raise InputError(
            f"--model_name_or_path {base} is what --output_dir {trainer['output_dir']} holds, which is set aside when "
            "training begins: choose another --output_dir"
        )
    resume = trainer["resume_from_checkpoint"]
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise InputError(f"--resume_from_checkpoint {resume} does not exist: give a folder checkpoint-N, or auto")
    if args.dry_run:
        folder = Path(trainer["output_dir"]) / "dry_run"
        trainer.update(max_steps=2, output_dir=str(folder), report_to="none", save_steps=1)
        args.max_eval_samples = min(args.max_eval_samples or 4, 4)
    folder = adapter or Path(args.model_name_or_path)
    ours = adapter or any((folder / name).is_file() for name in (FINISHED, BEST_EVALUATION, MANIFEST))
    if args.evaluate_only and "num_crops" not in given and ours:
        with contextlib.suppress(OSError, ValueError):  # as in its run
            saved = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            args.num_crops = saved.get("num_crops", args.num_crops)
    if not (args.estimate or args.check_data):
        _make_output_dir(Path(trainer["output_dir"]), resume is not None or args.evaluate_only or args.dry_run)
    return args.batch_size // step


def _check_model_folder(name: str):
    folder = Path(name)
    is_hub_name = name.count("/") == 1 and folder.parts[0] not in ("/", ".", "..", "~") and not folder.parent.is_dir()
    if is_hub_name:
        return
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except OSError:
        raise InputError(f"--model_name_or_path {name}: there is no such folder with a config.json in it") from None
    except (ValueError, AttributeError):
        raise InputError(f"--model_name_or_path {name}: its config.json is not a JSON object") from None
    if model_type != "phi3_v":
        raise InputError(f"--model_name_or_path {name} holds a model of type {model_type}, must be phi3_v")


def _make_output_dir(folder: Path, may_hold_checkpoints: bool):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output_dir {folder} can't be made: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder} is not writable")
    if not may_hold_checkpoints and any(folder.glob("checkpoint-*")):
        raise InputError(
            f"--output_dir {folder} holds checkpoints: resume with --resume_from_checkpoint auto, or choose another"
        )


def read_deepspeed_config(path: str | Path | None) -> dict | None:
    """The content of a DeepSpeed json; None for None and "none". Raises InputError."""
    if path is None or str(path) == "none":
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--deepspeed {path} can't be read: give a json file, or none") from None
    except ValueError as e:
        raise InputError(f"--deepspeed {path} is not valid JSON: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise InputError(f"--deepspeed {path} must hold a JSON object, and so must its zero_optimization")
    if not torch.accelerator.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes a minute and a C++ compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return config


def workers_per_process() -> int:
    """Processes that prepare images for each training process: its share of the cores, but not more than 8, which
    keep up with any GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // local_world_size()))


def quiet_console(no_bars: bool):
    """Rank 0 speaks for all: other ranks show no progress bars and no warnings, which would be the same."""
    # Libraries call functions of one another that have got new names.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # DeepSpeed accumulates as its own config has it, and that is taken from the Trainer's.
    accelerate = python_logging.getLogger("accelerate.accelerator")
    accelerate.addFilter(lambda record: "Gradient accumulation steps mismatch" not in record.getMessage())
    if no_bars:
        logging.disable_progress_bar()
    if not is_first():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
