"""When a run is refused that can't fit into memory: before weights are fetched, if that is possible."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from ..deepspeed_config import zero_stage
from ..model.loading import refuse_adapter
from ..process_group import first_of_node
from .hardware import compute_dtype
from .memory_check import check_training, check_weights
from .output_folder import FINISHED


def memory_check(args, training_args: TrainingArguments, choose_trained: Callable) -> Callable[[Path], None]:
    """A function that raises InputError if the model in a folder, whose weights may be missing yet, can't be used by
    the run, or can't fit into the memory of this process.

    args, training_args: as `parse_arguments` returns them.
    choose_trained: as `check_training` takes it.
    """
    name, loads = args.model_name_or_path, not (args.estimate or args.check_data)
    resumes_newest = training_args.resume_from_checkpoint == "auto"

    def check(folder: Path):
        if args.evaluate_only:
            if not (folder / "adapter_config.json").exists():  # otherwise the base is checked once it is known
                check_evaluation(folder)
            return
        refuse_adapter(name, folder)
        if loads and not (resumes_newest and (Path(training_args.output_dir) / FINISHED).exists()):
            check_training(args, training_args, choose_trained, folder)

    def check_evaluation(folder: Path):
        flags = {"bf16": "--bf16", "4 bits": "--use_qlora"}
        ranks = training_args.world_size if zero_stage(training_args.deepspeed or {}) == 3 else 1
        dtype, device = compute_dtype(training_args), training_args.device
        check_weights(folder, dtype, device, args.use_qlora, args.quantize_vision, flags, ranks)

    return check


def check_resumed(args, training_args: TrainingArguments, choose_trained: Callable, folder: Path):
    """Refuses what `memory_check` has let pass because the output folder might have held the finished run, with which
    nothing is left to do. Every rank calls it. folder: of the model."""
    if training_args.resume_from_checkpoint == "auto":
        with first_of_node(training_args, "memory"):
            check_training(args, training_args, choose_trained, folder)
