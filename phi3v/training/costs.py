"""FLOPs and memory of one micro-batch's forward and backward pass, computed from the modules of the model.

The model may be on the meta device: only the sizes of its modules count, and which parameters are trained. A
multiplication with the addition that follows it counts as two FLOPs; only matrix products are counted.
"""

from collections import Counter

import bitsandbytes as bnb
from torch import nn

from ..model.adapters import inner_model
from .workload import Workload

# The units in which the costs of each part of the model are counted. A part's own name is what it costs once.
PARTS = {
    "tower": {"tower", "crop", "patch", "patch pair"},
    "projector": {"projector", "projected row"},
    "decoder": {"decoder", "token", "kept token", "pair", "last-layer pair"},
    "head": {"target"},
}


def of_part(part: str, rates: Counter) -> Counter:
    """The rates of one of PARTS."""
    return Counter({unit: rate for unit, rate in rates.items() if unit in PARTS[part]})


def base_of(linear: nn.Module) -> nn.Module:
    """The linear layer itself where LoRA adapters are wrapped around it."""
    return getattr(linear, "base_layer", linear)


class Costs:
    """What a micro-batch costs, as rates (FLOPs or bytes for one token, one patch, …) times quantities.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    checkpointing: the kind of activation checkpointing, one of `activation_checkpointing.KINDS`.
    stream_bytes: size of a number in the residual stream between layers, which has the dtype of the embedding.
    compute_bytes: size of a number that a matrix product reads or writes; differs from `stream_bytes` under autocast.
    eager: whether attention is the eager implementation, which keeps the attention weights.

    The modules are walked once, in the order of the forward pass, and `needs_gradient` says at each point whether the
    tensor that has been reached needs a gradient, because something before it is trained.
    """

    def __init__(self, model, checkpointing="none", stream_bytes=2, compute_bytes=2, eager=False):
        self.model = inner_model(model)
        self.checkpointing, self.eager = checkpointing, eager
        self.stream_bytes, self.compute_bytes = stream_bytes, compute_bytes
        # Rates by unit; `_quantities` has the units.
        self.forward_flops, self.backward_flops, self.recomputed_flops = Counter(), Counter(), Counter()
        self.kept_bytes = Counter()  # from the forward pass to the backward pass
        self.recomputed_bytes = Counter()  # of all layers that are computed again, which exist one layer at a time
        self.rounded_bytes = 0  # of the rounded copies of weights, which autocast makes; all exist in the forward pass
        self.needs_gradient = False
        self.is_recomputed = False  # whether the modules at hand are computed again in the backward pass
        self._tower()
        self._projector()
        self._decoder()

    def _trains(self, *modules) -> bool:
        return any(p.requires_grad for module in modules for p in module.parameters())

    def _count(self, unit, forward, backward_share, is_recomputed=True):
        self.forward_flops[unit] += forward
        self.backward_flops[unit] += forward * backward_share
        if is_recomputed and self.is_recomputed:
            self.recomputed_flops[unit] += forward

    def _keep(self, unit, n_bytes):
        (self.recomputed_bytes if self.is_recomputed else self.kept_bytes)[unit] += n_bytes

    def _round(self, part, *modules):
        """Counts the copies that autocast makes of weights that train, or through which gradients pass. The backward
        pass needs them too, and with activation checkpointing it makes them again.

        part: "tower", "projector" or "decoder". None for weights whose copies the backward pass does not need.
        """
        for p in (p for module in modules for p in module.parameters(recurse=False)):
            if isinstance(p, bnb.nn.Params4bit):  # which autocast leaves as they are
                continue
            if (p.requires_grad or self.needs_gradient) and p.element_size() > self.compute_bytes:
                self.rounded_bytes += p.numel() * self.compute_bytes
                if part:
                    self._keep(part, p.numel() * self.compute_bytes)

    def _linear(self, unit, linear, ends_layer=False) -> bool:
        """Counts one row through a linear layer and its adapters. Returns whether any of its weights train, so that
        its input must be kept.

        ends_layer: this is the layer's last product. Recomputation skips it, because no gradient in the layer needs its
            result.
        """
        base = base_of(linear)
        n_in, n_out, trains = base.in_features, base.out_features, base.weight.requires_grad
        adapters = [(a, linear.lora_B[name]) for name, a in getattr(linear, "lora_A", {}).items()]
        part = next((part for part, units in PARTS.items() if unit in units), None)
        self._round(None if part == "head" else part, base, *(layer for pair in adapters for layer in pair))
        self._count(unit, 2 * n_in * n_out, self.needs_gradient + trains, not ends_layer or bool(adapters))
        for a, b in adapters:
            self._count(unit, 2 * n_in * a.out_features, self.needs_gradient + 1)
            self._count(unit, 2 * b.in_features * n_out, 2, not ends_layer)
            self._keep(unit, b.in_features * self.compute_bytes)
        return trains or bool(adapters)

    def _norm(self, unit, norm, width, statistics, rows=1):
        """statistics: bytes that a norm keeps for each row in addition to the row."""
        if self.needs_gradient or self._trains(norm):
            self._keep(unit, rows * (width * self.stream_bytes + statistics))

    def _tower(self):
        tower = self.model.model.vision_embed_tokens.img_processor.vision_model
        config, patch_embedding = tower.config, tower.embeddings.patch_embedding
        width, layers = config.hidden_size, tower.encoder.layers[:-1]  # the last layer's features are not used
        # A tower that trains in fp32 beside a base in half precision has a residual stream in fp32.
        stream_bytes, self.stream_bytes = self.stream_bytes, tower.embeddings.class_embedding.element_size()
        self.patches = (config.image_size // config.patch_size) ** 2 + 1  # with the class token
        trains_patches = patch_embedding.weight.requires_grad
        self._count("crop", 2 * (self.patches - 1) * 3 * config.patch_size**2 * width, trains_patches)
        if trains_patches:
            self._keep("crop", 3 * config.image_size**2 * self.compute_bytes)
        self._round("tower", patch_embedding)
        self.needs_gradient = self._trains(tower.embeddings)
        self._norm("crop", tower.pre_layrnorm, width, statistics=8, rows=self.patches)
        self.needs_gradient |= self._trains(tower.pre_layrnorm)
        self.is_recomputed = self._trains(tower) and self.checkpointing == "all"
        if self.is_recomputed:
            self.kept_bytes["crop"] += len(layers) * self.patches * width * self.stream_bytes
        for layer in layers:
            attention = layer.self_attn
            _, self.recomputed_tower_layer = self._layer(
                norms=(layer.layer_norm1, layer.layer_norm2),
                projections=[attention.q_proj, attention.k_proj, attention.v_proj],
                output=attention.out_proj,
                up=layer.mlp.fc1,
                down=layer.mlp.fc2,
                width=width,
                heads=config.num_attention_heads,
                statistics=8,  # mean and variance, in fp32
                unit="patch",
                pair_unit="patch pair",
            )
        self.is_recomputed, self.stream_bytes = False, stream_bytes

    def _projector(self):
        vision, row = self.model.model.vision_embed_tokens, "projected row"
        width = vision.img_processor.vision_model.config.hidden_size
        first, second = vision.img_projection[0], vision.img_projection[2]
        self.needs_gradient |= vision.glb_GN.requires_grad or vision.sub_GN.requires_grad
        hidden = base_of(first).out_features
        if self._linear(row, first):
            self._keep(row, 4 * width * self.compute_bytes)
        self.needs_gradient |= self._trains(first)
        if self.needs_gradient:
            self._keep(row, hidden * self.compute_bytes)
        if self._linear(row, second):
            self._keep(row, hidden * self.compute_bytes)
        self.needs_gradient |= self._trains(second)

    def _layer(
        self, norms, projections, output, up, down, width, heads, statistics, unit, pair_unit, unit_after=None
    ):  # fmt: skip
        """A transformer layer.

        projections: what makes queries, keys and values.
        statistics: bytes that a norm keeps for each row.
        unit_after: the unit of all that follows attention, where it differs from `unit`.
        Returns what the layer adds to `kept_bytes` and to `recomputed_bytes`.
        """
        unit_after, size = unit_after or unit, self.compute_bytes
        before = self.kept_bytes.copy(), self.recomputed_bytes.copy()
        self._norm(unit, norms[0], width, statistics)
        self.needs_gradient |= self._trains(norms[0])
        if any([self._linear(unit, linear) for linear in projections]):
            self._keep(unit, width * size)
        self.needs_gradient |= self._trains(*projections)
        self._count(pair_unit, 4 * width, 2 * self.needs_gradient)
        if self.needs_gradient:
            self._keep(unit, sum(base_of(linear).out_features for linear in projections) * size)
            self._keep(unit_after, width * size + 4 * heads)  # the result, and each head's log-sum-exp in fp32
            if self.eager:
                self._keep(pair_unit, heads * (4 + size + 1))  # softmax in fp32, the same rounded, the mask
        if self._linear(unit_after, output) and not self.needs_gradient:
            self._keep(unit_after, width * size)
        self.needs_gradient |= self._trains(output)
        self._norm(unit_after, norms[1], width, statistics)
        self.needs_gradient |= self._trains(norms[1])
        if self._linear(unit_after, up):
            self._keep(unit_after, width * size)
        self.needs_gradient |= self._trains(up)
        if self.needs_gradient:
            self._keep(unit_after, base_of(up).out_features * size)
        if self._linear(unit_after, down, ends_layer=True):
            self._keep(unit_after, base_of(down).in_features * size)
        self.needs_gradient |= self._trains(down)
        return self.kept_bytes - before[0], self.recomputed_bytes - before[1]

    def _decoder(self):
        inner, config = self.model.model, self.model.config
        self.vocabulary, self.width, self.decoder_layers = config.vocab_size, config.hidden_size, len(inner.layers)
        self.needs_gradient |= self._trains(inner.embed_tokens)
        self.is_recomputed = self.checkpointing != "none"
        if self.is_recomputed:
            self.kept_bytes["token"] += self.decoder_layers * self.width * self.stream_bytes
        for i, layer in enumerate(inner.layers):
            is_last = i == self.decoder_layers - 1
            kept, recomputed = self._layer(
                norms=(layer.input_layernorm, layer.post_attention_layernorm),
                projections=[layer.self_attn.qkv_proj],
                output=layer.self_attn.o_proj,
                up=layer.mlp.gate_up_proj,
                down=layer.mlp.down_proj,
                width=self.width,
                heads=config.num_attention_heads,
                statistics=4,  # the root mean square, in fp32
                unit="token",
                pair_unit="last-layer pair" if is_last else "pair",
                unit_after="kept token" if is_last else None,
            )
            if not is_last or i == 0:
                self.recomputed_decoder_layer = recomputed
        self.kept_last_layer = kept  # without its input, because the input's gradient is as large
        self.is_recomputed = False
        self._norm("kept token", inner.norm, self.width, statistics=4)
        self.needs_gradient |= self._trains(inner.norm)
        self._linear("target", self.model.lm_head)
        self._keep("target", 2 * self.width * self.stream_bytes)  # the rows that are projected, and their gradients

    def _quantities(self, workload: Workload) -> dict[str, int]:
        """How much of each unit a micro-batch has."""
        grid = self.model.model.vision_embed_tokens.grid
        return {
            "tower": 1,
            "projector": 1,
            "decoder": 1,
            "crop": workload.crops,
            "patch": workload.crops * self.patches,
            "patch pair": workload.crops * self.patches**2,
            "projected row": workload.crops * grid**2 + 2 if workload.crops else 0,  # with the two separators
            "token": workload.tokens,
            "kept token": workload.kept_tokens,
            "target": workload.targets,
            "pair": workload.pairs,
            "last-layer pair": workload.last_layer_pairs,
        }

    def total(self, rates: Counter, workload: Workload) -> float:
        """Rates times the quantities of a micro-batch."""
        quantities = self._quantities(workload)
        return sum(rate * quantities[unit] for unit, rate in rates.items())

    def flops(self, workload: Workload, with_recomputation: bool = False) -> float:
        """FLOPs of the forward and backward pass.

        with_recomputation: adds what activation checkpointing computes a second time.
        """
        recomputed = self.total(self.recomputed_flops, workload) if with_recomputation else 0
        return self.total(self.forward_flops, workload) + self.total(self.backward_flops, workload) + recomputed

    def flops_by_part(self, workload: Workload) -> dict[str, float]:
        """FLOPs of the forward and backward pass, without recomputation, of each part of the model."""
        rates = self.forward_flops + self.backward_flops
        return {part: self.total(of_part(part, rates), workload) for part in PARTS}

    def activation_bytes(self, workload: Workload) -> float:
        """What the forward pass keeps for the backward pass, without parameters."""
        joined = 0
        by_group = workload.groups > 1 and self.model.config._attn_implementation in ("sdpa", "eager")
        if by_group and self.needs_gradient and self.checkpointing == "none":
            # Attention goes group by group, and then joins the results in a tensor of its own in every layer.
            joined = workload.tokens * self.width * self.compute_bytes * self.decoder_layers
        return self.total(self.kept_bytes, workload) + joined
