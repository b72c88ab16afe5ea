"""What a training will take: memory and time."""

import functools
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .costs import Costs
from .hardware import GPUS, USABLE, device_memory, peak_flops, published_peak
from .workload import Load, load_of_example

# What a GPU needs beside tensors: the driver's context, cuBLAS and NCCL. And what its allocator can't use in between.
GPU_CONTEXT, GPU_FRAGMENTATION = 1.0 * 2**30, 0.05
CHECKPOINTING = ("none", "decoder", "all")
SPOKEN = {"none": "no checkpointing", "decoder": "checkpointing: decoder", "all": "checkpointing: all"}
ENOUGH_TOKENS = 8192
ASSUMED_MFU = 0.4
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a parameter: 4 bits, 8 more a block of 64, 32 more for 256 of these


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. The first three stay; `passes` is the most that the forward and backward pass take in
    addition, `update` the optimizer's step; `context` is what the device's libraries take."""

    weights: float
    gradients: float
    optimizer: float
    passes: float
    update: float
    context: float

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimizer + max(self.passes, self.update) + self.context

    def __str__(self):
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"{self.peak / 2**30:.2f} GiB ({parts})"


class Estimate:
    """What training on some examples will take on each of `world_size` devices.

    model: as `Costs` takes it, on the meta device or not.
    sizes: of the examples.
    compute_bytes: of a number in a matrix product.
    deepspeed: the content of its json; None for DistributedDataParallel, or one process alone.
    not_quantized: for a model whose linear layers are kept in NF4, patterns of the names of those that are not.
    on_gpu: whether to add what a GPU's libraries and its allocator take.
    """

    def __init__(
        self, model, sizes: list, world_size: int, compute_bytes: int, deepspeed: dict | None = None,
        not_quantized: list[str] | None = None, on_gpu: bool = True,
    ):  # fmt: skip
        self.sizes, self.world_size, self.deepspeed, self.on_gpu = sizes, world_size, deepspeed or {}, on_gpu
        stream_bytes = next(p for name, p in model.named_parameters() if "embed_tokens" in name).element_size()
        eager = model.config._attn_implementation == "eager"
        self.costs = {kind: Costs(model, kind, stream_bytes, compute_bytes, eager) for kind in CHECKPOINTING}
        self.trained = self.frozen = self.four_bit = self.largest = 0
        for module_name, module in model.named_modules():
            quantized = not_quantized is not None and isinstance(module, torch.nn.Linear) and "lora_" not in module_name
            quantized = quantized and not any(re.search(pattern, module_name) for pattern in not_quantized)
            own = 0
            for p in module.parameters(recurse=False):
                n = getattr(p, "ds_numel", p.numel())
                own += n
                if quantized:
                    self.four_bit += n
                elif p.requires_grad:
                    self.trained += n
                else:
                    self.frozen += n
            self.largest = max(self.largest, own)

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen + self.four_bit

    def memory(self, load: Load, checkpointing: str) -> Memory:
        """Expected memory of a process that trains on micro-batches like `load`."""
        costs, trained = self.costs[checkpointing], self.trained
        s, c = costs.s, costs.c
        weights = self.four_bit * NF4_BYTES + self.frozen * s
        passes, update = costs.peak_bytes(load), 0.0
        if self.four_bit:
            passes += self.largest * c  # a layer's weights while it computes
        zero = self.deepspeed.get("zero_optimization", {})
        if not self.deepspeed:
            # Adam on fp32 weights; DistributedDataParallel has a second copy of the gradients, in buckets.
            weights += trained * 4
            gradients = trained * 4 * (2 if self.world_size > 1 else 1)
            optimizer = trained * 8
            passes += trained * c if c < 4 else 0  # autocast's copies
        else:
            stage, share = zero.get("stage", 0), trained / self.world_size
            weights += trained * s
            offloaded = self.on_gpu and zero.get("offload_optimizer", {}).get("device", "none") != "none"
            optimizer = 0.0 if offloaded else share * 12  # fp32 weights and Adam's two moments
            gradients = share * s if stage >= 2 else trained * s
            if offloaded and stage >= 2:
                gradients = self.largest * s  # they go to the host one by one
            bucket = zero.get("reduce_bucket_size", 5e8)
            bucket = costs.width**2 if bucket == "auto" else bucket  # what the Trainer fills in
            buckets = bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1)
            passes += (buckets if self.on_gpu else min(buckets, trained)) * s  # a CPU has what is written to alone
            if stage == 2 and not offloaded and trained > bucket:
                passes += share * s  # a micro-batch's gradients, before they are added to those of earlier ones
            stepped = share  # updated at once
            if stage == 3:
                weights /= self.world_size
                live = max(zero.get("stage3_max_live_parameters", 1e9), 2 * self.largest)  # gathered ones
                passes += min(live, self.trained + self.frozen) * s
                stepped = min(share, zero.get("sub_group_size", 1e9))
            # Gradients are joined, and then converted to fp32.
            update = 0.0 if offloaded else stepped * (s + 4 if s < 4 else 4)
        context = 0.0
        if self.on_gpu:
            context = GPU_CONTEXT + GPU_FRAGMENTATION * (weights + gradients + optimizer + passes)
        return Memory(weights, gradients, optimizer, passes, update, context)

    def saved_bytes(self, adapters_only: bool) -> tuple[float, float]:
        """(what the model takes on a disk, and a checkpoint with the optimizer's state)."""
        size = self.costs["none"].s
        if adapters_only:
            return self.trained * 4, self.trained * 12
        whole = (self.trained + self.frozen) * size
        return whole, whole + self.trained * (12 if self.deepspeed else 8)

    def loads(self, indices: Iterable[int]) -> Load:
        """Of these examples in one micro-batch, no image shared."""
        return functools.reduce(operator.add, (load_of_example(s.tokens, s.crops, s.targets) for s in indices))

    def largest_load(self, examples: int) -> Load:
        """The most that a micro-batch of so many examples can hold."""
        order = sorted(self.sizes, key=lambda s: (-s.tokens, -s.crops))
        return self.loads(order[:examples])

    def load_of_tokens(self, tokens: int) -> Load:
        """Micro-batches filled up to `tokens`, with examples like the one with the most crops a token."""
        densest = max(self.sizes, key=lambda s: (s.crops / s.tokens, s.targets))
        one = load_of_example(densest.tokens, densest.crops, densest.targets)
        return Load(*(math.ceil(value * tokens / densest.tokens) for value in vars(one).values()))

    def least_checkpointing(self, load: Load, budget: float) -> str | None:
        """The least with which `load` fits into `budget` bytes; None if nothing helps."""
        return next((kind for kind in CHECKPOINTING if self.memory(load, kind).peak <= budget), None)

    def plan(
        self, batch_size: int, examples: int, tokens: int | str | None, checkpointing: str | None, budget: float
    ) -> "Plan":
        """What to do in `budget` bytes.

        batch_size: examples an optimizer step; examples: of a micro-batch, or in their place its `tokens`, which may
            be "auto"; checkpointing: None for as little as possible.
        With "auto", micro-batches grow to ENOUGH_TOKENS without checkpointing if that fits: beyond, more tokens gain
        less than computing twice costs.
        """
        longest = max(s.tokens for s in self.sizes)
        if tokens == "auto":
            share = math.ceil(batch_size / self.world_size) * longest
            for kind in [checkpointing] if checkpointing else CHECKPOINTING:
                fits = [n for n in range(longest, max(share, longest) + 256, 256) if self._fits(n, kind, budget)]
                if fits and (kind == "all" or fits[-1] >= min(ENOUGH_TOKENS, share)):
                    break
            tokens = fits[-1] if fits else longest
        load = self.load_of_tokens(max(tokens, longest)) if tokens else self.largest_load(examples)
        kind = checkpointing or self.least_checkpointing(load, budget) or "all"
        return Plan(tokens, kind, load, self.memory(load, kind), budget)

    def _fits(self, tokens: int, kind: str, budget: float) -> bool:
        return self.memory(self.load_of_tokens(tokens), kind).peak <= budget

    def flops(self, checkpointing: str) -> float:
        """Of the mean example, with what is computed again."""
        return self.costs[checkpointing].flops(self.loads(self.sizes), again=True) / len(self.sizes)

    def examples_per_second(self, checkpointing: str, peak: float) -> float:
        """Of all devices together at the ASSUMED_MFU of their `peak`, what is computed again being part of it."""
        return ASSUMED_MFU * peak * self.world_size / self.flops(checkpointing)

    def describe(self, load: Load, epochs: float) -> str:
        """Some lines: parameters, FLOPs, memory for `load`, and time; where there is no GPU, on common ones."""
        total = self.loads(self.sizes)
        n = len(self.sizes)
        parts = self.costs["none"].flops_by_part(total)
        whole = sum(parts.values())
        tokens, crops = (sorted(getattr(s, name) for s in self.sizes) for name in ("tokens", "crops"))
        lines = [
            f"parameters     {self.parameters:,}, of which {self.trained:,} train"
            + (f" and {self.four_bit:,} are kept in 4 bits" if self.four_bit else ""),
            f"examples       {n:,}, of {tokens[0]:,} to {tokens[-1]:,} tokens, median {tokens[n // 2]:,}; up to "
            f"{crops[-1]} crops, median {crops[n // 2]}",
            f"an example     {whole / n / 1e12:.3g} TFLOP, forward and backward: "
            + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()),
            f"a micro-batch  of up to {load.tokens:,} tokens and {load.crops} crops; expected peak on each of "
            f"{self.world_size} devices:",
        ]
        for kind in CHECKPOINTING:
            again = self.costs[kind].flops(total, again=True) / whole
            lines.append(f"  {SPOKEN[kind]:24} {self.memory(load, kind)}, {again:.2f} x the FLOPs")
        lines.append(f"an epoch       at {ASSUMED_MFU:.0%} of the devices' peak, an assumption:")
        gpus = GPUS
        if torch.cuda.is_available():
            gpus = {torch.cuda.get_device_name(): device_memory() / USABLE / 2**30}
        for name, gib in gpus.items():
            kind = self.least_checkpointing(load, USABLE * gib * 2**30)
            line = f"  {name:24} "
            if kind is None:
                lines.append(f"{line}does not fit")
                continue
            rate = self.examples_per_second(kind, published_peak(name) or peak_flops(torch.half)[0])
            line += f"{SPOKEN[kind]}: {_time(n / rate)}, {rate:.3g} examples/s"
            lines.append(line + (f"; {_time(n / rate * epochs)} for {epochs:g} epochs" if epochs != 1 else ""))
        return "\n".join(lines)


class Plan(NamedTuple):
    """How a run goes about its memory: tokens of a micro-batch (None: a number of examples), activation checkpointing
    ("none", "decoder" or "all"), the largest micro-batch, the expected memory with it, and how much there is."""

    tokens: int | None
    checkpointing: str
    load: Load
    memory: Memory
    budget: float

    def __str__(self):
        fit = f"expected peak memory {self.memory.peak / 2**30:.1f} of {self.budget / 2**30:.1f} GiB a process"
        if self.memory.peak > self.budget:
            fit += ": MAY NOT FIT"
        return f"{SPOKEN[self.checkpointing]}; {fit}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
