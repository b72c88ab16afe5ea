"""The Trainer with what a long run needs: whole checkpoints, stopping in time, throughput, evaluation by answers."""

import math
import os
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer

from .. import phases
from ..data.loading import largest_batch, make_loader, next_batch
from ..data.sampler import EpochLoader
from ..errors import InputError, blaming
from ..files import read_json, write_json
from ..model.adapters import check_resumable
from ..model.folder import check_files
from ..model.generation import use_own_settings
from ..model.vision_parts import load_parts, save_parts
from ..signals import stop_signals
from .checkpoints import PREFIX, clear_unfinished, disk_full_as_input_error, publish
from .early_stopping import EXAMPLES
from .evaluation import Evaluation, numbers_of, write_evaluation
from .hardware import use_plain_cpu
from .health import TrainingHealth
from .optimizer import set_part_rates
from .output_folder import BEST, BEST_EVALUATION, REPLACED_BEST
from .own_files import MARK, UNFINISHED, claim, free_name, is_best, strangers
from .resuming import reading
from .stopping import AFTER_BATCH, AFTER_REPORTS, Interrupted
from .trackers import Trackers


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar, which also shows the last loss."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


class OnePrinter(PrinterCallback):
    """Prints what is logged if there is no progress bar: on rank 0 alone, where transformers prints once a node."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            super().on_log(args, state, control, logs=logs, **kwargs)


class RecipeTrainer(Trainer):
    """A Trainer that trains on packed micro-batches and evaluates by generating answers.

    evaluation: the questions to answer, and how answers are scored.
    run: the parts of the run that training uses: `fit`, which measures micro-batches before anything else holds the
        model, and returns the arguments to train with; `sampler` (this rank's micro-batches), `meter` (throughput and
        memory), `preemption` (signals), `early_stopping`, and `settings` (kept in every checkpoint).
    vision_lr, projector_lr: learning rates of the tower and the projector, if they differ from the others'.
    keep_best: whether the model that evaluates best is kept, in the folder BEST.
    """

    def __init__(
        self,
        *,
        evaluation: Evaluation,
        run,
        vision_lr: float | None = None,
        projector_lr: float | None = None,
        keep_best: bool = False,
        **kwargs,
    ):
        phases.ended("loading the model")
        kwargs["args"] = run.fit(kwargs["model"], kwargs["data_collator"])
        try:
            use_plain_cpu(kwargs["args"])
            with blaming("report_to", kwargs["args"].report_to):
                super().__init__(callbacks=[run.preemption, run.early_stopping], **kwargs)
        except RuntimeError as e:
            if "requires" not in str(e):  # otherwise it names a tracker that is not installed
                raise
            raise InputError(f"--report_to: {e}") from None
        if self.is_deepspeed_enabled:
            # DeepSpeed measures its speed too, and for that makes the host wait in every micro-batch.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("timers", {"throughput": {"enabled": False}})
        for usual, ours in ((ProgressCallback, LossOnBar), (PrinterCallback, OnePrinter)):
            if self.pop_callback(usual):
                self.add_callback(ours)
        phases.ended("measuring what fits, and moving the model to the device")
        self.evaluation = evaluation
        self.sampler = run.sampler
        self.meter = run.meter
        self.preemption = run.preemption
        self.early_stopping = run.early_stopping
        self.early_stopping.metric = evaluation and evaluation.metric
        self.settings = run.settings
        self.part_rates = vision_lr, projector_lr
        self.keep_best = keep_best
        self.health = TrainingHealth()
        self.trackers = Trackers(self)

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches alone, so that accelerate need not distribute batches over ranks."""
        dataset, sampler = self.train_dataset, self.sampler
        pin_memory = self.args.dataloader_pin_memory and torch.accelerator.is_available()
        bytes_of_crops = dataset.feature_cache.bytes_of if dataset.feature_cache else dataset.bytes_of_crops
        return make_loader(
            dataset,
            kind=EpochLoader,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch=self.args.dataloader_prefetch_factor,
            batches=len(sampler),
            batch_bytes=largest_batch(dataset.sizes, sampler.examples_per_gpu, sampler.max_tokens, bytes_of_crops),
            held=2 if pin_memory else sampler.accumulation + 1,  # the Trainer reads all batches of a step first
            pin_memory=pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(iter(lambda: next_batch(epoch_iterator), None), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        for batch in batch_samples:  # counted on the device, so that the host need not wait for a copy of the count
            batch["shift_labels"] = self._prepare_input(batch["shift_labels"])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _prepare_input(self, data):
        """As the Trainer's own, but the host does not wait until tensors are copied. The DataLoader pins them, and
        torch uses pinned memory for nothing else before it is copied."""
        if isinstance(data, torch.Tensor):
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.meter.add(inputs["packing"])
        problems = inputs.pop("problems")
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.health.add(loss, problems)
        return loss

    def _run_epoch(self, *args, **kwargs):
        """As the Trainer's own, for a run that resumes: does the evaluation of the checkpoint's step if a signal came
        in it, and trains no further if that was the last step."""
        step, state = self.state.global_step, self.state
        if step and self.args.eval_strategy != "no" and step >= self.args.eval_delay:
            name = f"eval_{self.evaluation.metric}"
            is_due = step % state.eval_steps == 0 or step >= state.max_steps
            if is_due and not any(entry["step"] == step and name in entry for entry in state.log_history):
                self._evaluate(None, None)
        if not self.control.should_training_stop and step < state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args, **kwargs):
        try:
            return super()._evaluate(*args, **kwargs)
        except KeyError:  # ReduceLROnPlateau finds no loss if a signal has ended the evaluation
            if not self.preemption.stopped:
                raise
            return {}

    def _determine_best_metric(self, metrics, trial):
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        is_read = self.control.should_log or self.control.should_save
        with self.meter.paused(is_read):  # logging, evaluation and saving do not count as time of training
            if is_read:
                self.health.check(self, grad_norm)
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_output_dir(self, trial):
        return Path(super()._get_output_dir(trial)) / UNFINISHED  # `publish` moves a whole checkpoint out of it

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / UNFINISHED / f"{PREFIX}{self.state.global_step}"
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # `publish` deletes the others
        if self.early_stopping.line or self.preemption.stopped:  # decided after the health of this step was checked
            self.health.check_weights(self)
        with disk_full_as_input_error(folder):
            if self.is_world_process_zero():
                claim(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                publish(folder, self.settings, keep)
        self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()

    def log(self, logs, *args, **kwargs):
        super().log(logs | (self.meter.read() if "loss" in logs else {}), *args, **kwargs)

    def _report(self) -> dict:
        model = self.accelerator.unwrap_model(self.model)
        # With --eval_steps, all evaluations have the loss, so that its curve can be compared with those at both ends.
        longest, sampler = max(size.tokens for size in self.train_dataset.sizes), self.sampler
        loss = {"with_loss": self.args.eval_strategy != "no"}
        loss["most_tokens"] = sampler.max_tokens or sampler.examples_per_gpu * longest  # as in training
        return self.evaluation.report(model, self.args, on_batch=self.preemption.check, **loss)

    def evaluate_and_save(self, name: str, before: dict | None = None) -> dict:
        """Evaluates before or after training; returns the metric and all predictions. Writes them to the file `name` in
        the output folder and sends them to the trackers, beside those of `before`, an earlier report."""
        with stop_signals.stopping(AFTER_BATCH):
            report = self._report()
        if self.state.global_step:
            stop_signals.until = AFTER_REPORTS
        if self.is_world_process_zero():
            write_evaluation(Path(self.args.output_dir) / name, report)
        self.trackers.log(numbers_of(report))
        if self.is_world_process_zero() and self.state.global_step:
            self.trackers.log_samples(report, before, self.evaluation.example)
        if self.keep_best and self.state.global_step:
            self.save_if_best(report)
        return report

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        try:
            with torch.random.fork_rng([]):  # training draws the same numbers after an evaluation that was interrupted
                report = self._report()
        except Interrupted:  # training can still be saved, so it ends with a checkpoint
            self.preemption.stop_training(self.control)
            return {}
        metrics = numbers_of(report)
        self.log(metrics)
        self.state.log_history[-1][EXAMPLES] = report["num_examples"]
        if self.keep_best:
            self.save_if_best(report)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def has_finished(self) -> bool:
        """Whether training has come to its end: after its last step, or early because it no longer got better."""
        return self.state.global_step >= self.state.max_steps or self.early_stopping.line is not None

    def save_if_best(self, report: dict):
        """Keeps the model in the folder BEST if it evaluates better than all before. Every rank must call it."""
        folder, name = Path(self.args.output_dir) / BEST, report["metric"]
        best = -math.inf
        if is_best(folder):
            earlier = read_json(folder / BEST_EVALUATION)
            # A best model of another number of examples can't be compared with this one.
            if earlier["num_examples"] == report["num_examples"] and isinstance(earlier.get(name), (int, float)):
                best = earlier[name]
        if not gather_object([report[name] > best])[0]:  # rank 0 decides, as only it may see the new file
            return
        self.health.check_weights(self)
        unfinished = Path(self.args.output_dir) / UNFINISHED / BEST
        with disk_full_as_input_error(unfinished):
            if self.is_world_process_zero():
                claim(unfinished)
            self.save_model(str(unfinished))
            if self.is_world_process_zero():
                write_json(unfinished / BEST_EVALUATION, {"step": self.state.global_step, **report})
                (unfinished / MARK).unlink()  # from now on, the evaluation says what this folder is
                if os.path.lexists(folder):
                    is_own = is_best(folder) and not strangers(folder)
                    aside = free_name(folder.with_name(f"abandoned-{BEST}"))
                    os.replace(folder, unfinished.with_name(REPLACED_BEST) if is_own else aside)
                os.replace(unfinished, folder)
                clear_unfinished(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with the learning rates in `part_rates`. (DeepSpeed would ignore an optimizer that
        the Trainer is given ready-made.)"""
        super().create_optimizer(model)
        set_part_rates(self.optimizer, self.model, *self.part_rates)
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        use_own_settings(self.model, self.processing_class)  # the Trainer has given it the tokenizer's eos alone
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle: nobody should have to load one
        if isinstance(self.model, PeftModel) and self.args.should_save:
            save_parts(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(resume_from_checkpoint):
            check_files(Path(resume_from_checkpoint))
            check_resumable(self.model, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if isinstance(self.model, PeftModel):
                load_parts(self.model.get_base_model(), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)
