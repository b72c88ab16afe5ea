"""What a training costs: FLOPs and memory, from the model and its configuration, and how fast it goes.

All of it is computed from the modules of a model, which may be on the meta device: their sizes, and which of their
parameters train. A multiplication with an addition counts as two FLOPs, and matrix products alone are counted.
"""

import contextlib
import functools
import math
import operator
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate.utils import gather_object

from ..model.functional import LOSS_CHUNK
from ..model.packing import Group, Packing
from ..ranks import local_world_size

# Peak dense FLOP/s in half precision with sums in fp32, as NVIDIA publishes them (V100, T4 and RTX 8000: fp16). The
# first name that is a word of a device's own counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 155e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 8000": 130e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# What a GPU needs beside tensors: the driver's context, cuBLAS and NCCL. And what its allocator can't use in between.
GPU_CONTEXT, GPU_FRAGMENTATION = 1.0 * 2**30, 0.05
USABLE = 0.9  # of a device's memory: what is planned with
CHECKPOINTING = ("none", "decoder", "all")
SPOKEN = {"none": "no checkpointing", "decoder": "checkpointing: decoder", "all": "checkpointing: all"}
ENOUGH_TOKENS = 8192
ASSUMED_MFU = 0.4
# Common GPUs and their GiB, for estimates where there is none. Their names contain one of PEAK_FLOPS'.
GPUS = {
    "RTX 3090 24 GB": 24,
    "RTX 4090 24 GB": 24,
    "V100 32 GB": 32,
    "A100 40 GB": 40,
    "RTX 8000 48 GB": 48,
    "A100 80 GB": 80,
    "H100 80 GB": 80,
    "H200 141 GB": 141,
}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a parameter: 4 bits, 8 more a block of 64, 32 more for 256 of these


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds.

    crops: of all its images, global ones too; tokens: of all its rows; kept: those needed after the last layer's
    attention; targets: supervised tokens; pairs: (query, key) pairs that attend, and last_pairs those of the last
    layer; rows: groups that attend on their own.
    """

    crops: int
    tokens: int
    kept: int
    targets: int
    pairs: int
    last_pairs: int
    groups: int = 1

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def load_of(groups: Iterable[Group], crops: int, targets: int, causal: bool = True) -> Load:
    """What a packed micro-batch holds. Not `causal`: pairs as a kernel computes them that masks them afterwards."""
    groups = tuple(groups)
    pairs = last = 0
    for group in groups:
        n = sum(group.branches)
        own = sum(b * (b + 1) // 2 for b in group.branches) + n * group.length if causal else n * group.size
        hidden = (group.length - group.tail) * (group.length - group.tail + 1) // 2 if group.tail else 0
        common = group.length * (group.length + 1) // 2 if causal else group.length**2
        pairs += common + own
        last += own + (common - hidden if causal and group.tail else group.tail * group.length)
    tokens = sum(group.size for group in groups)
    kept = sum(group.tail + sum(group.branches) for group in groups)
    return Load(crops, tokens, kept, targets, pairs, last, len(groups))


def load_of_packing(packing: Packing, causal: bool = True) -> Load:
    crops = 0 if packing.encoded else sum(h * w + 1 for h, w in packing.grids)
    return load_of(packing.groups, crops, len(packing.label_rows), causal)


def load_of_example(tokens: int, crops: int, targets: int) -> Load:
    return load_of([Group(tokens, tail=min(targets + 1, tokens))], crops, targets)


class Costs:
    """FLOPs and kept bytes of a micro-batch's forward and backward pass.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    checkpointing: "none", "decoder" or "all", what is computed again in the backward pass.
    stream_bytes, compute_bytes: of a number between layers, and of one that a matrix product takes or gives. The
        first is that of the embedding, the second differs from it under autocast.
    eager: attention that keeps its weights.
    """

    def __init__(self, model, checkpointing="none", stream_bytes=2, compute_bytes=2, eager=False):
        self.forward, self.backward, self.again = Counter(), Counter(), Counter()  # FLOPs for one of each unit
        self.kept, self.recomputed = Counter(), Counter()  # bytes; `recomputed` are those of one layer at a time
        self.model = getattr(model, "base_model", model)
        self.model = getattr(self.model, "model", self.model) if hasattr(model, "peft_config") else model
        self.s, self.c, self.eager = stream_bytes, compute_bytes, eager
        self.needs = False  # whether what has been reached needs a gradient
        self.checkpointing = checkpointing
        self._tower()
        self._decoder()

    def _trains(self, *modules) -> bool:
        return any(p.requires_grad for module in modules for p in module.parameters())

    def _product(self, unit, linear, n_in=None, n_out=None, is_last=False):
        """One row through a linear layer with its adapters; `is_last`: of a layer, so that nothing needs its result
        when the layer is computed again."""
        base = getattr(linear, "base_layer", linear)
        n_in, n_out = n_in or base.in_features, n_out or base.out_features
        size, trains = 2 * n_in * n_out, base.weight.requires_grad
        adapters = [(a, linear.lora_B[name]) for name, a in getattr(linear, "lora_A", {}).items()]
        self._count(unit, size, self.needs + trains, again=not is_last or bool(adapters))
        for a, b in adapters:
            self._count(unit, 2 * n_in * a.out_features, self.needs + 1)
            self._count(unit, 2 * b.in_features * n_out, 2, again=not is_last)
            self._keep(unit, b.in_features * self.c)
        return trains or bool(adapters)

    def _count(self, unit, forward, backward_share, again=True):
        self.forward[unit] += forward
        self.backward[unit] += forward * backward_share
        if again and self.recomputing:
            self.again[unit] += forward

    def _keep(self, unit, n_bytes):
        (self.recomputed if self.recomputing else self.kept)[unit] += n_bytes

    def _tower(self):
        vision = self.model.model.vision_embed_tokens
        tower, width = vision.img_processor.vision_model, vision.img_processor.vision_model.config.hidden_size
        config, embeddings = tower.config, tower.embeddings
        self.patches = (config.image_size // config.patch_size) ** 2 + 1  # with the class token
        rows = self.patches
        layers = tower.encoder.layers[:-1]
        with_grad = self._trains(tower)
        self.recomputing = False
        pixels = 3 * config.patch_size**2
        self._count("crop", 2 * (rows - 1) * pixels * width, embeddings.patch_embedding.weight.requires_grad)
        if embeddings.patch_embedding.weight.requires_grad:
            self._keep("crop", 3 * config.image_size**2 * self.s)
        self.needs = self._trains(embeddings)
        if with_grad:
            self._norm("crop", tower.pre_layrnorm, width, rows, statistics=8)
        self.needs |= self._trains(tower.pre_layrnorm)
        self.recomputing = with_grad and self.checkpointing == "all"
        if self.recomputing:
            self.kept["crop"] += len(layers) * rows * width * self.s
        for layer in layers:
            self._attention_layer(
                "patch",
                layer.layer_norm1,
                [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
                layer.self_attn.out_proj,
                layer.layer_norm2,
                layer.mlp.fc1,
                layer.mlp.fc2,
                width,
                config.num_attention_heads,
                statistics=8,
                pairs="crop pair",
                first_kept=with_grad,
            )
        self.tower_layers = len(layers)
        self.recomputing = False
        first, second = vision.img_projection[0], vision.img_projection[2]
        self.needs |= vision.glb_GN.requires_grad or vision.sub_GN.requires_grad
        hidden = getattr(first, "base_layer", first).out_features
        if self._product("projected", first):
            self._keep("projected", 4 * width * self.c)
        self.needs |= self._trains(first)
        if self.needs:
            self._keep("projected", hidden * self.c)
        if self._product("projected", second):
            self._keep("projected", hidden * self.c)
        self.needs |= self._trains(second)

    def _norm(self, unit, norm, width, rows=1, statistics=4):
        if self.needs or self._trains(norm):
            self._keep(unit, rows * (width * self.s + statistics))

    def _attention_layer(
        self, unit, norm1, inputs, output, norm2, up, down, width, heads, statistics, pairs, after=None, first_kept=True
    ):
        """after: the unit of what follows attention, where it differs."""
        after = after or unit
        self._norm(unit, norm1, width, statistics=statistics) if first_kept else None
        self.needs |= self._trains(norm1)
        taken = [self._product(unit, linear) for linear in inputs]
        if any(taken):
            self._keep(unit, width * self.c)
        self.needs |= self._trains(*inputs)
        head_out = sum(getattr(i, "base_layer", i).out_features for i in inputs)
        self._count(pairs, 4 * width, 2 * self.needs)
        if self.needs:
            self._keep(unit, head_out * self.c)
            self._keep(after, width * self.c + 4 * heads)
            if self.eager:
                self._keep(pairs, heads * (4 + self.c + 1))
        if self._product(after, output) and not self.needs:
            self._keep(after, width * self.c)
        self.needs |= self._trains(output)
        self._norm(after, norm2, width, statistics=statistics)
        self.needs |= self._trains(norm2)
        if self._product(after, up):
            self._keep(after, width * self.c)
        self.needs |= self._trains(up)
        up_out, down_in = (getattr(up, "base_layer", up).out_features, getattr(down, "base_layer", down).in_features)
        if self.needs:
            self._keep(after, up_out * self.c)
        if self._product(after, down, is_last=True):
            self._keep(after, down_in * self.c)
        self.needs |= self._trains(down)

    def _decoder(self):
        inner, config = self.model.model, self.model.config
        width, heads = config.hidden_size, config.num_attention_heads
        self.needs |= self._trains(inner.embed_tokens)
        self.recomputing = self.checkpointing != "none"
        self.decoder_layers = len(inner.layers)
        if self.recomputing:
            self.kept["token"] += len(inner.layers) * width * self.s
        for i, layer in enumerate(inner.layers):
            is_last = i == len(inner.layers) - 1
            self._attention_layer(
                "token",
                layer.input_layernorm,
                [layer.self_attn.qkv_proj],
                layer.self_attn.o_proj,
                layer.post_attention_layernorm,
                layer.mlp.gate_up_proj,
                layer.mlp.down_proj,
                width,
                heads,
                statistics=4,
                pairs="last pair" if is_last else "pair",
                after="kept" if is_last else None,
            )
        self.recomputing = False
        self._norm("kept", inner.norm, width)
        self.needs |= self._trains(inner.norm)
        self._product("target", self.model.lm_head)
        self._keep("target", 2 * width * self.s)  # the rows that are projected, and their gradients
        self.vocabulary, self.width = config.vocab_size, width

    def _units(self, load: Load) -> dict[str, int]:
        vision = self.model.model.vision_embed_tokens
        return {
            "crop": load.crops,
            "patch": load.crops * self.patches,
            "crop pair": load.crops * self.patches**2,
            "projected": load.crops * vision.grid**2 + 2 if load.crops else 0,
            "token": load.tokens,
            "kept": load.kept,
            "target": load.targets,
            "pair": load.pairs,
            "last pair": load.last_pairs,
        }

    def _sum(self, rates: Counter, load: Load) -> float:
        units = self._units(load)
        return sum(rate * units[unit] for unit, rate in rates.items())

    def flops(self, load: Load, again: bool = False) -> float:
        """Of the forward and backward pass; `again`: with what activation checkpointing computes a second time."""
        extra = self._sum(self.again, load) if again else 0
        return self._sum(self.forward, load) + self._sum(self.backward, load) + extra

    def flops_by_part(self, load: Load) -> dict[str, float]:
        """FLOPs of the two passes of tower, projector, decoder and head."""
        vision = {"crop", "patch", "crop pair"}
        rates = self.forward + self.backward
        parts = {
            "tower": vision,
            "projector": {"projected"},
            "decoder": {"token", "kept", "pair", "last pair"},
            "head": {"target"},
        }
        return {
            name: self._sum(Counter({u: r for u, r in rates.items() if u in own}), load) for name, own in parts.items()
        }

    def kept_bytes(self, load: Load) -> float:
        """What the forward pass keeps for the backward pass, parameters apart."""
        joined = load.tokens * self.width * self.c * self.decoder_layers if load.groups > 1 and self.needs else 0
        return self._sum(self.kept, load) + (joined if self.checkpointing == "none" else 0)

    def peak_bytes(self, load: Load) -> float:
        """The most that both passes hold at once, parameters and their gradients apart: what is kept, a layer that is
        computed again, the temporaries of one layer, and a chunk of logits with the head's gradient."""
        units = self._units(load)
        again = max(
            sum(self.recomputed[unit] * units[unit] for unit in own) / layers
            for own, layers in ((("patch", "crop pair"), self.tower_layers), (("token", "pair"), self.decoder_layers))
        )
        decoder, tower = self.model.config, self.model.model.vision_embed_tokens.img_processor.vision_model.config
        busy = load.tokens * decoder.intermediate_size * 4 * self.c if self.needs else 0
        if self._trains(self.model.model.vision_embed_tokens):
            busy = max(busy, load.crops * self.patches * tower.intermediate_size * 3 * self.c)
        if self.model.config._attn_implementation == "eager":
            busy += load.pairs // max(load.groups, 1) * decoder.num_attention_heads * 12
        chunk = min(load.targets, LOSS_CHUNK) * self.vocabulary * (2 * self.c + 4)
        if self._trains(self.model.lm_head):
            chunk += self.vocabulary * self.width * self.c * (2 if load.targets > LOSS_CHUNK else 1)
        return self.kept_bytes(load) + max(again + busy, chunk)


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


def published_peak(name: str) -> float | None:
    """FLOP/s in half precision of a GPU that is called so."""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name, re.IGNORECASE)), None)


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, where from) of this process's device: published for a known GPU, measured for anything else."""
    if torch.cuda.is_available() and (peak := published_peak(torch.cuda.get_device_name())):
        return peak, "published"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    n = 8192 if device.type != "cpu" else 1536
    square, best = torch.ones(n, n, dtype=dtype, device=device), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        square @ square
        wait_for_device()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "of a matrix product, measured"


def wait_for_device():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> int:
    """Bytes: the most that tensors have taken on an accelerator, on a CPU the process's largest resident size."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_memory() -> float:
    """Bytes that each process can have, the USABLE share of its GPU's, or its share of what is free on a CPU. The least
    of all ranks, so that all of them plan alike."""
    if torch.cuda.is_available():
        own = torch.cuda.mem_get_info()[0]
    else:
        own = min(psutil.virtual_memory().available, _container_limit()) / local_world_size()
    return USABLE * min(gather_object([own]))


def _container_limit() -> float:
    """Bytes that a control group leaves, as a container has it; infinite without one."""
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        return float("inf") if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return float("inf")


class Meter:
    """Counts what a rank trains on, and says how fast it goes. Never makes the host wait for the device between reads.

    peak: FLOP/s of a rank's device.
    """

    def __init__(self, costs: Costs, peak: float):
        self.costs, self.peak = costs, peak
        self.started = None
        self._clear()

    def _clear(self):
        self.images = self.tokens = self.flops = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def paused(self, is_read: bool):
        """Time that is not counted. The clock starts at the first pause's end, as the first step is like no other.
        `is_read`: the device has to come to an end of what it has been given."""
        if is_read:
            wait_for_device()
        if self.started is None:
            self._clear()
            if torch.accelerator.is_available():
                torch.accelerator.reset_peak_memory_stats()
        else:
            self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def add(self, packing: Packing):
        """A micro-batch, with the images that it encodes."""
        load = load_of_packing(packing)
        self.images += len(packing.grids)
        self.tokens += load.tokens
        self.flops += self.costs.flops(load)

    def read(self) -> dict[str, float]:
        """Of all ranks together since the last reading; memory is the largest rank's. Empty where no whole step has
        been timed. Every rank must call it."""
        totals = [float(self.images), float(self.tokens), float(self.flops), float(peak_memory())]
        ranks = gather_object([totals])
        images, tokens, flops, memory = zip(*ranks, strict=True)
        seconds = self.seconds
        self._clear()
        if not seconds:
            return {}
        return {
            "images_per_second": round(sum(images) / seconds, 2),
            "tokens_per_second": round(sum(tokens) / seconds, 1),
            "mfu": round(sum(flops) / seconds / (self.peak * len(ranks)), 4),
            "peak_memory_gib": round(max(memory) / 2**30, 2),
        }
