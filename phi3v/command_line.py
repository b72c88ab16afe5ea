"""The command line of a script: its own flags and the Trainer's, and the --help that shows both.

It only reads the flags; flag_rules.py checks how they combine.
"""

import argparse
import dataclasses
import inspect
import sys

from transformers import HfArgumentParser, TrainingArguments

from .errors import InputError, Parser

NOT_COMPILED = "every packed row has another structure, and torch compiles again for each until it gives up after eight"
# Flags of the Trainer that the recipe has under another name, or that can't work here, with the reason.
REFUSED = {
    "gradient_accumulation_steps": "it follows from --batch_size and --batch_size_per_gpu",
    "per_device_train_batch_size": "use --batch_size_per_gpu",
    "weight_decay": "use --wd",
    "disable_tqdm": "use --no-tqdm",
    "gradient_checkpointing": "use --activation_checkpointing",
    "gradient_checkpointing_kwargs": "use --activation_checkpointing",
    "activation_checkpointing_kwargs": "it is always non-reentrant: the reentrant kind loses gradients",
    "train_sampling_strategy": "examples are drawn at random, and each step is balanced over the processes",
    "dataloader_drop_last": "every example is trained on",
    "dataloader_persistent_workers": "every epoch draws a new order of examples",
    "auto_find_batch_size": "the effective batch would change; lower --batch_size_per_gpu",
    "average_tokens_across_devices": "without it the loss would depend on which process gets which examples",
    "no_average_tokens_across_devices": "without it the loss would depend on which process gets which examples",
    "label_smoothing_factor": "the model computes its own loss, from the positions that have a label",
    "use_liger_kernel": "it has no kernels for this model",
    "remove_unused_columns": "the data have only the columns that the model takes",
    "label_names": "the data set makes the labels",
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
    "push_to_hub": "upload the output folder yourself, after you have looked at it",
    "use_cpu": "a CPU is used where there is no accelerator",
    "do_train": "the script always trains; --evaluate_only does not",
    "do_eval": "evaluation always runs after training; --no_eval_before skips the one before",
    "do_predict": "evaluation always runs after training",
    "eval_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
    "save_only_model": "a checkpoint without the optimizer's state can't be resumed from",
    "enable_jit_checkpoint": "Ctrl-C, SIGTERM and SIGUSR1 already write a checkpoint",
    "save_on_each_node": "checkpoints need one --output_dir that all nodes see",
    "data_seed": "the order of examples follows from --seed",
    "length_column_name": "the script measures the lengths of examples itself",
    "logging_nan_inf_filter": "losses are logged as they are, and a NaN loss stops the run",
    "no_logging_nan_inf_filter": "losses are logged as they are, and a NaN loss stops the run",
    "eval_do_concat_batches": "evaluation generates answers",
    "eval_use_gather_object": "evaluation generates answers",
    "liger_kernel_config": "it has no kernels for this model",
    "torch_compile": NOT_COMPILED,
    "torch_compile_backend": NOT_COMPILED,
    "torch_compile_mode": NOT_COMPILED,
}

TRAINERS_OWN = "the Trainer's most used flags"  # title in --help
# Flags of the Trainer that --help describes; it only lists the names of the others.
USUAL = {
    "output_dir": "where the model, reports and checkpoints go",
    "num_train_epochs": "passes over the training data",
    "max_steps": "optimizer steps, in place of epochs",
    "learning_rate": "learning rate after warm-up, when it is highest; adapters take 2e-4 if none is given",
    "lr_scheduler_type": "linear, cosine, constant, …",
    "warmup_steps": "a number of steps, or below 1 a share of all",
    "optim": "adamw_torch_fused, adamw_bnb_8bit, sgd, …",
    "max_grad_norm": "gradients are clipped to this norm",
    "seed": "for the order of examples, new adapters and dropout",
    "bf16": "bfloat16: the best precision where the GPU has it",
    "fp16": "half precision: the default on a GPU",
    "deepspeed": "a DeepSpeed json, or none for DDP; default: ds_config/zero2.json for full and frozen",
    "activation_checkpointing": "true or false: save memory, compute activations twice; default: as memory requires",
    "save_steps": "write a checkpoint every N steps; default: none",
    "save_total_limit": "keep the newest N checkpoints",
    "resume_from_checkpoint": "auto, or a folder checkpoint-N",
    "eval_steps": "evaluate every N steps; default: before and after training only",
    "per_device_eval_batch_size": "answers that a process generates at once",
    "logging_steps": "log every N steps",
    "report_to": "tensorboard, wandb, trackio, …, or none",
    "run_name": "name of the run in trackers",
    "dataloader_num_workers": "processes that prepare images, for each training process",
    "ddp_timeout": "seconds that processes wait for one another",
}


# Names that flags have in other programs, where they differ much from the names here.
OTHER_NAMES = {
    "batch": "batch_size",
    "bs": "batch_size",
    "checkpoint": "resume_from_checkpoint",
    "crops": "num_crops",
    "data": "data_dir",
    "data_path": "data_dir",
    "dataset": "data_dir",
    "epoch": "num_train_epochs",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "flash_attn": "use_flash_attention",
    "freeze_vision_tower": "freeze_vision_model",
    "grad_clip": "max_grad_norm",
    "half": "fp16",
    "lora": "use_lora",
    "lora_enable": "use_lora",
    "lora_r": "lora_rank",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "micro_batch_size": "batch_size_per_gpu",
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_max_length": "max_length",
    "model_path": "model_name_or_path",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "out_dir": "output_dir",
    "qlora": "use_qlora",
    "load_in_4bit": "use_qlora",
    "resume": "resume_from_checkpoint",
    "scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "vision_learning_rate": "vision_lr",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "workers": "dataloader_num_workers",
}


class _Formatter(argparse.HelpFormatter):
    """Shows one spelling of each flag, and its default if that says something."""

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


class _Parser(HfArgumentParser, Parser):
    other_names, never_meant = OTHER_NAMES, REFUSED

    def group(self, recipe_class: type):
        """Sorts the flags for --help under titles: the script's own first, then the Trainer's most used ones."""
        titles = titles_of(recipe_class)
        groups = {title: self.add_argument_group(title) for title in [*dict.fromkeys(titles.values()), TRAINERS_OWN]}
        others, order = [], list(titles)
        for action in sorted(self._actions, key=lambda a: order.index(a.dest) if a.dest in titles else len(order)):
            name = action.dest
            title = titles.get(name, TRAINERS_OWN if name in USUAL or name == "help" else None)
            is_opposite = f"--{name}" not in action.option_strings and f"--no_{name}" in action.option_strings
            if name in REFUSED or name.startswith("hub_") or is_opposite and name not in titles:
                action.help = argparse.SUPPRESS
            elif title is None:
                others.append(action.option_strings[0])
                action.help = argparse.SUPPRESS
            else:
                action.help = f"not --{name}" if is_opposite else USUAL.get(name, action.help)
                groups[title]._group_actions.append(action)
        self._action_groups = list(groups.values())
        self.epilog = f"The Trainer's others, as transformers' TrainingArguments has them: {', '.join(sorted(others))}"


def titles_of(recipe_class: type) -> dict[str, str]:
    """For each flag of a script, the title under which --help lists it.

    A script's dataclass and the one that it inherits from each say in `_groups` which flag begins which title.
    """
    titles = {}
    for owner in (recipe_class, *recipe_class.__mro__[1:]):
        title = None
        for name in inspect.get_annotations(owner):
            title = owner._groups.get(name, title)
            titles.setdefault(name, title)
    return titles


def parse_flags(
    recipe_class: type,
    trainer_defaults: dict,
    presets: dict[str, dict],
    description: str,
    argv: list[str] | None = None,
):
    """Reads the command line.

    recipe_class: a dataclass with a script's flags.
    trainer_defaults: defaults that differ from TrainingArguments' own; presets: the flags that each --preset sets.

    Returns an instance of `recipe_class`, a dict with all fields of TrainingArguments, and the set of flags given.
    Raises InputError for an unknown or refused flag, or a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    for flag in sorted(given):
        if flag in REFUSED or flag.startswith("hub_"):
            raise InputError(f"--{flag} is not accepted here: {REFUSED.get(flag, REFUSED['push_to_hub'])}")
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
            raise InputError("--preset: this task has none, because no result of it has been published")
        if preset not in presets:
            raise InputError(f"--preset is {preset}, must be {', '.join(presets)}")
        parser.set_defaults(**presets[preset])
        values = vars(parser.parse_args(argv))
    recipe = recipe_class(
        **{field.name: values.pop(field.name) for field in dataclasses.fields(recipe_class) if field.init}
    )
    return recipe, values, given
