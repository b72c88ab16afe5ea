"""What a script does around its training, in the order in which it does it."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .run_libraries import deepspeed  # isort: skip (first, because the others load more quickly after it)
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from . import Phi3VConfig
from .arguments import find_model
from .console import say
from .data.check import check_data
from .data.conversations import ConversationDataset
from .data.preview import render_example
from .data.sizes import all_sizes, fingerprint
from .deepspeed_config import check_agreement
from .errors import BadExamples, blaming, listing
from .files import write_json
from .hub_names import check_data_revisions, data_commits
from .model.loading import Saved, find_saved, load_saved, nf4_config
from .model.processing_phi3v import changed_settings
from .model.vision_parts import round_parts
from .process_group import first_of_node
from .quiet import quiet_libraries
from .ranks import is_first
from .report.card import write_model_card
from .report.page import write_page
from .report.summary import describe_mode, describe_run, describe_sizes, questionable_settings
from .signals import stop_signals
from .training import activation_checkpointing, output_folder, settings
from .training.checkpoints import disk_full_as_input_error, find_checkpoint, refuse_pickles, stored_settings
from .training.dry_run import finish_dry_run
from .training.early_stopping import EarlyStopping
from .training.evaluation import Evaluation, new_evaluation, write_evaluation
from .training.feature_cache import cache_features_of_run
from .training.finding import check_resumed
from .training.folder_lock import unlock_folder
from .training.hardware import compute_dtype, describe_attention, peak_flops, precision_of
from .training.kernels import check_kernels
from .training.meter import Meter
from .training.micro_batches import MicroBatches
from .training.output_folder import ANEW, FINISHED, check_same_folder, enter_output, is_finished, prepare_output
from .training.resuming import check_states
from .training.steps import shares_images
from .training.stopping import AFTER_BATCH, AFTER_IMAGE, Interrupted, Preemption
from .training.trainer import RecipeTrainer


class Run:
    """One run of a script. Its methods stand in the order in which a script's `main` calls them.

    checkpoint: the folder to resume from, or None; preemption: stops the run when a signal arrives; bad_examples:
    decides what happens to examples that can't be used, and remembers those that are left out.
    After `prepare`: micro_batches, settings (what the result depends on).
    After `fit`: sampler (this rank's micro-batches), meter.
    After `begin`: facts (what the report and the model card say about the run).
    """

    def __init__(self, args, training_args: TrainingArguments, choose_trained: Callable):
        """args, training_args: as `parse_arguments` returns them.
        choose_trained: the script's function that freezes parts of a model or puts adapters on it.

        Fetches the model from the Hub, finds the checkpoint to resume from and sets the seed. Raises InputError for a
        model that can't be fetched or can't fit into memory, for a damaged checkpoint, if the output folder holds what
        no run has written and this one would overwrite, and if ranks have different flags or see different folders.
        """
        self.args, self.training_args, self.choose_trained = args, training_args, choose_trained
        self.output_dir = Path(training_args.output_dir)
        quiet_libraries(args.no_tqdm)
        self.preemption = Preemption(args.dry_run)
        self.early_stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_on)
        self.bad_examples = BadExamples(skip=args.on_bad_example == "skip")
        settings.check_flags_equal_on_all_ranks(args, training_args)
        if not (args.estimate or args.check_data):  # which write nothing
            enter_output(self.output_dir, args, training_args.report_to)
        data_commits.clear()  # of an earlier run in this process
        with first_of_node(training_args, "model"):
            self.saved = find_model(args, training_args, choose_trained)
        self.checkpoint, messages = find_checkpoint(training_args.resume_from_checkpoint, self.output_dir)
        say(*messages)
        check_same_folder(self.checkpoint, self.output_dir)
        refuse_pickles()
        if self.checkpoint:
            check_states(self.checkpoint, training_args.fp16)
        self.stored_settings = stored_settings(self.checkpoint)
        set_seed(training_args.seed)
        if is_deepspeed_zero3_enabled():
            deepspeed.init_distributed()  # ZeRO-3 splits a model while it loads, before the Trainer exists

    @functools.cached_property
    def config(self) -> Phi3VConfig:
        """The configuration of the model that is trained or evaluated."""
        with blaming("model_name_or_path", self.args.model_name_or_path):
            return Phi3VConfig.from_pretrained(self.saved.base_folder)

    def commits(self) -> dict[str, dict[str, str]]:
        """For the report: the commits on the Hub of the model and the data, once they are loaded. Every rank calls it.

        Raises InputError if ranks have different ones, and if --data_revision names data that are not read."""
        check_data_revisions(self.args.data_revision)
        commits = self.saved.commits | data_commits
        settings.check_commits_equal_on_all_ranks(commits)
        return {"commits": commits} if commits else {}

    @property
    def max_length(self) -> int:
        """The most tokens that an example may have to be trained on."""
        return self.args.max_length or self.config.max_position_embeddings

    def dataset(self, conversations, processor, for_generation: bool = False) -> ConversationDataset:
        """Conversations to train on, or with `for_generation` to evaluate on, encoded when they are needed."""
        max_length = self.config.max_position_embeddings if for_generation else self.max_length
        truncate, skip_bad = self.args.truncate and not for_generation, self.bad_examples.skip
        loss_on = self.args.loss_on
        return ConversationDataset(conversations, processor, for_generation, max_length, truncate, skip_bad, loss_on)

    def check_data(self, train, held_out, processor):
        """For --check_data: decodes every image and prints a summary. Raises InputError for data with problems."""
        self.commits()
        if is_first():
            workers, no_bars = self.training_args.dataloader_num_workers, self.training_args.disable_tqdm
            say(*listing(self.bad_examples.left_out))
            check_data(train, held_out, processor, self.max_length, workers, no_bars, self.bad_examples.skip)

    def evaluate_only(self, evaluation: Evaluation):
        """For --evaluate_only: evaluates a saved model or adapter; writes evaluation-SPLIT.json and its page."""
        commits, folder = self.commits(), self.saved.folder
        if (folder / "preprocessor_config.json").is_file():
            say(*changed_settings(folder, self.args.num_crops, self.args.exif_rotate))
        model = self.load_saved(self.saved)
        with stop_signals.stopping(AFTER_BATCH):
            report = evaluation.report(model, self.training_args, self.preemption.check, with_loss=True)
        if is_first():
            model_name = self.args.adapter or self.args.model_name_or_path
            path = new_evaluation(self.output_dir, model_name, self.args.eval_split)
            write_evaluation(path, report)
            left_out, page = self.left_out(evaluation), path.with_suffix(".html").name
            say(*listing(left_out))
            about = {"model": model_name} | commits
            write_page(self.training_args, None, report, about, evaluation.example, name=page, left_out=left_out)

    def load_saved(self, saved: Saved):
        dtype = compute_dtype(self.training_args)
        quantization = nf4_config(dtype, self.args.quantize_vision) if self.args.use_qlora else None
        with blaming("model_name_or_path", saved.folder):
            return load_saved(
                saved,
                dtype=dtype,
                attn_implementation=self.args.attn_implementation,
                quantization=quantization,
                device=self.training_args.device if quantization else None,
            )

    def prepare(
        self, train_dataset: ConversationDataset, eval_dataset: ConversationDataset
    ) -> TrainingArguments | None:
        """Measures all examples, plans micro-batches that fit into memory, and makes the output folder ready.

        Returns the TrainingArguments to train with. None if there is nothing to train: with --estimate, which prints
        what a run would need, and if the output folder holds the finished run already.
        """
        args, training_args = self.args, self.training_args
        self.hub_commits = self.commits()
        sizes = all_sizes(train_dataset, "measuring examples", training_args.disable_tqdm)
        # An evaluation example that can't be read should fail now and not after hours of training.
        all_sizes(eval_dataset, "measuring evaluation examples", training_args.disable_tqdm)
        if args.dry_run:
            train_dataset.keep_largest(2 * args.batch_size)  # the examples that need most memory
            sizes = train_dataset.sizes
        self.micro_batches = micro_batches = MicroBatches(
            args, training_args, train_dataset, self.choose_trained, self.checkpoint, self.stored_settings
        )
        if args.estimate:
            say(*micro_batches.describe())
            return None
        tokens, data = micro_batches.plan.tokens, fingerprint(sizes)
        self.settings = settings.settings_of_run(args, training_args, tokens, data, self.stored_settings)
        if finished := is_finished(args, training_args, self.settings):
            say(f"{self.output_dir} holds {finished}: there is nothing left to do; {ANEW}")
            return None
        check_resumed(args, training_args, self.choose_trained, self.saved.folder)
        model_bytes, checkpoint_bytes = micro_batches.estimate.saved_bytes(args.use_lora)
        micro_batches.divide(self.config.original_max_position_embeddings)
        steps = micro_batches.steps
        prepare_output(args, training_args, self.settings, self.checkpoint, model_bytes, checkpoint_bytes, steps)
        self.planned = f"memory     {micro_batches.plan}"
        say(self.planned)  # before weights are loaded, when a process that needs too much would be killed
        self.peak_flops, self.peak_source = peak_flops(compute_dtype(training_args))
        self.training_args = micro_batches.training_arguments()
        check_agreement(self.training_args, self.config.hidden_size, steps)
        return self.training_args

    @property
    def shares_images(self) -> bool:
        """As `steps.shares_images` decides, for the collator."""
        return shares_images(self.args)

    def fit(self, model, collate: Callable) -> TrainingArguments:
        """Fuses functions, compares kernels, and measures whether the planned micro-batches fit, as
        `MicroBatches.measure` says. The trainer calls it before it takes the model. Returns the TrainingArguments to
        train with."""
        args, micro_batches, device = self.args, self.micro_batches, self.training_args.device
        check_kernels(self.config, args, device, compute_dtype(self.training_args))
        say(*micro_batches.measure(model, collate))
        self.training_args = micro_batches.training_arguments()
        self.settings["tokens"], self.sampler = micro_batches.plan.tokens, micro_batches.sampler
        self.meter = Meter(micro_batches.estimate.costs[micro_batches.plan.checkpointing], self.peak_flops)
        return self.training_args

    def begin(self, trainer: RecipeTrainer):
        """Says what will happen, shows an example, warns of settings, and caches vision features."""
        args, training_args, micro_batches = self.args, self.training_args, self.micro_batches
        plan, parameters, steps = micro_batches.plan, micro_batches.estimate.parameters, micro_batches.steps
        model, train_dataset = trainer.model, trainer.train_dataset
        activation_checkpointing.set_tower_checkpointing(model, plan.checkpointing)
        self.facts = {"mode": describe_mode(args), "model": args.model_name_or_path, "memory": str(plan)}
        self.facts["attention"] = describe_attention(args.attn_implementation, self.config.attention_dropout)
        self.facts |= {"data": describe_sizes(train_dataset.sizes, len(trainer.eval_dataset)), **self.hub_commits}
        details = {"precision": precision_of(training_args), "max_tokens": plan.tokens}
        details |= {"steps": steps, "n_parameters": parameters}
        if is_first():
            say(*render_example(train_dataset))
            lines = describe_run(model, args, training_args, self.facts, **details)
            say(*(line for line in lines if line != self.planned))
            say(f"MFU        of {self.peak_flops / 1e12:.3g} TFLOP/s, {self.peak_source}")
            say(*questionable_settings(args, training_args, parameters, train_dataset.sizes, steps))
        if args.cache_vision_features:
            with stop_signals.stopping(AFTER_IMAGE):
                stored, is_stopped = self.stored_settings.get("cached"), self.preemption.has_signal
                message = cache_features_of_run(args, training_args, model, train_dataset, stored, is_stopped)
            self.settings["cached"] = train_dataset.feature_cache is not None
            say(message)

    @contextlib.contextmanager
    def recorded(self, trainer: RecipeTrainer, before: dict | None):
        """Writes report.html when training ends, however it ends. Raises Interrupted if a signal has stopped it, and
        InputError if memory has run out. before: the report of the evaluation before training, or None."""
        try:
            with self.micro_batches.advising(trainer):
                yield
        finally:
            self.write_page(trainer, before, None)
        self.preemption.on_leaving = functools.partial(self.write_page, trainer, before, None)
        if self.preemption.stopped:
            say(f"stopped by a signal at step {trainer.state.global_step}, with a checkpoint")
            say(*self.preemption.advice)
            raise Interrupted

    def left_out(self, evaluation: Evaluation, of_training: Iterable[str] = ()) -> list[str]:
        """What was left out, as --on_bad_example skip says: when the data were read, in training, in evaluations."""
        found = [*self.bad_examples.left_out, *of_training, *evaluation.left_out.values()]
        return list(dict.fromkeys(found))

    def write_page(self, trainer: RecipeTrainer, before: dict | None, after: dict | None, left_out=None):
        """left_out: lines about the examples of all ranks; by default those that this rank knows of."""
        if is_first():
            left_out = left_out or self.left_out(trainer.evaluation, trainer.health.problems)
            ending = {"left_out": left_out, "stopped": self.preemption.ending, "error": sys.exception()}
            about = self.facts | self.early_stopping.facts()
            shown = trainer.evaluation.example, trainer.state
            write_page(self.training_args, before, after, about, *shown, **ending)

    def save(self, trainer: RecipeTrainer):
        """Saves the model under the Hub's tensor names, or the adapter, and the processor.

        Raises InputError if weights are NaN or too large.
        """
        trainer.health.check_weights(trainer)
        if not self.args.use_lora:
            trainer.model.to(compute_dtype(self.training_args))  # so that the saved model is what is evaluated
        else:
            round_parts(trainer.model, compute_dtype(self.training_args))
        with disk_full_as_input_error(self.output_dir):
            trainer.save_model()
        self.preemption.model_saved(self.output_dir, trainer.state.global_step)

    def finish(self, trainer: RecipeTrainer, before: dict | None, after: dict):
        """Writes the report and the model card, and lists the examples that were left out. With --dry_run, loads the
        saved model and compares its answers."""
        trainer.trackers.close()
        left_out = self.left_out(trainer.evaluation, trainer.health.skipped())
        state, name = trainer.state, after["metric"]
        if is_first() and trainer.has_finished:
            write_json(self.output_dir / FINISHED, self.settings | self.early_stopping.record(state.global_step))
        say(*listing(left_out))
        self.facts |= (best := output_folder.better_model(self.output_dir, after) if self.args.keep_best else {})
        self.write_page(trainer, before, after, left_out)
        if is_first():
            self.facts |= {"steps": state.global_step, "epochs": f"{state.epoch:.3g}"}
            write_model_card(self.args, self.training_args, self.facts, before, after, precision_of(self.training_args))
        change = " -> ".join(f"{report[name]:.4f}" for report in (before, after) if report)
        where = "" if self.args.dry_run else f"; the model, its processor and report.html are in {self.output_dir}"
        say(f"{name} {change}{where}", *best.values())
        if self.args.dry_run:
            finish_dry_run(trainer, after, lambda: self.load_saved(find_saved(str(self.output_dir))))
        unlock_folder()
