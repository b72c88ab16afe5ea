"""The end of a dry run: loads the saved model, compares its answers, and deletes the output folder."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..console import say
from ..errors import InputError
from ..old_versions import accelerator_memory
from ..ranks import is_first
from ..signals import stop_signals
from .own_files import delete_own
from .trainer import RecipeTrainer


def finish_dry_run(trainer: RecipeTrainer, after: dict, load_saved: Callable):
    """Loads the saved model, lets it answer once more, and deletes the output folder. Every rank calls it.

    after: the report of the evaluation before the model was saved; load_saved: returns the saved model.
    Raises InputError on rank 0 if the saved model gives other answers.
    """
    stop_signals.until = None  # a dry run has nothing to save
    folder, args, evaluation = Path(trainer.args.output_dir), trainer.args, trainer.evaluation
    trainer.accelerator.free_memory()
    for holder in (trainer, trainer.callback_handler):
        holder.model = holder.optimizer = holder.lr_scheduler = None
    trainer.model_wrapped = trainer.deepspeed = None
    unset_hf_deepspeed_config()  # under ZeRO-3 it would split the next model while it loads
    gc.collect()
    if torch.accelerator.is_available():
        accelerator_memory().empty_cache()
    report = evaluation.report(load_saved(), args)
    if is_first():
        delete_own(folder)
        pairs = zip(after["predictions"], report["predictions"], strict=True)
        if different := [row["id"] for row, again in pairs if row["prediction"] != again["prediction"]]:
            raise InputError(f"--dry_run: the saved model, loaded again, gives other answers to {', '.join(different)}")
        say("dry run passed: trained, evaluated, saved, and the saved model gives the same answers")
