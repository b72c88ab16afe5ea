"""The Trainer with what a long run needs: whole checkpoints, stopping in time, throughput, evaluation by answers."""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data.sampler import EpochLoader, StepSampler
from ..errors import InputError
from ..model.adapters import load_separators, save_separators
from .checkpoints import (
    BEST,
    BEST_EVALUATION,
    REPLACED_BEST,
    UNFINISHED,
    Health,
    Interrupted,
    Preemption,
    clear_unfinished,
    ignore_signals,
    naming_full_disk,
    publish,
    write_json,
)
from .evaluation import Evaluation, write_evaluation
from .meter import Meter
from .optimizer import set_part_rates
from .trackers import Trackers


class LossOnBar(ProgressCallback):
    """The Trainer's bar, with the last loss on it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


class OnePrinter(PrinterCallback):
    """What is logged without a bar, printed by one process of all, and not by one a node."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            super().on_log(args, state, control, logs=logs, **kwargs)


class RecipeTrainer(Trainer):
    """A Trainer that evaluates by generating answers, and has learning rates of their own for tower and projector.

    evaluation: what to answer, and how answers are judged.
    sampler: this rank's micro-batches.
    settings: what the run's result depends on, kept in every checkpoint.
    vision_lr, projector_lr: where they differ from the learning rate.
    separators: whether they train beside adapters, and are kept with these.
    keep_best: whether the model that evaluates best is kept, in the folder BEST.
    """

    def __init__(
        self,
        *,
        evaluation: Evaluation,
        sampler: StepSampler,
        meter: Meter,
        preemption: Preemption,
        settings: dict,
        vision_lr: float | None = None,
        projector_lr: float | None = None,
        separators: bool = False,
        keep_best: bool = False,
        **kwargs,
    ):
        try:
            super().__init__(callbacks=[preemption], **kwargs)
        except RuntimeError as e:
            if "requires" not in str(e):  # a tracker that is not installed
                raise
            raise InputError(f"--report_to: {e}") from None
        for usual, ours in ((ProgressCallback, LossOnBar), (PrinterCallback, OnePrinter)):
            if self.pop_callback(usual):
                self.add_callback(ours)
        self.evaluation = evaluation
        self.sampler = sampler
        self.meter = meter
        self.preemption = preemption
        self.settings = settings
        self.part_rates = vision_lr, projector_lr
        self.separators = separators
        self.keep_best = keep_best
        self.health = Health()
        self.trackers = Trackers(self)

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank alone, so that nothing has to be dealt out over ranks afterwards."""
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory and torch.accelerator.is_available(),
            worker_init_fn=ignore_signals,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.meter.add(inputs["packing"])
        problems = inputs.pop("problems")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.health.add(loss, problems)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        is_read = self.control.should_log or self.control.should_save
        with self.meter.paused(is_read):  # what logging, evaluation and saving take is no time of training
            if is_read:
                self.health.check(self, grad_norm)
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_output_dir(self, trial):
        return Path(super()._get_output_dir(trial)) / UNFINISHED  # from where `publish` takes a checkpoint

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / UNFINISHED / f"checkpoint-{self.state.global_step}"
        with naming_full_disk(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish(folder, self.settings, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def log(self, logs, *args, **kwargs):
        super().log(logs | (self.meter.read() if "loss" in logs else {}), *args, **kwargs)

    def _report(self) -> dict:
        model = self.accelerator.unwrap_model(self.model)
        return self.evaluation.report(model, self.args, on_batch=self.preemption.check)

    def report(self, name: str, before: dict | None = None) -> dict:
        """The metric over the evaluation set with every prediction, outside of training: written to the file `name` of
        the output folder, and told to the trackers. `before`: an earlier report to show beside this one."""
        report = self._report()
        if self.is_world_process_zero():
            write_evaluation(Path(self.args.output_dir) / name, report)
        self.trackers.log({f"eval_{report['metric']}": report[report["metric"]]})
        if self.is_world_process_zero() and self.state.global_step:
            self.trackers.log_samples(report, before, self.evaluation.example)
        if self.keep_best and self.state.global_step:
            self.save_if_best(report)
        return report

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        try:
            report = self._report()
        except Interrupted:  # what has been trained is worth more than the rest of an evaluation
            self.preemption.stop_training(self.control)
            return {}
        metrics = {f"{metric_key_prefix}_{report['metric']}": report[report["metric"]]}
        self.log(metrics)
        if self.keep_best:
            self.save_if_best(report)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_if_best(self, report: dict):
        """Keeps the model in the folder BEST if no earlier one has evaluated as well; every rank must call it."""
        folder, name = Path(self.args.output_dir) / BEST, report["metric"]
        best = -math.inf
        if (folder / BEST_EVALUATION).is_file():
            earlier = json.loads((folder / BEST_EVALUATION).read_text(encoding="utf-8"))
            if earlier["num_examples"] == report["num_examples"]:  # otherwise they can't be compared
                best = earlier.get(name, best)
        if not gather_object([report[name] > best])[0]:  # as rank 0 has read it
            return
        unfinished = Path(self.args.output_dir) / UNFINISHED / BEST
        with naming_full_disk(unfinished):
            self.save_model(str(unfinished))
            if self.is_world_process_zero():
                write_json(unfinished / BEST_EVALUATION, {"step": self.state.global_step, **report})
                if folder.exists():
                    os.replace(folder, unfinished.with_name(REPLACED_BEST))
                os.replace(unfinished, folder)
                clear_unfinished(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()

    def create_optimizer(self, model=None):
        """The Trainer's, with the groups of parameters split by part of the model. (An optimizer that is given to
        the Trainer ready-made would be ignored under DeepSpeed.)"""
        super().create_optimizer(model)
        set_part_rates(self.optimizer, self.model, *self.part_rates)
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should have to load
        if self.separators and self.args.should_save:
            save_separators(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.separators:
            load_separators(self.model.get_base_model(), Path(resume_from_checkpoint))


def finish_dry_run(trainer: RecipeTrainer, after: dict, load: Callable):
    """Loads what a run has saved, has it answer once more, and deletes the output folder.

    after: the report on the model before it was saved; load: returns the saved model. Every rank calls it. Raises
    InputError on rank 0 where the answers differ.
    """
    folder, args, evaluation = Path(trainer.args.output_dir), trainer.args, trainer.evaluation
    trainer.accelerator.free_memory()
    for holder in (trainer, trainer.callback_handler):
        holder.model = holder.optimizer = holder.lr_scheduler = None
    trainer.model_wrapped = trainer.deepspeed = None
    unset_hf_deepspeed_config()  # under ZeRO-3 the next model would be split while it loads
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    report = evaluation.report(load(), args)
    if args.process_index == 0:
        shutil.rmtree(folder)
        pairs = zip(after["predictions"], report["predictions"], strict=True)
        if different := [row["id"] for row, again in pairs if row["prediction"] != again["prediction"]]:
            raise InputError(f"--dry_run: loaded again, the model answers otherwise to {', '.join(different)}")
        print("dry run passed: trained, evaluated, saved, and the saved model gives the same answers")
