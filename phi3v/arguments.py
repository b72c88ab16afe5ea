"""The flags that every script has, and how a command line becomes a script's flags and a TrainingArguments.

`parse_arguments` does it in three steps: command_line.py reads the flags, flag_rules.py checks them, and `resolve`
decides what they leave open and makes the output folder.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_bitsandbytes_available

from . import phases
from .command_line import parse_flags
from .console import say
from .deepspeed_config import read_deepspeed_config
from .errors import InputError
from .flag_rules import check_deepspeed, check_flags, check_trained_parts
from .hub_names import data_revisions, is_hub_name, model_and_revision
from .model.loading import Saved
from .process_group import join_after_restart
from .ranks import local_world_size, start_alone, world_size
from .signals import stop_signals
from .training.adapter_rate import choose_rates_beside_adapters, rate_of_adapters
from .training.checkpoints import find_checkpoint, stored_settings
from .training.finding import memory_check
from .training.hardware import choose_attention, choose_precision, disable_direct_links, use_plain_cpu
from .training.optimizer import check_optimizer
from .training.output_folder import folder_for_evaluation, make_output_dir
from .training.settings import fills_by_default
from .training.start import base_of_adapter, check_model, explicit_flags, find_start, num_crops_of_run

# What `accelerate launch` has set; the Trainer later sets the same names for itself.
LAUNCHER = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}


@dataclass(kw_only=True)
class RunArguments:
    """Flags that every script has: not what is trained, but how the run is carried out. Scripts inherit them."""

    max_length: int | None = HfArg(
        default=None, help="refuse training examples of more tokens; default: the model's own limit"
    )
    truncate: bool = HfArg(
        default=False, help="cut off the end of longer examples, if all images and some of the answer stay"
    )
    loss_on: str = HfArg(default="all", help="all: learn every answer of a conversation; last: the last answer alone")
    on_bad_example: str = HfArg(
        default="error",
        help="error, or skip: leave out examples that are wrong or whose images can't be read, and list them",
    )
    data_revision: str | None = HfArg(
        default=None,
        help="branch, tag or commit of the data on the Hub; OWNER/NAME@REVISION,… for several data sets; default: main",
    )
    check_data: bool = HfArg(
        default=False, help="decode every image, print a summary of the data, and end without training"
    )
    exif_rotate: bool | None = HfArg(
        default=None,
        help="turn photos upright as their EXIF data say, in training and wherever the result is used; default: as the "
        "model's processor says, and the official one uses the stored pixels",
        metadata={"nargs": "?", "const": True},  # so that the flag needs no value
    )
    model_revision: str | None = HfArg(
        default=None,
        help="branch, tag or commit of the model on the Hub; --model_name_or_path OWNER/NAME@REVISION says the same",
    )
    attn_implementation: str | None = HfArg(
        default=None,
        help="flash_attention_2 (of the package flash-attn), varlen (torch's own flash attention), sdpa or eager; "
        "default: the first of these that is installed and that the GPU can run",
    )
    use_flash_attention: bool = HfArg(
        default=False, help="flash attention, of the package flash-attn if it is installed, else torch's own"
    )
    fp32: bool = HfArg(default=False, help="full precision; default: fp16 on a GPU, fp32 on a CPU")
    max_tokens_per_gpu: str | None = HfArg(
        default=None,
        help="in place of --batch_size_per_gpu: fill each micro-batch with examples up to this many tokens; auto, the "
        "default on a GPU: as many as fit into memory",
    )
    no_fuse: bool = HfArg(
        default=False,
        help="do not fuse elementwise functions on a GPU with torch.compile, which makes their results differ by "
        "rounding",
    )
    share_images: bool = HfArg(
        default=True,
        help="train on all questions about an image in the same step, so that it is encoded once (default); "
        "independent questions may train a bit better, and slower",
    )
    cache_vision_features: str | None = HfArg(
        default=None,
        help="with --freeze_vision_model: folder that keeps what the vision model computes for each image, for later "
        "epochs and runs; used only if reading is measured to be faster than computing; 0.9 MB a crop",
    )
    cache_vision_gib: float = HfArg(default=100.0, help="the most that this folder may hold, in GiB")
    adapter: str | None = HfArg(
        default=None,
        help="with --use_lora or --use_qlora: train this saved adapter further, a run's output, its checkpoint-N, or "
        "OWNER/NAME@REVISION on the Hub; rank, layers and --num_crops are the adapter's, and so is the base unless "
        "--model_name_or_path is given",
    )
    explicit: list[str] = field(
        default_factory=list, init=False
    )  # flags on the command line that an adapter decides on
    adapter_folder: str | None = field(default=None, init=False)  # where the adapter of --adapter lies
    evaluate_only: bool = HfArg(
        default=False,
        help="evaluate --model_name_or_path, which may be a run's output with an adapter, and end; writes "
        "evaluation-SPLIT.json beside it, unless --output_dir is given",
    )
    keep_best: bool = HfArg(
        default=False, help="with --eval_steps: keep the model that evaluates best, in OUTPUT_DIR/best"
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="with --eval_steps: stop after this many evaluations in a row that are not better"
    )
    early_stopping_on: str = HfArg(default="metric", help="better in the metric, or in the validation loss: loss")
    preset: str | None = HfArg(
        default=None, help="settings of a published result: full, frozen, lora or qlora; other flags given here win"
    )
    dry_run: bool = HfArg(
        default=False, help="try everything in OUTPUT_DIR/dry_run: two steps, four evaluations, saving, loading again"
    )
    estimate: bool = HfArg(
        default=False, help="print the FLOPs, memory and time that the run needs, and end without loading weights"
    )
    estimate_gpus: int | None = HfArg(
        default=None, help="with --estimate: for this many GPUs; default: as many as there are processes"
    )
    resume_anyway: bool = HfArg(
        default=False, help="with --resume_from_checkpoint: resume although settings or data have changed"
    )
    no_tqdm: bool = HfArg(default=False, help="no progress bars")

    # The first flag of each title in --help; a script's own dataclass uses the same titles.
    _groups = {
        "max_length": "data",
        "model_revision": "model",
        "max_tokens_per_gpu": "optimisation",
        "adapter": "model",
        "evaluate_only": "evaluation",
        "preset": "the run",
    }


def workers_per_process() -> int:
    """Processes that prepare images for each training process: its share of the CPU cores, but at most 8, which keep up
    with any GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cores // local_world_size()))


def trainer_defaults() -> dict:
    """Defaults of the Trainer's flags that concern the machinery and differ from TrainingArguments' own."""
    return {
        "dataloader_num_workers": workers_per_process(),
        "dataloader_prefetch_factor": 4,  # micro-batches a worker: tiles are small, but images differ much in size
        "activation_checkpointing": None,  # as memory requires
        "optim": "adamw_torch_fused",  # also with torch before 2.8, for which the Trainer has another default
        "ddp_timeout": 7200,  # seconds: other ranks wait while rank 0 downloads the data and looks through them
        "logging_nan_inf_filter": False,  # it hides NaN losses, and waits for the device at every micro-batch
        "ddp_find_unused_parameters": False,  # no parameter is unused: see Phi3VModel._needs_vision_graph
    }


def parse_arguments(
    recipe_class: type, training: dict, presets: dict[str, dict], doc: str, argv: list[str] | None = None
):
    """Reads, checks and resolves all flags before anything is loaded. From now on, the process notices signals.

    recipe_class: a script's dataclass, which inherits RunArguments; training: its defaults for the Trainer's flags;
    presets: the flags that each --preset sets; doc: the script's docstring.
    Returns an instance of `recipe_class` and a TrainingArguments. Raises InputError.
    """
    stop_signals.install()
    phases.began("loading the libraries")
    defaults = trainer_defaults() | training
    deepspeed = defaults.pop("deepspeed", None)
    args, trainer, given = parse_flags(recipe_class, defaults, presets, doc.splitlines()[0], argv)
    start_alone()
    args.use_lora |= args.use_qlora
    args.explicit = explicit_flags(given)
    if "deepspeed" not in given and not (args.use_lora or args.evaluate_only):
        trainer["deepspeed"] = deepspeed  # adapters are small, and an evaluation has no optimizer
    trainer["deepspeed"] = read_deepspeed_config(trainer["deepspeed"])
    if args.use_lora and "learning_rate" not in given and "learning_rate" not in presets.get(args.preset, {}):
        trainer["learning_rate"] = rate_of_adapters(args, trainer)
    check_flags(args, trainer, given, world_size(), torch.accelerator.is_available(), LAUNCHER, os.cpu_count())
    choose_rates_beside_adapters(args)
    return args, resolve(args, trainer, given | presets.get(args.preset, {}).keys())


def resolve(args, trainer: dict, given: set[str]) -> TrainingArguments:
    """Decides what the flags leave open, changes `args` accordingly, and makes the output folder. After a restart by
    torchrun, joins the other ranks. given: the flags on the command line and in the preset.

    Raises InputError for a model folder or an output folder that can't be used, and for a precision or an attention
    implementation that this machine lacks.
    """
    args.model_name_or_path = base_of_adapter(args)
    args.model_name_or_path, args.model_revision = model_and_revision(args.model_name_or_path, args.model_revision)
    data_revisions(args.data_revision)
    say(*disable_direct_links())  # before a process group is made
    if args.use_qlora and not is_bitsandbytes_available():
        raise InputError("--use_qlora needs the package bitsandbytes: install it, or use --use_lora")
    if args.max_tokens_per_gpu not in (None, "auto"):
        args.max_tokens_per_gpu = int(args.max_tokens_per_gpu)
    if args.evaluate_only and "output_dir" not in given:
        trainer["output_dir"] = folder_for_evaluation(args.adapter or args.model_name_or_path) or trainer["output_dir"]
    trainer["output_dir"] = os.path.expanduser(trainer["output_dir"])
    restarted = join_after_restart(trainer["ddp_timeout"])
    if args.evaluate_only or args.dry_run:
        trainer["resume_from_checkpoint"] = None  # so that either flag can be added to the command of any run
    elif restarted and find_checkpoint("auto", Path(trainer["output_dir"]))[0]:
        trainer["resume_from_checkpoint"] = "auto"  # not the checkpoint that the first attempt may have resumed from
    check_model(args, trainer["output_dir"])
    resume = trainer["resume_from_checkpoint"]
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise InputError(f"--resume_from_checkpoint {resume} does not exist: give a folder checkpoint-N, or auto")
    if (args.evaluate_only or args.adapter) and "num_crops" not in given:
        if args.adapter or is_hub_name(args.model_name_or_path):
            args.num_crops = None  # as the repository says, or else the default: `Run` asks for it
        else:
            args.num_crops = num_crops_of_run(args.model_name_or_path) or args.num_crops
    if args.dry_run:
        folder = Path(trainer["output_dir"]) / "dry_run"
        trainer.update(max_steps=2, output_dir=str(folder), report_to="none", save_steps=1)
        args.max_eval_samples = min(args.max_eval_samples or 4, 4)
    if not (args.estimate or args.check_data):
        may_hold_checkpoints = resume is not None or args.evaluate_only or args.dry_run
        make_output_dir(Path(trainer["output_dir"]), may_hold_checkpoints, args)

    for_another_machine = args.estimate and not torch.accelerator.is_available()  # one with GPUs
    precision = choose_precision(trainer["bf16"], trainer["fp16"], args.fp32, for_another_machine)
    asked = args.attn_implementation
    checkpoint = find_checkpoint(resume, Path(trainer["output_dir"]))[0]
    stored = stored_settings(checkpoint)
    if not given & {"attn_implementation", "use_flash_attention"} and stored.get("attn_implementation") == "sdpa":
        asked = "sdpa"  # because flash attention may have been installed since
    if args.max_tokens_per_gpu is None and (torch.accelerator.is_available() or args.estimate):
        fills = fills_by_default(args, given, trainer["deepspeed"], checkpoint, stored)
        args.max_tokens_per_gpu = "auto" if fills else None
    args.attn_implementation = choose_attention(asked, args.use_flash_attention, precision, for_another_machine)
    trainer.update(
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=args.batch_size // (world_size() * args.batch_size_per_gpu),
        weight_decay=args.wd,
        disable_tqdm=args.no_tqdm,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if "save_steps" in given else "no",
        eval_strategy="steps" if "eval_steps" in given else "no",
    )
    if not trainer["dataloader_num_workers"]:
        trainer["dataloader_prefetch_factor"] = None
    try:
        training_args = TrainingArguments(**trainer)
    except (ValueError, TypeError, ImportError, RecursionError) as e:
        raise InputError(" ".join(str(e).split())) from None
    use_plain_cpu(training_args)
    phases.ended("connecting the processes")
    training_args.activation_checkpointing = trainer["activation_checkpointing"]  # None was made False
    if not args.evaluate_only:
        check_optimizer(training_args)
    return training_args


def find_model(args, training_args: TrainingArguments, choose_trained: Callable) -> Saved:
    """Finds what the run starts from, as `find_start` does, and decides what the model or the adapter leaves open.

    choose_trained: as `Run` takes it.
    Raises InputError if they can't be had, can't fit into memory, or contradict the flags."""
    saved = find_start(args, memory_check(args, training_args, choose_trained))
    if args.adapter and not args.evaluate_only:
        check_trained_parts(args, set())
        check_deepspeed(args, training_args.deepspeed or {})
    if args.num_crops is None:
        args.num_crops = num_crops_of_run(saved.folder) or type(args).num_crops
    return saved
