"""The learning rates of adapters, which take a higher one than whole models, and of what trains fully beside them."""

import contextlib
import os
from pathlib import Path

from ..console import say
from ..errors import InputError
from ..files import read_json
from ..model.vision_parts import VISION_TRAINING, parts_of
from .checkpoints import find_checkpoint, stored_settings
from .output_folder import FINISHED

ADAPTER_RATE = 2e-4  # of the published runs with LoRA
FULL_RATE = 4e-5  # of the recipe's full fine-tuning


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


def choose_rates_beside_adapters(args):
    """Sets --vision_lr and --projector_lr for the parts that --vision_training trains fully beside adapters, where they
    are not given: FULL_RATE. Raises InputError for an unknown value of --vision_training."""
    if args.vision_training not in VISION_TRAINING:
        raise InputError(f"--vision_training is {args.vision_training}, must be {', '.join(VISION_TRAINING)}")
    if not args.use_lora or args.vision_training == "default":
        return
    parts, chosen = parts_of(args.vision_training, args.train_separators), []
    if args.vision_lr is None and "tower" in parts:
        args.vision_lr = FULL_RATE
        chosen.append("--vision_lr")
    if args.projector_lr is None and {"projector", "separators"} & set(parts):
        args.projector_lr = FULL_RATE
        chosen.append("--projector_lr")
    if chosen and not (args.evaluate_only or args.check_data or args.estimate):
        verb = "is" if len(chosen) == 1 else "are"
        say(f"the rate of what trains fully is {FULL_RATE:g}, because {' and '.join(chosen)} {verb} not given")
