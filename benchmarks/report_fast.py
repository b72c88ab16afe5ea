"""The stages of gpu_report.py about speed: each mode and kernel, small images, shared images, answers."""

import math
import time
from functools import partial

import torch
from report_models import packed, padded
from report_parts import Check, LeftOut, Row, Setting
from report_runs import (
    GIB,
    Allocated,
    Examples,
    Found,
    Page,
    attentions,
    configuration,
    document,
    memory_to_use,
    plan_of,
    precision,
    random_model,
    small_image,
    train,
)

import finetune_hf_trainer_docvqa as docvqa
from phi3v.model import fused
from phi3v.training import activation_checkpointing
from phi3v.training.estimate import NF4_BYTES
from phi3v.training.hardware import DTYPES, wait_for_device
from phi3v.training.peak import peak_bytes
from phi3v.training.workload import workload_of_packing

TABLE = "Training on documents of 2,443 tokens"
# Images/s of 8 A100 of 80 GB and GB on each, as the recipe's guide reports them: docs/published_results.md.
PUBLISHED = {
    ("full", "sdpa"): (5.041, 42),
    ("full", "flash"): (8.657, 36),
    ("frozen", "sdpa"): (17.578, 29),
    ("frozen", "flash"): (31.736, 27),
    ("lora", "sdpa"): (5.591, 50),
    ("lora", "flash"): (12.127, 16),
    ("qlora", "sdpa"): (4.831, 32),
    ("qlora", "flash"): (10.545, 10),
}
PUBLISHED_GPUS, PUBLISHED_PEAK = 8, 312e12
NO_TARGET = {"frozen": "more than the hardware can do", "lora": "language model only", "qlora": "language model only"}
TRIES = ("full", "frozen", "lora")  # the first of these that fits is trained where one mode has to do


def speed(setting: Setting, mode: str) -> list[Check | Row | LeftOut]:
    """One mode with each kind of attention."""
    found = []
    for kind, attention in attentions(setting).items():
        name = f"{mode}, {kind}"
        if attention.startswith("-"):
            found.append(LeftOut(name, attention[1:]))
        elif why := missing(setting, mode):
            found.append(LeftOut(name, why))
        else:
            found += row_of(setting, mode, kind, attention)
    return found


full, frozen, lora, qlora = (partial(speed, mode=mode) for mode in ("full", "frozen", "lora", "qlora"))


def missing(setting: Setting, mode: str) -> str | None:
    """What this machine lacks to train in a mode, as the second half of a sentence."""
    needed = {"qlora": "bitsandbytes", "full": "deepspeed", "frozen": "deepspeed"}.get(mode)
    if needed and needed not in setting.facts.get("packages", {needed: ""}):
        return f"the package {needed} is not installed"
    return None


def row_of(setting: Setting, mode: str, kind: str, attention: str) -> list[Check | Row | LeftOut]:
    """The row of a mode. Where a whole step does not fit, a second row has the forward and backward pass alone, which
    is what each of several GPUs computes."""
    page = document(setting)
    cells = {"mode": mode, "attention": attention, "step": "whole"}
    plan = plan_of(setting, mode, attention, page).plan
    expected = plan.memory.peak / GIB
    fits = plan.memory.peak <= plan.budget * 1.1  # the estimate may be too high: then it is tried
    error = f"does not fit: {expected:.0f} GiB are expected"
    if fits:
        try:
            one = train(setting, mode, attention, page, steps=steps(setting), largest=largest(setting))
            return [Row(TABLE, cells | measured(one) | published(mode, kind, one, page)), finite(mode, kind, one)]
        except torch.OutOfMemoryError:
            error = f"out of memory: {expected:.0f} GiB were expected"
    rows = [Row(TABLE, cells | {"images/s": error})]
    if "lora" in mode:  # adapters have no large optimizer, so the passes alone would not fit either
        return rows
    try:
        one = passes(setting, mode, attention, page)
    except torch.OutOfMemoryError:
        return [*rows, Row(TABLE, cells | {"step": "passes alone", "images/s": "out of memory"})]
    return [*rows, Row(TABLE, cells | {"step": "passes alone"} | measured(one) | published(mode, kind, one, page))]


def steps(setting: Setting) -> int:
    return 3 if setting.tiny else 6


def largest(setting: Setting) -> int:
    """The most examples in a micro-batch: with --tiny, more only take time."""
    return 2 if setting.tiny else 8


def measured(one: Found) -> dict:
    """The columns that are measured."""
    return {
        "examples in a micro-batch": one.micro_batch,
        "recomputed": one.plan.checkpointing,
        "images/s": one.images_per_second,
        "MFU": f"{one.mfu:.1%}",
        "peak GiB": one.memory["peak"] / GIB or None,  # on a CPU nothing is counted here
        "slowest / median step": max(one.seconds) / one.step,
    }


def published(mode: str, kind: str, one: Found, page: Page) -> dict:
    """The published row, for one of its 8 GPUs: images/s, the MFU that follows, GB."""
    rate, gb = PUBLISHED[mode, kind]
    workload = one.estimate.workload_of_examples([page.size])
    mfu = rate / PUBLISHED_GPUS * one.estimate.costs["none"].flops(workload) / PUBLISHED_PEAK
    note = f" ({NO_TARGET[mode]})" if mode in NO_TARGET else ""
    return {
        "published images/s of an A100": rate / PUBLISHED_GPUS,
        "published MFU": f"{mfu:.0%}{note}",
        "published GB": gb,
    }


def finite(mode: str, kind: str, one: Found) -> Check:
    """A step that computes nothing right is fast as well, so the loss is looked at."""
    expected = math.log(one.estimate.costs["none"].vocabulary)
    good = all(abs(loss - expected) < 3 for loss in one.losses) and len(one.losses) > 0
    wrong = f"the losses of {mode} with {kind} are not those of random weights, about {expected:.1f}"
    return Check(
        f"losses of {mode}, {kind}", " ".join(f"{x:.2f}" for x in one.losses), f"{expected:.1f} ± 3", good, wrong
    )


def passes(
    setting: Setting,
    mode: str,
    attention: str,
    page: Page,
    examples: int | None = None,
    around_step=None,
    on_model=None,
) -> Found:
    """Forward and backward pass without an optimizer, as ZeRO-2 computes them on each of many GPUs: weights in half
    precision, and a gradient is given away as soon as it is complete."""
    found = plan_of(setting, mode, attention, page)
    dtype, estimate = DTYPES[precision(setting)], found.estimate
    weights = estimate.parameters * dtype.itemsize
    if estimate.four_bit:
        weights -= estimate.four_bit * (dtype.itemsize - NF4_BYTES)

    def taken(n: int, kind: str) -> float:
        workload = estimate.workload_of_tokens(n * page.tokens)
        return 1.1 * (weights + peak_bytes(estimate.costs[kind], workload)) + GIB

    sizes = [examples] if examples else [2] if setting.tiny else list(range(8, 0, -1))
    choices = [
        (n, kind) for kind in activation_checkpointing.KINDS for n in sizes if kind == "all" or n >= min(3, sizes[0])
    ]
    budget = memory_to_use(setting)
    n, kind = next((c for c in choices if taken(*c) <= budget), choices[-1])
    model = random_model(configuration(setting), dtype, setting.device, attention)
    model = docvqa.choose_trained(model, docvqa.RecipeArguments(freeze_vision_model=mode == "frozen"))
    activation_checkpointing.set_tower_checkpointing(model, kind)
    if kind != "none":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if on_model:
        on_model(model)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    fused.turn_off()
    if setting.device != "cpu":
        fused.turn_on(torch.device(setting.device), dtype)
    data, allocated, costs = Examples(setting, page, n), Allocated(setting.device), estimate.costs[kind]
    rows = [data[i] for i in range(n)]
    workload = workload_of_packing(packed(setting, rows)["packing"])
    found = Found(found.plan._replace(checkpointing=kind), estimate, found.peak_flops, 1, n)
    found.per_step.update(images=n // page.questions, tokens=workload.tokens, flops=costs.flops(workload))
    allocated.reset()
    for step in range(steps(setting)):
        batch = packed(setting, rows)
        wait_for_device()
        started = time.perf_counter()
        with around_step(step) if around_step else torch.autograd.set_detect_anomaly(False):
            loss = model(**batch, num_items_in_batch=workload.targets).loss
            loss.backward()
            wait_for_device()
        if step >= 2:
            found.seconds.append(time.perf_counter() - started)
        found.losses.append(loss.item())
    found.memory["peak"] = allocated.peak()
    found.model = model
    return found


def first_that_fits(setting: Setting, attention: str, page: Page) -> str:
    """The mode that trains most of the model and of which a whole step fits."""
    for mode in TRIES:
        if missing(setting, mode) is None:
            plan = plan_of(setting, mode, attention, page).plan
            if plan.memory.peak <= plan.budget:
                return mode
    return "lora"


def best_attention(setting: Setting) -> str:
    """Flash attention if there is any, else sdpa."""
    found = attentions(setting)
    return found["sdpa"] if found["flash"].startswith("-") else found["flash"]


def compared(setting: Setting, table: str, page: Page, cases: dict[str, dict]) -> list[Check | Row | LeftOut]:
    """Trainings that differ in their micro-batches alone. cases: flags and options of `train`, by name; the speed-up of
    each is against the first."""
    attention, found, first = best_attention(setting), [], None
    mode = first_that_fits(setting, attention, page)
    for name, options in cases.items():
        flags = options.pop("flags", ())
        cells = {"micro-batches": name, "mode": mode}
        try:
            one = train(setting, mode, attention, page, *flags, steps=steps(setting), **options)
        except torch.OutOfMemoryError:
            found.append(Row(table, cells | {"examples/s": "out of memory"}))
            continue
        rate = one.ranks * one.per_step["examples"] / one.step
        first = first or rate
        found.append(
            Row(
                table,
                cells
                | {"examples/s": rate, "speed-up": rate / first}
                | measured(one)
                | {"images/s": one.images_per_second},
            )
        )
    return found


def shared(setting: Setting) -> list[Check | Row | LeftOut]:
    """Four questions about each document, in a micro-batch of four."""
    page = document(setting, questions=4)
    cases = {
        "each question with its own copy of the page": {"examples": 4, "flags": ("--no_share_images",)},
        "four questions share one copy": {"examples": 4},
    }
    return compared(setting, "Several questions about one document", page, cases)


def small(setting: Setting) -> list[Check | Row | LeftOut]:
    """Small images one at a time, as the recipe has them, and in micro-batches that are filled by tokens."""
    filled, page = 4 if setting.tiny else 16, small_image(setting)
    cases = {
        "one image": {"examples": 1, "micro_batches": filled},
        "filled by tokens": {"examples": None, "largest": filled},
    }
    return compared(setting, "Small images of 1x2 crops", page, cases)


@torch.no_grad()
def generation(setting: Setting) -> list[Check | Row | LeftOut]:
    """Greedy answers to prompts with small images, one at a time and 8 together."""
    attention, dtype = best_attention(setting), DTYPES[precision(setting)]
    model, new = (
        random_model(configuration(setting), dtype, setting.device, attention).eval(),
        8 if setting.tiny else 64,
    )
    data, found = Examples(setting, small_image(setting), 8), []

    def seconds(batch: dict, tokens: int) -> float:
        options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        wait_for_device()
        started = time.perf_counter()
        out = model.generate(**batch, **options)
        wait_for_device()
        assert out.shape[1] == batch["input_ids"].shape[1] + tokens
        return time.perf_counter() - started

    for size in (1, 8):
        batch = padded(setting, [data[i] for i in range(size)], side="left")
        del batch["labels"]
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        seconds(batch, 2)
        repeated = range(1 if setting.tiny else 3)
        reading = sorted(seconds(batch, 1) for _ in repeated)[len(repeated) // 2]
        whole = sorted(seconds(batch, new + 1) for _ in repeated)[len(repeated) // 2]
        cells = {"answers together": size, "tokens/s": size * new / max(whole - reading, 1e-9)}
        cells |= {"tokens/s with reading the prompt": size * (new + 1) / whole, "prompt ms": reading * 1e3}
        found.append(Row("Generated tokens", cells))
    faster = found[1].cells["tokens/s"] / found[0].cells["tokens/s"]
    wrong = f"8 answers together give {faster:.1f} times the tokens/s of one: batches of answers bring nothing"
    return [*found, Check("tokens/s of 8 answers against 1", faster, "more than 1", faster > 1, wrong)]
