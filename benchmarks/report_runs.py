"""Trainings of gpu_report.py: the recipe's Trainer on random weights and made images, watched at every step.

A training here is what a script's `main` does between its flags and `trainer.train()`, with the same flags, estimate,
sampler, collator and Trainer. Only two things differ: weights are random and are made on the device, and examples are
encoded before the training, so that no disk or CPU is measured.
"""

import contextlib
import gc
import os
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import gather_object
from report_models import image_processor, make_config, make_example, quantize
from report_parts import ROOT, Setting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

sys.path.insert(0, str(ROOT))
with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints lines when it is imported
    import finetune_hf_trainer_docvqa as docvqa
    from phi3v import Phi3VConfig, Phi3VForCausalLM
    from phi3v.arguments import parse_arguments
    from phi3v.data.collate import PackingCollator
    from phi3v.data.sizes import Size
    from phi3v.errors import InputError
    from phi3v.model import fused
    from phi3v.model.image_processing_phi3v import num_image_tokens
    from phi3v.training import activation_checkpointing
    from phi3v.training.early_stopping import EarlyStopping
    from phi3v.training.estimate import Estimate, Plan
    from phi3v.training.hardware import (
        USABLE_SHARE,
        choose_attention,
        compute_dtype,
        peak_flops,
        wait_for_device,
        weights_dtype,
    )
    from phi3v.training.meter import Meter
    from phi3v.training.outline import estimate_run
    from phi3v.training.steps import plan_steps
    from phi3v.training.trainer import RecipeTrainer

MODES = {
    "full": [],
    "frozen": ["--freeze_vision_model"],
    "lora": ["--use_lora"],
    "qlora": ["--use_qlora"],
}
GIB = 2**30
WARM_UP = 2  # steps that are not timed


@dataclass(frozen=True)
class Page:
    """What the examples of a training look like.

    grid: sub-crops of the image, down and across. tokens: of an example, with those of its image. supervised: of these.
    questions: how many neighbouring examples have the same image.
    """

    grid: tuple[int, int]
    tokens: int
    image_tokens: int
    supervised: int = 13
    questions: int = 1

    @property
    def size(self) -> Size:
        return Size(self.tokens, self.image_tokens, self.grid[0] * self.grid[1] + 1, self.supervised, 0)


def page_of(setting: Setting, grid: tuple[int, int], tokens: int, questions: int = 1) -> Page:
    """tokens: of an example; with --tiny, images are smaller, and an example has that many fewer."""
    real, own = (num_image_tokens(*grid, side) for side in (12, image_processor(setting).crop_tokens_per_side))
    return Page(grid, tokens - real + own, own, questions=questions)


def document(setting: Setting, questions: int = 1) -> Page:
    """An example of the recipe's published speeds, which have 2,443 tokens in the mean: 5x3 crops and 66 tokens of text
    have exactly as many."""
    return page_of(setting, (5, 3), 2443, questions)


def small_image(setting: Setting) -> Page:
    """An image of 1x2 crops with a question of 50 tokens."""
    return page_of(setting, (1, 2), 507)


TINY_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}


def configuration(setting: Setting) -> Phi3VConfig:
    """Of Phi-3.5-vision, or of a small model with as many words and equally large crops."""
    return Phi3VConfig(**TINY_MODEL) if setting.tiny else make_config(setting)


def precision(setting: Setting) -> str:
    """The fastest precision that the device can train in, as the flags name it."""
    if setting.device == "cpu":
        return "fp32"
    old = setting.device == "cuda" and setting.facts["capability"] < [8, 0]
    return "fp16" if old else "bf16"


def attentions(setting: Setting) -> dict[str, str | None]:
    """For "sdpa" and "flash": the kernel's name, or in place of it the reason why there is none, after a "-"."""
    try:
        return {"sdpa": "sdpa", "flash": choose_attention(None, True, precision(setting))}
    except InputError as e:
        return {"sdpa": "sdpa", "flash": f"-{e}"}


class Examples(torch.utils.data.Dataset):
    """Examples that were encoded in advance, with what the Trainer asks a ConversationDataset for."""

    feature_cache = None
    DIFFERENT = 4  # examples, or groups of questions, that are made; the others repeat them

    def __init__(self, setting: Setting, page: Page, length: int):
        self.page, self.length, self.sizes = page, length, [page.size] * length
        self.bytes_of_crop = 3 * image_processor(setting).image_size ** 2
        random, text, self.made = torch.Generator().manual_seed(0), page.tokens - page.image_tokens, []
        for i in range(self.DIFFERENT * page.questions):
            tiles = self.made[-1]["tiles"] if i % page.questions else None
            options = {"text": text, "supervised": page.supervised, "tiles": tiles}
            self.made.append(make_example(setting, random, [page.grid], **options))

    def __len__(self):
        return self.length

    def __getitem__(self, i: int) -> dict:
        index = i if i >= 0 else ~i
        example = self.made[index % len(self.made)] | {"images_key": self.images_key(index)}
        return example if i >= 0 else example | {"labels": torch.full_like(example["labels"], -100)}

    def images_key(self, i: int) -> int:
        return i // self.page.questions

    def bytes_of_crops(self, crops: float) -> float:
        return crops * self.bytes_of_crop


class LiveBytes(TorchDispatchMode):
    """On a CPU, what an accelerator's allocator counts: the bytes of all tensors that were made within this context,
    now (`bytes`) and at most (`peak`)."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakKeyDictionary()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and tensor.device.type == "cpu" and storage not in self.known:
                self.known[storage] = size = 0 if self.paused else storage.nbytes()
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, size)
        return results

    def _free(self, size: int):
        self.bytes -= size

    def not_counting(self, work: Callable) -> Callable:
        """The same function, whose tensors are not counted: batches, which a GPU does not hold before they are used."""

        def uncounted(*args):
            self.paused = True
            try:
                result = work(*args)
                for tensor in tree_leaves(result):
                    if isinstance(tensor, torch.Tensor):
                        tensor.detach()  # so that its storage is known
                return result
            finally:
                self.paused = False

        return uncounted


class Allocated:
    """The bytes of all tensors on the device: now, and the most since `reset`. On a CPU, counts them within a context
    of LiveBytes."""

    def __init__(self, device: str):
        self.live = LiveBytes() if device == "cpu" else None
        self.module = None if device == "cpu" else torch.get_device_module(device)

    def now(self) -> int:
        return self.live.bytes if self.live else self.module.memory_allocated()

    def peak(self) -> int:
        return self.live.peak if self.live else self.module.max_memory_allocated()

    def reset(self):
        if self.live:
            self.live.peak = self.live.bytes
        else:
            self.module.reset_peak_memory_stats()

    def outside(self) -> int:
        """Bytes of the device that its allocator has not taken: libraries, and whatever else runs there."""
        if self.live or not hasattr(self.module, "mem_get_info"):
            return 0
        free, total = self.module.mem_get_info()
        return total - free - self.module.memory_reserved()

    def gaps(self, peak: float) -> float:
        """Bytes that the allocator has taken, and that no tensor used when tensors took `peak` bytes."""
        return 0 if self.live else max(self.module.memory_reserved() - peak, 0)


@dataclass
class Found:
    """What was measured in a training on this rank.

    plan: micro-batches, activation checkpointing, expected memory. seconds: of each timed step. per_step: images,
    tokens and flops of a step. micro_batches: in a step. losses: of each step. memory: bytes at moments of the last
    step, and of the whole training.
    """

    plan: Plan
    estimate: Estimate
    peak_flops: float
    micro_batches: int
    micro_batch: int = 0
    seconds: list[float] = field(default_factory=list)
    per_step: Counter = field(default_factory=Counter)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    ranks: int = 1
    model: torch.nn.Module | None = None

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.ranks * self.per_step["images"] / self.step

    @property
    def tokens_per_second(self) -> float:
        return self.ranks * self.per_step["tokens"] / self.step

    @property
    def mfu(self) -> float:
        return self.per_step["flops"] / self.step / self.peak_flops


class StepMeter(Meter):
    """A Meter that also counts what the step at hand consists of."""

    step: Counter = Counter()

    def add(self, packing):
        before = Counter(examples=0, images=self.images, tokens=self.tokens, flops=self.flops)
        super().add(packing)
        after = Counter(images=self.images, tokens=self.tokens, flops=self.flops)
        after.subtract(before)
        self.step.update(after)
        self.step["examples"] += sum(max(len(group.branches), 1) for group in packing.groups)


class Watch(TrainerCallback):
    """Times every step, and reads the allocated memory at moments at which its parts can be told apart.

    around_step: called with the number of each step before it begins; returns a context for that step.
    """

    def __init__(self, found: Found, meter: StepMeter, allocated: Allocated, around_step: Callable | None = None):
        self.found, self.meter, self.allocated = found, meter, allocated
        self.around_step, self.context = around_step, contextlib.ExitStack()
        self.last, self.trainer = None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.found.memory["prepared"] = self.allocated.now()
        holder = self.trainer.deepspeed or self.trainer.optimizer
        holder.step = self._watched(holder.step)

    def _watched(self, step: Callable) -> Callable:
        def watched(*args, **kwargs):
            memory = self.found.memory
            memory["passes peak"], memory["with gradients"] = self.allocated.peak(), self.allocated.now()
            self.allocated.reset()
            with torch.profiler.record_function("part: optimizer"):
                result = step(*args, **kwargs)
            memory["update peak"] = self.allocated.peak()
            return result

        return watched

    def on_step_begin(self, args, state, control, **kwargs):
        self.found.memory["before"] = self.allocated.now()
        self.found.memory["outside"] = self.allocated.outside()
        self.allocated.reset()
        self.meter.step = Counter()
        if self.around_step:
            self.context.enter_context(self.around_step(state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        wait_for_device()
        self.context.close()
        now = time.perf_counter()
        if state.global_step > WARM_UP:
            self.found.seconds.append(now - self.last)
        self.last = now
        self.found.per_step = self.meter.step
        memory = self.found.memory
        memory["after"] = self.allocated.now()
        memory["peak"] = max(memory.get("peak", 0), memory["passes peak"], memory["update peak"])
        memory["gaps"] = self.allocated.gaps(memory["peak"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found.losses.append(logs["loss"])


def random_model(config: Phi3VConfig, dtype: torch.dtype, device, attention: str, quantized=False) -> Phi3VForCausalLM:
    """A model with random weights, made on the device. With `quantized`, QLoRA's base."""
    with torch.device(device):
        model = Phi3VForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    if quantized:
        quantize(model, dtype).is_quantized = False  # the Trainer asks models that say so how they were loaded
    return model.train()


def train(
    setting: Setting,
    mode: str,
    attention: str,
    page: Page,
    *flags: str,
    steps: int = 6,
    examples: int | None = None,
    micro_batches: int = 2,
    largest: int = 8,
    around_step: Callable | None = None,
    count_memory: bool = False,
    keep_model: bool = False,
    on_model: Callable | None = None,
    saved: Path | None = None,
    only_plan: bool = False,
) -> Found:
    """Trains for a few steps with the recipe's Trainer.

    mode: one of MODES; attention: an attention implementation; flags: further flags of the script.
    examples: in a micro-batch; None for as many as fit by the estimate, and at most `largest`.
    micro_batches: in a step, of each rank. around_step: as in `Watch`; on_model: called with the model.
    count_memory: on a CPU, counts live tensors, which is slow. keep_model: returns the trained model as `model`.
    saved: a folder with a model to load, in place of random weights.
    only_plan: does not train. Raises torch.OutOfMemoryError where the device has too little memory.
    """
    config = configuration(setting)
    folder = saved or Path(setting.folder) / "model"
    if not folder.is_dir():
        config.save_pretrained(folder)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    argv = ["--model_name_or_path", str(folder), "--output_dir", str(Path(setting.folder) / "out"), "--no-tqdm"]
    argv += [f"--{precision(setting)}"] * (not {"--fp32", "--bf16", "--fp16"} & set(flags))
    argv += ["--report_to", "none", "--max_steps", str(steps), "--attn_implementation", attention, *MODES[mode], *flags]
    argv += ["--batch_size", str(64 * ranks), "--max_tokens_per_gpu", "auto", "--logging_steps", "1"]
    argv += ["--dataloader_num_workers", "0"] * (setting.device == "cpu")
    given = set(MODES[mode]) | set(flags)
    argv += ["--learning_rate", "1e-5"] * ("--learning_rate" not in given)
    recipe = docvqa.RecipeArguments, docvqa.TRAINING, docvqa.PRESETS, docvqa.__doc__
    args, training_args = parse_arguments(*recipe, argv)
    set_seed(training_args.seed)
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 splits a model while it loads

    estimate = estimate_run(args, training_args, [page.size], docvqa.choose_trained)
    tokens, kind = "auto", activation_checkpointing.kind_from_flag(training_args.activation_checkpointing)
    allocated = Allocated(setting.device)
    budget = memory_to_use(setting)
    if examples is None:
        plan = estimate.plan(64, 1, "auto", kind, budget)
        examples = min(max(plan.tokens // page.tokens, 1), largest)
    if page.questions > 1 and args.share_images:
        text = page.tokens - page.image_tokens
        tokens = examples * text + -(-examples // page.questions) * page.image_tokens
    else:
        tokens = examples * page.tokens
    plan = estimate.plan(64, 1, tokens, kind, budget)
    peak, _ = peak_flops(compute_dtype(training_args))
    found = Found(plan, estimate, peak, micro_batches, examples, ranks=ranks)
    if only_plan:
        return found

    args.batch_size, args.max_tokens_per_gpu = examples * micro_batches * ranks, tokens
    dataset = Examples(setting, page, args.batch_size * steps)
    length = config.original_max_position_embeddings
    _, sampler = plan_steps(args, training_args, dataset, tokens, length)
    meter = StepMeter(estimate.costs[plan.checkpointing], peak)
    training_args = replace(
        training_args,
        gradient_accumulation_steps=sampler.accumulation,
        activation_checkpointing=activation_checkpointing.flag_for_trainer(plan.checkpointing),
    )
    watch = Watch(found, meter, allocated, around_step)
    run = SimpleNamespace(sampler=sampler, meter=meter, preemption=TrainerCallback(), settings={})
    run.early_stopping = EarlyStopping()
    run.fit = lambda model, collator: training_args  # a run measures its micro-batches here; these are planned
    processor = SimpleNamespace(image_processor=image_processor(setting))
    collator, trainer = PackingCollator(processor, length, args.share_images), None
    if allocated.live:
        collator = allocated.live.not_counting(collator)
    counting = allocated.live if count_memory and allocated.live else contextlib.nullcontext()
    try:
        with counting:
            empty = allocated.now()
            if saved:
                model = docvqa.load_model(args, training_args)
            else:
                dtype = weights_dtype(training_args, args.use_lora)
                model = random_model(config, dtype, training_args.device, attention, args.use_qlora)
                model = docvqa.choose_trained(model, args)
            if on_model:
                on_model(model)
            trainer = RecipeTrainer(
                model=model,
                args=training_args,
                train_dataset=dataset,
                data_collator=collator,
                evaluation=None,
                run=run,
            )
            watch.trainer = trainer
            trainer.add_callback(watch)
            fused.turn_off()
            if training_args.device.type != "cpu":
                fused.turn_on(training_args.device, compute_dtype(training_args))
            activation_checkpointing.set_tower_checkpointing(model, plan.checkpointing)
            gc.collect()
            found.memory["weights"] = allocated.now() - empty
            found.memory["empty"] = empty
            trainer.train()
        found.micro_batches = sampler.accumulation
        if keep_model:
            found.model = trainer.accelerator.unwrap_model(trainer.model)
        return found
    finally:
        release(trainer)


def plan_of(setting: Setting, mode: str, attention: str, page: Page, *flags: str, **options) -> Found:
    """What `train` would do, with an empty list of seconds."""
    return train(setting, mode, attention, page, *flags, **options, only_plan=True)


def memory_to_use(setting: Setting) -> float:
    """Bytes that a training may plan with: as for the recipe, what is free, less a tenth."""
    if setting.device == "cpu":
        return 8.0 * GIB
    empty_cache()  # an earlier training may have left memory, if it ran out of it
    module = torch.get_device_module(setting.device)
    free = module.mem_get_info()[0] if hasattr(module, "mem_get_info") else 16 * GIB
    return USABLE_SHARE * min(gather_object([free]))


def release(trainer: RecipeTrainer | None):
    """Gives back what a training has taken, so that another one can follow in this process."""
    if trainer is not None:
        trainer.accelerator.free_memory()
        for holder in (trainer, trainer.callback_handler):
            holder.model = holder.optimizer = holder.lr_scheduler = None
        trainer.model_wrapped = trainer.deepspeed = None
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # with these the next training would run under DeepSpeed too
    empty_cache()


def empty_cache():
    """Gives memory that no tensor uses back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def release_model(found: Found):
    """Gives back the model that `train` has kept."""
    found.model = None
    gc.collect()
