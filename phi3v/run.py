"""What a script does around its training, in the order in which it does it."""

import contextlib
import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from . import Phi3VConfig, Phi3VForCausalLM
from .console import quiet_console, say
from .data.check import check_data
from .data.conversations import ConversationDataset
from .data.preview import render_example
from .data.sampler import sampler_for
from .data.sizes import Size, all_sizes, fingerprint
from .errors import blaming, first_of_node
from .files import write_json
from .hub import fetch_model
from .model.loading import base_and_adapter, load_saved, nf4_config, not_quantized
from .ranks import is_first
from .report.card import write_model_card
from .report.page import write_page
from .report.summary import describe_run, describe_sizes, questionable_settings
from .training import activation_checkpointing
from .training.checkpoints import disk_full_as_input_error, find_checkpoint, refuse_pickles, stored_settings
from .training.estimate import Estimate
from .training.evaluation import Evaluation
from .training.feature_cache import cache_features
from .training.hardware import compute_dtype, device_memory, peak_flops, precision_of, weights_dtype
from .training.meter import Meter
from .training.output_folder import FINISHED, check_same_folder, is_finished, prepare_output
from .training.settings import check_flags_equal_on_all_ranks, micro_batch_tokens, model_fingerprint, settings_of
from .training.stopping import Interrupted, Preemption
from .training.trainer import RecipeTrainer, finish_dry_run


class Run:
    """One run of a script. Its methods stand in the order in which a script's `main` calls them.

    checkpoint: the folder to resume from, or None; preemption: stops the run when a signal arrives.
    After `prepare`: sampler (this rank's micro-batches), meter, settings (what the result depends on).
    """

    def __init__(self, args, training_args: TrainingArguments):
        """args, training_args: as `parse_arguments` returns them.

        Fetches the model from the Hub, finds the checkpoint to resume from and sets the seed. Raises InputError if the
        model can't be fetched, if the checkpoint is not whole, and if ranks have different flags or see different
        folders.
        """
        self.args, self.training_args = args, training_args
        self.output_dir = Path(training_args.output_dir)
        quiet_console(args.no_tqdm)
        self.preemption = Preemption()
        check_flags_equal_on_all_ranks(args, training_args)
        with first_of_node(training_args, "model"):
            fetch_model(base_and_adapter(args.model_name_or_path)[0], weights=not (args.estimate or args.check_data))
        if args.dry_run and is_first():
            shutil.rmtree(self.output_dir, ignore_errors=True)  # left by a dry run that was stopped
            self.output_dir.mkdir()
        self.checkpoint, messages = find_checkpoint(training_args.resume_from_checkpoint, self.output_dir)
        say(*messages)
        check_same_folder(self.checkpoint, self.output_dir)
        refuse_pickles()
        self.stored_settings = stored_settings(self.checkpoint)
        set_seed(training_args.seed)

    @functools.cached_property
    def config(self) -> Phi3VConfig:
        """Of the model that is trained or evaluated."""
        with blaming("model_name_or_path", self.args.model_name_or_path):
            return Phi3VConfig.from_pretrained(base_and_adapter(self.args.model_name_or_path)[0])

    @property
    def longest(self) -> int:
        """The most tokens that an example may have to be trained on."""
        return self.args.max_length or self.config.max_position_embeddings

    def dataset(self, conversations, processor, for_generation: bool = False) -> ConversationDataset:
        """Conversations to train on, or with `for_generation` to evaluate on, encoded when they are needed."""
        longest = self.config.max_position_embeddings if for_generation else self.longest
        truncate, skip_bad = self.args.truncate and not for_generation, self.args.on_bad_example == "skip"
        return ConversationDataset(conversations, processor, for_generation, longest, truncate, skip_bad)

    def check_data(self, train, held_out, processor):
        """For --check_data: decodes every image and prints a summary. Raises InputError for data with problems."""
        if is_first():
            workers, no_bars = self.training_args.dataloader_num_workers, self.training_args.disable_tqdm
            check_data(train, held_out, processor, self.longest, workers, no_bars)

    def evaluate_only(self, evaluation: Evaluation):
        """For --evaluate_only: evaluates a saved model or adapter; writes evaluation.json and evaluation.html."""
        model = self.load_saved(self.args.model_name_or_path)
        report = evaluation.write(model, self.training_args, self.preemption.check)
        if is_first():
            about = {"model": self.args.model_name_or_path}
            write_page(self.training_args, None, report, about, evaluation.example, name="evaluation.html")

    def load_saved(self, name: str):
        dtype = compute_dtype(self.training_args)
        quantization = nf4_config(dtype, self.args.quantize_vision) if self.args.use_qlora else None
        with blaming("model_name_or_path", name):
            return load_saved(
                name,
                dtype=dtype,
                attn_implementation=self.args.attn_implementation,
                quantization=quantization,
                device=self.training_args.device if quantization else None,
            )

    def prepare(
        self, train_dataset: ConversationDataset, eval_dataset: ConversationDataset, choose_trained: Callable
    ) -> TrainingArguments | None:
        """Measures all examples, plans micro-batches that fit into memory, and makes the output folder ready.

        choose_trained: the script's function that freezes parts of a model or puts adapters on it.
        Returns the TrainingArguments to train with. None if there is nothing to train: with --estimate, which prints
        what a run would need, and if the output folder holds the finished run already.
        """
        args, training_args = self.args, self.training_args
        sizes = all_sizes(train_dataset, "measuring examples", training_args.disable_tqdm)
        # An evaluation example that can't be read should fail now and not after hours of training.
        all_sizes(eval_dataset, "measuring evaluation examples", training_args.disable_tqdm)
        if args.dry_run:
            train_dataset.keep_largest(2 * args.batch_size)  # the examples that need most memory
            sizes = train_dataset.sizes
        self.estimate = estimate_run(args, training_args, sizes, choose_trained)
        self.plan = self.estimate.plan(
            args.batch_size,
            args.batch_size_per_gpu,
            micro_batch_tokens(args.max_tokens_per_gpu, self.checkpoint, self.stored_settings),
            activation_checkpointing.kind_from_flag(training_args.activation_checkpointing),
            device_memory(),
        )
        if args.estimate:
            say(self.estimate.describe(self.plan.workload, training_args.num_train_epochs))
            return None
        self.settings = settings_of(
            args,
            training_args,
            tokens=self.plan.tokens,
            data=fingerprint(sizes),
            model=model_fingerprint(args.model_name_or_path),
            # A resumed run keeps what it began with: cached features differ from computed ones by rounding.
            cached=self.stored_settings.get("cached", False) if args.cache_vision_features else False,
        )
        if is_finished(training_args, self.settings, args.resume_anyway):
            say(f"{self.output_dir} holds a finished run: there is nothing left to do")
            return None
        model_bytes, checkpoint_bytes = self.estimate.saved_bytes(args.use_lora)
        prepare_output(training_args, self.settings, self.checkpoint, args.resume_anyway, model_bytes, checkpoint_bytes)
        self.steps = training_args.max_steps
        steps_per_epoch = math.ceil(len(sizes) / args.batch_size)
        if self.steps <= 0:
            self.steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
        self.sampler = sampler_for(
            train_dataset,
            sizes,
            args.batch_size,
            examples_per_gpu=args.batch_size_per_gpu,
            max_tokens=self.plan.tokens,
            share_images=args.share_images,
            seed=training_args.seed,
            epochs=math.ceil(self.steps / steps_per_epoch),
            rank=training_args.process_index,
            world_size=training_args.world_size,
        )
        self.peak_flops, self.peak_source = peak_flops(compute_dtype(training_args))
        self.meter = Meter(self.estimate.costs[self.plan.checkpointing], self.peak_flops)
        if is_deepspeed_zero3_enabled():
            deepspeed.init_distributed()  # ZeRO-3 splits the model while it loads, before the Trainer exists
        self.training_args = replace(
            training_args,
            gradient_accumulation_steps=self.sampler.accumulation,
            activation_checkpointing=activation_checkpointing.flag_for_trainer(self.plan.checkpointing),
        )
        return self.training_args

    @property
    def shares_images(self) -> bool:
        """Whether questions about one image stand behind one copy of it, which flash attention can't do."""
        return self.args.share_images and self.args.attn_implementation != "flash_attention_2"

    def begin(self, trainer: RecipeTrainer):
        """Says what will happen, shows an example, warns of questionable settings, and caches vision features."""
        args, training_args, estimate, plan = self.args, self.training_args, self.estimate, self.plan
        model, train_dataset = trainer.model, trainer.train_dataset
        activation_checkpointing.set_tower_checkpointing(model, plan.checkpointing)
        self.about = {"memory": str(plan), "data": describe_sizes(train_dataset.sizes, len(trainer.eval_dataset))}
        facts = {"precision": precision_of(training_args), "max_tokens": plan.tokens}
        facts |= {"steps": self.steps, "n_parameters": estimate.parameters}
        if is_first():
            print(render_example(train_dataset))
            print(describe_run(model, args, training_args, self.about, **facts))
            print(f"MFU        of {self.peak_flops / 1e12:.3g} TFLOP/s, {self.peak_source}")
            for warning in questionable_settings(
                args, training_args, estimate.parameters, train_dataset.sizes, self.steps
            ):
                print(warning, flush=True)
        if args.cache_vision_features:
            message = cache_features(
                model,
                train_dataset,
                args.cache_vision_features,
                args.cache_vision_gib * 2**30,
                training_args.device,
                compute_dtype(training_args),
                training_args.dataloader_num_workers,
                training_args.disable_tqdm,
                earlier_choice=self.stored_settings.get("cached"),
                is_stopped=self.preemption.has_signal,
            )
            self.settings["cached"] = train_dataset.feature_cache is not None
            say(message)

    @contextlib.contextmanager
    def recorded(self, trainer: RecipeTrainer, before: dict | None):
        """Writes report.html when training ends, however it ends. Raises Interrupted if a signal has stopped it.

        before: the report of the evaluation before training, or None.
        """
        try:
            yield
        finally:
            self.write_page(trainer, before, None)
        if self.preemption.stopped:
            say(f"stopped by a signal at step {trainer.state.global_step}, with a checkpoint")
            raise Interrupted

    def write_page(self, trainer: RecipeTrainer, before: dict | None, after: dict | None):
        if is_first():
            write_page(self.training_args, before, after, self.about, trainer.evaluation.example, trainer.state)

    def save(self, trainer: RecipeTrainer):
        """Saves the model under the Hub's tensor names, or the adapter, and the processor."""
        if not self.args.use_lora:
            trainer.model.to(compute_dtype(self.training_args))  # so that the saved model is what is evaluated
        with disk_full_as_input_error(self.output_dir):
            trainer.save_model()

    def finish(self, trainer: RecipeTrainer, before: dict | None, after: dict):
        """Writes the report and the model card, and lists the examples that were left out. With --dry_run, loads the
        saved model and compares its answers."""
        trainer.trackers.close()
        skipped, state, name = trainer.health.skipped(), trainer.state, after["metric"]
        if is_first() and state.global_step >= state.max_steps:
            write_json(self.output_dir / FINISHED, self.settings)
        if skipped:
            say(f"{len(skipped)} examples were left out, as --on_bad_example skip says:", *(f"  {s}" for s in skipped))
        self.write_page(trainer, before, after)
        if is_first():
            self.about |= {"steps": state.global_step, "epochs": f"{state.epoch:.3g}"}
            write_model_card(self.args, self.training_args, self.about, before, after, precision_of(self.training_args))
        change = " -> ".join(f"{report[name]:.4f}" for report in (before, after) if report)
        where = "" if self.args.dry_run else f"; the model, its processor and report.html are in {self.output_dir}"
        say(f"{name} {change}{where}")
        if self.args.dry_run:
            finish_dry_run(trainer, after, lambda: self.load_saved(str(self.output_dir)))


def estimate_run(args, training_args: TrainingArguments, sizes: list[Size], choose_trained: Callable) -> Estimate:
    """What training on examples of these sizes needs, computed from a model without weights."""
    with blaming("model_name_or_path", args.model_name_or_path), torch.device("meta"):
        config = Phi3VConfig.from_pretrained(args.model_name_or_path)
        config._attn_implementation = args.attn_implementation
        outline = Phi3VForCausalLM(config).to(weights_dtype(training_args, args.use_lora))
        outline = choose_trained(outline, args)
    return Estimate(
        outline,
        sizes,
        args.estimate_gpus or training_args.world_size,
        compute_dtype(training_args).itemsize,
        training_args.deepspeed,
        not_quantized(args.quantize_vision) if args.use_qlora else None,
        on_gpu=args.estimate or torch.accelerator.is_available(),
    )
