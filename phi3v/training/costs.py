"""What a training costs: FLOPs and memory, from the model and its configuration.

All of it is computed from the modules of a model, which may be on the meta device: their sizes, and which of their
parameters train. A multiplication with an addition counts as two FLOPs, and matrix products alone are counted.
"""

from collections import Counter

from ..model.functional import LOSS_CHUNK
from .workload import Load


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
