"""Finds the model of a run, and refuses a run that can't fit into memory before weights are fetched."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from ..deepspeed_config import zero_stage
from ..model.loading import Saved, find_saved, refuse_adapter
from ..process_group import first_of_node
from .hardware import compute_dtype
from .memory_check import check_training, check_weights
from .output_folder import FINISHED


def find_model(args, training_args: TrainingArguments, choose_trained: Callable) -> Saved:
    """The model that --model_name_or_path names, on this machine. Every rank calls it.

    args, training_args: as `parse_arguments` returns them; `args.model_revision` becomes the commit on the Hub.
    choose_trained: as `check_training` takes it.
    Raises InputError on all ranks if one of them can't have the model, or can't fit it into its memory.
    """
    name, loads = args.model_name_or_path, not (args.estimate or args.check_data)
    resumes_newest = training_args.resume_from_checkpoint == "auto"

    def check(folder: Path):
        if not args.evaluate_only:
            refuse_adapter(name, folder)
            if loads and not (resumes_newest and (Path(training_args.output_dir) / FINISHED).exists()):
                check_training(args, training_args, choose_trained, folder)
        elif not (folder / "adapter_config.json").exists():
            check_evaluation(folder)

    def check_evaluation(folder: Path):
        flags = {"bf16": "--bf16", "4 bits": "--use_qlora"}
        ranks = training_args.world_size if zero_stage(training_args.deepspeed or {}) == 3 else 1
        dtype, device = compute_dtype(training_args), training_args.device
        check_weights(folder, dtype, device, args.use_qlora, args.quantize_vision, flags, ranks)

    with first_of_node(training_args, "model"):
        saved = find_saved(name, args.model_revision, weights=loads, check=check)
        if saved.adapter:
            check_evaluation(saved.base_folder)
    args.model_revision = saved.commits.get(name)
    return saved


def check_resumed(args, training_args: TrainingArguments, choose_trained: Callable, folder: Path):
    """Refuses what `find_model` has let pass because the output folder might have held the finished run, with which
    nothing is left to do. Every rank calls it. folder: of the model."""
    if training_args.resume_from_checkpoint == "auto":
        with first_of_node(training_args, "memory"):
            check_training(args, training_args, choose_trained, folder)
