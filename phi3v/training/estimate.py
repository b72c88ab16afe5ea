"""What a training run will take on each device: memory, FLOPs and time, computed before any weights are loaded."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..deepspeed_config import offload_device, zero_stage
from .activation_checkpointing import DESCRIPTIONS, KINDS
from .costs import Costs
from .hardware import held_memory
from .peak import peak_bytes
from .workload import Workload, workload_of_example

GPU_CONTEXT = 1.0 * 2**30  # bytes that the driver's context, cuBLAS and NCCL take on a GPU
GPU_FRAGMENTATION = 0.05  # share of the tensors' memory that the allocator cannot use, in gaps between them
UNMEASURED_SHARE = 0.85  # of the memory that is planned with, where micro-batches are filled and can't be measured
ADAM_BYTES = 8.0  # of a parameter's two moments, in fp32
ENOUGH_TOKENS = 8192  # in a micro-batch; more tokens than that make training hardly faster
ASSUMED_MFU = 0.4
# Bytes of a parameter: 4 bits; 64 parameters share a scale of 8 bits, and 256 of these scales share one of 32 bits.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    weights, gradients, optimizer: what stays during the whole training.
    passes: the most that the forward and backward pass take in addition to these: activations and buffers.
    update: what the optimizer's step takes in addition to them, when the two passes are over.
    context: what the GPU's libraries and its allocator take.
    """

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
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "forward and backward": self.passes,
            "optimizer step": self.update,
            "GPU libraries": self.context,
        }
        listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
        return f"{self.peak / 2**30:.2f} GiB ({listed})"


class Estimate:
    """What training on some examples will take on each of `world_size` devices.

    model: a Phi3VForCausalLM, or a PeftModel around one; may be on the meta device.
    sizes: the `Size` of each example.
    compute_bytes: size of a number in a matrix product.
    deepspeed: the content of DeepSpeed's json; None for DistributedDataParallel, or for a single process.
    not_quantized: if linear layers are kept in NF4, patterns for the names of those that are not; else None.
    on_gpu: whether to add what a GPU's libraries and its allocator take.
    correction: the factor by which a measured micro-batch takes more than is expected without it; at least 1.
    moment_bytes: what the optimizer keeps for each parameter, without fp32 weights; by default as much as Adam.
    """

    def __init__(
        self, model, sizes: list, world_size: int, compute_bytes: int, deepspeed: dict | None = None,
        not_quantized: list[str] | None = None, on_gpu: bool = True,
    ):  # fmt: skip
        self.sizes, self.world_size, self.deepspeed, self.on_gpu = sizes, world_size, deepspeed or {}, on_gpu
        stream_bytes = next(p for name, p in model.named_parameters() if "embed_tokens" in name).element_size()
        eager = model.config._attn_implementation == "eager"
        self.costs = {kind: Costs(model, kind, stream_bytes, compute_bytes, eager) for kind in KINDS}
        self.stream_bytes, self.compute_bytes = stream_bytes, compute_bytes
        self.correction, self.moment_bytes = 1.0, ADAM_BYTES
        self._count_parameters(model, not_quantized)

    def _count_parameters(self, model, not_quantized: list[str] | None):
        self.trained = self.frozen = self.four_bit = 0
        # Parameters of the largest module, which are gathered together, and of the largest that is dequantised.
        self.largest = self.largest_four_bit = 0
        for module_name, module in model.named_modules():
            quantized = not_quantized is not None and isinstance(module, torch.nn.Linear) and "lora_" not in module_name
            quantized = quantized and not any(re.search(pattern, module_name) for pattern in not_quantized)
            in_module = 0
            for p in module.parameters(recurse=False):
                n = getattr(p, "ds_numel", p.numel())
                in_module += n
                if quantized:
                    self.four_bit += n
                    self.largest_four_bit = max(self.largest_four_bit, n)
                elif p.requires_grad:
                    self.trained += n
                else:
                    self.frozen += n
            self.largest = max(self.largest, in_module)

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen + self.four_bit

    def passes(self, workload: Workload, checkpointing: str) -> float:
        """Bytes that the two passes of a micro-batch are expected to take, before `correction`, without gradients and
        without the buffers of DeepSpeed."""
        return peak_bytes(self.costs[checkpointing], workload, self.largest_four_bit * self.compute_bytes)

    def memory(self, workload: Workload, checkpointing: str) -> Memory:
        """Expected memory of a process whose micro-batches are at most as large as `workload`."""
        parts = self._parts(self.correction * self.passes(workload, checkpointing))
        context = GPU_CONTEXT + GPU_FRAGMENTATION * sum(parts[:4]) if self.on_gpu else 0.0
        return Memory(*parts, context)

    def standing(self) -> tuple[float, float, float]:
        """Bytes of weights, gradients and optimizer states: a process holds these whatever its micro-batches are."""
        return self._parts(passes=0.0)[:3]

    def _parts(self, passes: float) -> tuple[float, ...]:
        """All numbers of `Memory` but the context. passes: bytes of activations and dequantised weights."""
        weights = self.four_bit * NF4_BYTES + self.frozen * self.stream_bytes
        return self._with_deepspeed(weights, passes) if self.deepspeed else self._without_deepspeed(weights, passes)

    def _without_deepspeed(self, weights: float, passes: float) -> tuple[float, ...]:
        """The same without DeepSpeed. The trained weights are in fp32. weights: bytes of the frozen ones."""
        # DistributedDataParallel has a second copy of the gradients, in buckets. On a CPU accelerate wraps it around a
        # single process too.
        gradients = self.trained * 4 * (2 if self.world_size > 1 or not self.on_gpu else 1)
        return weights + self.trained * 4, gradients, self.trained * self.moment_bytes, passes, 0.0

    def _with_deepspeed(self, weights: float, passes: float) -> tuple[float, ...]:
        """The same with DeepSpeed, as version 0.19 allocates memory."""
        zero, size = self.deepspeed.get("zero_optimization", {}), self.stream_bytes
        stage, share = zero_stage(self.deepspeed), self.trained / self.world_size
        weights += self.trained * size
        offloaded = self.on_gpu and offload_device(self.deepspeed, "optimizer")
        optimizer = 0.0 if offloaded else share * (4 + self.moment_bytes)  # with fp32 weights
        gradients = share * size if stage >= 2 else self.trained * size
        if offloaded and stage >= 2:
            gradients = self.largest * size  # they go to the host one after the other
        bucket = zero.get("reduce_bucket_size", 5e8)
        bucket = self.costs["none"].width ** 2 if bucket == "auto" else bucket  # what the Trainer fills in
        buckets = bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1)
        # A CPU gives memory only to the part of a bucket that is written to.
        passes += (buckets if self.on_gpu else min(buckets, self.trained)) * size
        if stage in (1, 2) and not offloaded and self.trained > bucket:
            # ZeRO-2: gradients of one micro-batch, before they are added to those of earlier ones. ZeRO-1: this rank's
            # part of the reduced gradients, beside its own whole gradients.
            passes += share * size
        stepped = share  # parameters that the optimizer updates at once
        if stage == 3:
            weights = 0.0 if self.on_gpu and offload_device(self.deepspeed, "param") else weights / self.world_size
            gathered = max(zero.get("stage3_max_live_parameters", 1e9), 2 * self.largest)
            passes += min(gathered, self.trained + self.frozen) * size
            stepped = min(share, zero.get("sub_group_size", 1e9))
        # The gradients are joined in one tensor and then converted to fp32.
        update = 0.0 if offloaded else stepped * (size + 4 if size < 4 else 4)
        return weights, gradients, optimizer, passes, update

    def saved_bytes(self, adapters_only: bool) -> tuple[float, float]:
        """Room on the disk: for the saved model, and for a checkpoint, which also has the optimizer's state."""
        if adapters_only:
            return self.trained * 4, self.trained * 12
        whole = (self.trained + self.frozen) * self.stream_bytes
        return whole, whole + self.trained * (12 if self.deepspeed else 8)

    def workload_of_examples(self, sizes: Iterable) -> Workload:
        """These examples in one micro-batch, if they share no image."""
        one, *others = (workload_of_example(s.tokens, s.crops, s.targets) for s in sizes)
        return sum(others, start=one)

    def largest_workload(self, examples: int) -> Workload:
        """The most that a micro-batch of so many examples can contain."""
        return self.workload_of_examples(sorted(self.sizes, key=lambda s: (-s.tokens, -s.crops))[:examples])

    def workload_of_tokens(self, tokens: int) -> Workload:
        """A micro-batch filled up to `tokens` with examples like the one that has the most crops for each token."""
        densest = self._densest
        one = workload_of_example(densest.tokens, densest.crops, densest.targets)
        return Workload(*(math.ceil(value * tokens / densest.tokens) for value in vars(one).values()))

    @cached_property
    def _densest(self):
        """The example that has the most crops for each token, looked for once among what may be millions."""
        return max(self.sizes, key=lambda s: (s.crops / s.tokens, s.targets))

    def least_checkpointing(self, workload: Workload, budget: float) -> str | None:
        """The kind that recomputes least of those with which `workload` fits into `budget` bytes; None if none does."""
        return next((kind for kind in KINDS if self.memory(workload, kind).peak <= budget), None)

    @property
    def is_measurable(self) -> bool:
        """Whether a micro-batch can be measured before training: on a GPU, unless ZeRO-3 has divided the weights."""
        return self.on_gpu and zero_stage(self.deepspeed) < 3

    def plan_to_fill(self, batch_size: int, tokens: int | str, checkpointing: str | None, budget: float) -> "Plan":
        """As `plan`, but less memory is planned with if that suffices, where nothing can be measured on a GPU."""
        if self.on_gpu and not self.is_measurable:
            careful = self.plan(batch_size, 1, tokens, checkpointing, UNMEASURED_SHARE * budget)
            if careful.memory.peak <= careful.budget:
                return careful
        return self.plan(batch_size, 1, tokens, checkpointing, budget)

    def plan(
        self, batch_size: int, examples: int, tokens: int | str | None, checkpointing: str | None, budget: float
    ) -> "Plan":
        """How to train within `budget` bytes.

        batch_size: examples in an optimizer step, of all processes.
        examples: in a micro-batch, if `tokens` is None.
        tokens: the most that a micro-batch has; "auto" for as many as fit.
        checkpointing: the kind of activation checkpointing; None for the least with which the micro-batch fits.

        "auto" prefers less checkpointing to larger micro-batches once these have ENOUGH_TOKENS: more tokens than that
        save less time than computing activations twice costs.
        """
        longest = max(s.tokens for s in self.sizes)
        if tokens == "auto":
            share = math.ceil(batch_size / self.world_size) * longest
            for kind in [checkpointing] if checkpointing else KINDS:
                most = self._most_tokens(range(longest, max(share, longest) + 256, 256), kind, budget)
                if most and (kind == "all" or most >= min(ENOUGH_TOKENS, share)):
                    break
            tokens = most or longest
        workload = self.workload_of_tokens(max(tokens, longest)) if tokens else self.largest_workload(examples)
        kind = checkpointing or self.least_checkpointing(workload, budget) or "all"
        return Plan(tokens, kind, workload, self.memory(workload, kind), budget, held_memory())

    def _most_tokens(self, candidates: range, kind: str, budget: float) -> int | None:
        """The largest of these numbers of tokens that fits; None if none does. Each is looked at, because with eager
        attention more tokens can take a little less memory."""
        return next((n for n in reversed(candidates) if self._fits(n, kind, budget)), None)

    def _fits(self, tokens: int, kind: str, budget: float) -> bool:
        return self.memory(self.workload_of_tokens(tokens), kind).peak <= budget

    def flops_per_example(self, checkpointing: str) -> float:
        """FLOPs of an example of mean size, with what activation checkpointing computes again."""
        total = self.workload_of_examples(self.sizes)
        return self.costs[checkpointing].flops(total, with_recomputation=True) / len(self.sizes)

    def examples_per_second(self, checkpointing: str, peak: float) -> float:
        """Speed of all devices together, if each computes at ASSUMED_MFU of `peak` FLOP/s."""
        return ASSUMED_MFU * peak * self.world_size / self.flops_per_example(checkpointing)


class Plan(NamedTuple):
    """How a run will use its memory.

    tokens: the most that a micro-batch has; None if micro-batches have a fixed number of examples.
    checkpointing: the kind of activation checkpointing, one of `activation_checkpointing.KINDS`.
    workload: the largest micro-batch that can come.
    memory: what is expected with that one.
    budget: bytes that each process can have.
    held: bytes that the process holds already, before it has a model.
    """

    tokens: int | None
    checkpointing: str
    workload: Workload
    memory: Memory
    budget: float
    held: float = 0.0

    def __str__(self):
        peak, limit = ((size + self.held) / 2**30 for size in (self.memory.peak, self.budget))
        fit = f"expected peak memory {peak:.1f} of {limit:.1f} GiB a process"
        if self.memory.peak > self.budget:
            fit += ": MAY NOT FIT"
        return f"{DESCRIPTIONS[self.checkpointing]}; {fit}"
