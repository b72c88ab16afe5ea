"""The learning rate of adapters, which take a higher one than whole models."""

import contextlib
import os
from pathlib import Path

from ..console import say
from ..errors import InputError
from ..files import read_json
from .checkpoints import find_checkpoint, stored_settings
from .output_folder import FINISHED

ADAPTER_RATE = 2e-4  # of the published runs with LoRA


def rate_of_adapters(args, trainer: dict) -> float:
    """The learning rate of adapters without --learning_rate: ADAPTER_RATE. A run of an earlier version, which took the
    default of full fine-tuning, resumes at its own."""
    folder = Path(os.path.expanduser(trainer["output_dir"]))
    with contextlib.suppress(InputError, OSError):  # reported later, where the checkpoint is looked for
        stored = stored_settings(find_checkpoint(trainer["resume_from_checkpoint"], folder)[0])
        if not stored and trainer["resume_from_checkpoint"] == "auto" and (folder / FINISHED).is_file():
            stored = read_json(folder / FINISHED)
        if isinstance(stored, dict) and stored.get("learning_rate") == trainer["learning_rate"]:
            return trainer["learning_rate"]
    if not (args.evaluate_only or args.check_data or args.estimate):
        say(f"adapters train at a learning rate of {ADAPTER_RATE:g}, because --learning_rate is not given")
    return ADAPTER_RATE
