"""The flags of a script: a recipe's own, and the Trainer's beside them."""

import argparse
import dataclasses
import os
import socket
import sys
import warnings

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from .errors import InputError

# Flags of the Trainer that the recipe has under a name of its own, or that can't work here.
REFUSED = {
    "gradient_accumulation_steps": "it follows from --batch_size and --batch_size_per_gpu",
    "per_device_train_batch_size": "use --batch_size_per_gpu",
    "train_batch_size": "use --batch_size and --batch_size_per_gpu",
    "weight_decay": "use --wd",
    "disable_tqdm": "use --no-tqdm",
    "gradient_checkpointing": "use --activation_checkpointing",
    "gradient_checkpointing_kwargs": "use --activation_checkpointing",
    "activation_checkpointing_kwargs": "checkpointing is non-reentrant here, or the frozen parts would stop gradients",
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
    "load_best_model_at_end": "the metric is looked at after training; keep checkpoints with --save_steps",
    "metric_for_best_model": "the metric is looked at after training; keep checkpoints with --save_steps",
    "greater_is_better": "the metric is looked at after training; keep checkpoints with --save_steps",
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
}


class _Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_flags(recipe_class: type, trainer_defaults: dict, description: str, argv: list[str] | None = None):
    """Reads the command line.

    recipe_class: a dataclass with the recipe's flags, which come first in --help.
    trainer_defaults: what differs from TrainingArguments' own defaults.

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
    )
    parser.set_defaults(**trainer_defaults)
    parser._optionals.title = "the Trainer's own"
    parser._action_groups.insert(0, parser._action_groups.pop())
    for action in parser._actions:
        if action.dest in REFUSED or action.dest.startswith("hub_"):
            action.help = argparse.SUPPRESS
    # The `deepspeed` launcher adds --local_rank, which the environment says as well.
    values = vars(parser.parse_args([arg for arg in argv if not arg.startswith("--local_rank")]))
    recipe = recipe_class(**{field.name: values.pop(field.name) for field in dataclasses.fields(recipe_class)})
    return recipe, values, given


def world_size() -> int:
    """Number of processes as torchrun says it. Without torchrun it is 1, and the variables that torch, accelerate
    and DeepSpeed look for are set for a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return int(os.environ["WORLD_SIZE"])


def quiet_console():
    """Rank 0 speaks for all: other ranks show no progress bars and no warnings, which would be the same."""
    # accelerate and DeepSpeed call functions of torch that have got new names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if int(os.environ["RANK"]) > 0:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
