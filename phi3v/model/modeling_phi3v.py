"""Phi-3.5-vision, composed of transformers' Phi-3 decoder and CLIP tower.

Parameters have the names of the Hub's checkpoint, so weights load and save without renaming. Four things are ours:
- the path of images between tower and decoder (merging, separators, projector), which transformers does not have;
- rotary factors that are chosen for each example, so that its result does not depend on the batch that it is in;
- attention within the examples of a packed row, so that training computes no padding;
- a loss that computes logits only for supervised tokens, because logits of all tokens would take gigabytes.
Training on packed rows never makes the host wait for the device.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, eager_attention_forward
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3MLP,
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
)
from transformers.utils import logging

from ..files import let_others_read
from ..hub import INDEX
from . import weights
from .attention import packed_attention
from .configuration_phi3v import Phi3VConfig
from .functional import QuickGELU, cross_entropy, project_to_heads, rotate, swiglu
from .fused import is_worth_fusing
from .image_processing_phi3v import crops_of_tiles, num_image_tokens
from .norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .packing import IGNORE_INDEX, Packing

logger = logging.get_logger(__name__)

# The Hub's generation config stops at </s>, which the model never writes. The model ends a turn with <|end|> (32007)
# and a conversation with <|endoftext|> (32000).
_SHIPPED_EOS_ID = 2
_STOP_IDS = [32007, 32000]


class Phi3VRotaryEmbedding(nn.Module):
    """cos and sin of LongRoPE ("su"). Only examples longer than the original length take the long factors.

    Frequencies are `1 / (factor * theta^(2i/d))`. cos and sin are multiplied by sqrt(1 + ln(s) / ln(L)), where L is the
    original length and s = max length / L (LongRoPE, arXiv 2402.13753). Frequencies are plain fp32 tensors and not
    buffers, because `model.to(torch.bfloat16)` would round a buffer.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        rope = config.rope_parameters
        head_dim = config.hidden_size // config.num_attention_heads
        self.rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        self.theta = rope["rope_theta"]
        self.attention_scaling = 1.0
        self.factors = None
        if rope["rope_type"] == "longrope":
            self.original_length = config.original_max_position_embeddings
            self.factors = (rope["short_factor"], rope["long_factor"])
            stretch = config.max_position_embeddings / self.original_length
            if stretch > 1:
                log = torch.log(torch.tensor([stretch, self.original_length], dtype=torch.float64, device="cpu"))
                self.attention_scaling = (1 + log[0] / log[1]).sqrt().item()
        self._inv_freqs = {}

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """(1 or 2, rotary_dim / 2) frequencies: with the short factors and, for LongRoPE, with the long ones."""
        if device not in self._inv_freqs:
            exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
            factors = torch.tensor(self.factors or [[1.0]], dtype=torch.float32, device=device)
            self._inv_freqs[device] = 1.0 / (factors * self.theta**exponent)
        return self._inv_freqs[device]

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, packing: Packing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` (batch, length) → cos, sin (batch, length, rotary_dim) in the dtype of `x`.

        `packing` says which tokens take the long factors. Without it, the highest position of a row decides for it.
        """
        inv_freq = self.inv_freq(x.device)
        freqs = position_ids[..., None].float() * inv_freq[0]
        if self.factors is not None:
            if packing is None:
                is_long = position_ids.amax(-1, keepdim=True) >= self.original_length
            else:
                is_long = packing.is_long()
            if is_long is not None:
                is_long = is_long.to(x.device, non_blocking=True)[..., None]
                freqs = torch.where(is_long, position_ids[..., None].float() * inv_freq[1], freqs)
        freqs = torch.cat((freqs, freqs), dim=-1)
        return (
            (freqs.cos() * self.attention_scaling).to(x.dtype),
            (freqs.sin() * self.attention_scaling).to(x.dtype),
        )


class Phi3VLayerNorm(nn.LayerNorm):
    """As `nn.LayerNorm`, with less memory under autocast on an accelerator.

    before_products: whether nothing but matrix products reads the result. They would each keep a rounded copy of it,
        so it is rounded here, once for all of them.
    """

    def __init__(self, config, before_products: bool):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.before_products = before_products

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None):
        """The norm of x, or with `added` (x + added, its norm)."""
        if added is None:
            return layer_norm(x, self.weight, self.bias, self.eps, self.before_products)
        return add_layer_norm(x, added, self.weight, self.bias, self.eps, self.before_products)


def _norm_of_sum(norm, x, added):
    """(x + added, its norm), where `added` may be None."""
    return (x, norm(x)) if added is None else norm(x, added)


def _sum_or_parts(layer, x, added):
    """What a layer returns, and the next one begins with: (x, added), which the next norm adds in one kernel; or
    (x + added, None), where no function is fused, or where activation checkpointing would keep both parts."""
    fuses = is_worth_fusing(x) and not layer.gradient_checkpointing
    return (x, added) if fuses else (x + added, None)


class Phi3VVisionAttention(CLIPAttention):
    """As `CLIPAttention`, with less memory traffic in the backward pass."""

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **kwargs):
        # (n_crops, heads, tokens, head_dim) each
        query, key, value = project_to_heads(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scale, dropout=dropout, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class Phi3VVisionLayer(CLIPEncoderLayer):
    """As `CLIPEncoderLayer`. Takes and returns the residual stream as `_sum_or_parts` says."""

    def forward(self, hidden_states, added=None):
        hidden, x = _norm_of_sum(self.layer_norm1, hidden_states, added)
        x, _ = self.self_attn(x)
        hidden, x = self.layer_norm2(hidden, x)
        return _sum_or_parts(self, hidden, self.mlp(x))


class _ImageProcessorModule(nn.Module):
    """Holds the tower as `vision_model`, because the Hub's parameter names have this level."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = CLIPVisionModel(config)
        self.vision_model.pre_layrnorm = Phi3VLayerNorm(config, before_products=False)
        for layer in self.vision_model.encoder.layers:
            # Only `forward` differs. A layer of our own would draw other random numbers for its first weights.
            layer.__class__, layer.self_attn.__class__ = Phi3VVisionLayer, Phi3VVisionAttention
            layer.layer_norm1, layer.layer_norm2 = (Phi3VLayerNorm(config, before_products=True) for _ in range(2))


class Phi3VImageEmbedding(nn.Module):
    """Crops → image tokens: CLIP tower, 2x2 merge, separators, projector, and their order in the sequence.

    An image of h x w sub-crops, each of g x g tokens, becomes h*g rows of w*g tokens, with the separator `sub_GN` after
    each row; then the separator `glb_GN`; then the global crop's g rows of g tokens, with `sub_GN` after each row.
    `num_image_tokens` counts them.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.grid = config.crop_tokens_per_side
        self.crop_size = config.vision_config.image_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, 4 * width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        self.img_projection = nn.Sequential(
            nn.Linear(4 * width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.img_processor = _ImageProcessorModule(config.vision_config)
        if config.vision_config.hidden_act == "quick_gelu":
            for layer in self.img_processor.vision_model.encoder.layers:
                layer.mlp.activation_fn = QuickGELU()
        self.freeze_unused()

    def freeze_unused(self):
        """Freezes the tower's last layer and its norm. Features come from the layer before, so these two are in the
        checkpoint but never run. They get no gradient, and an optimizer must not have them, because weight decay would
        shrink them."""
        for module in self.unused_modules():
            module.requires_grad_(False)

    def unused_modules(self) -> tuple[nn.Module, nn.Module]:
        tower = self.img_processor.vision_model
        return tower.encoder.layers[-1], tower.post_layernorm

    def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """Normalised crops (n_crops, 3, S, S) → features of 2x2 merged patches (n_crops * g * g, 4 * width)."""
        tower = self.img_processor.vision_model
        # Without autograd, a frozen tower keeps nothing for the backward pass and activation checkpointing recomputes
        # nothing.
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            hidden, added = tower.pre_layrnorm(tower.embeddings(crops)), None
            for layer in tower.encoder.layers[:-1]:
                hidden, added = layer(hidden, added)
            hidden = hidden if added is None else hidden + added
        patches = hidden[:, 1:].unflatten(1, (self.grid, 2, self.grid, 2))  # (n_crops, g, 2, g, 2, width)
        return patches.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Crops (n_crops, 3, S, S) → (n_crops * g * g + 2, hidden): the tokens of every crop, and then the separators
        `sub_GN` and `glb_GN`. Each separator is projected once, however often it appears in the sequence."""
        return self.img_projection(torch.cat([self.encode_crops(crops), *self._separators()]))

    def _separators(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sub_GN[0, 0], self.glb_GN[0]

    def with_separators(self, features: torch.Tensor) -> torch.Tensor:
        """The output of `forward`, made of its rows for the crops, (n_crops * g * g, hidden), and the separators."""
        return torch.cat([features, self.img_projection(torch.cat(self._separators())).to(features.dtype)])

    def token_sources(
        self, is_image: torch.Tensor, image_sizes: torch.Tensor, n_crops: int, image_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """For every image token of the batch, the row of `forward`'s output that it takes.

        is_image: bool (batch, length), which tokens are image tokens.
        image_sizes: (n_images, 2), padded heights and widths in pixels.
        image_index: (n_appearances,), which image appears where; without it each appears once, in order.
        Returns int64 (batch, length), 0 for other tokens. All shapes follow from the arguments' shapes, so the
        host does not wait for the device.
        """
        g = self.grid
        h, w = (image_sizes // self.crop_size).unbind(-1)  # (n_images,) sub-crops down and across
        first_crop = (h * w + 1).cumsum(0) - (h * w + 1)
        if image_index is not None:
            h, w, first_crop = h[image_index], w[image_index], first_crop[image_index]
        row = w * g + 1  # tokens of a row of sub-crops, with its separator
        sub = h * g * row  # tokens of all sub-crops
        total = sub + 1 + g * (g + 1)
        rank = is_image.flatten().cumsum(0) - 1  # counts image tokens over the whole batch
        image = torch.searchsorted(total.cumsum(0), rank.clamp(min=0), right=True).clamp(max=len(total) - 1)
        t = rank - (total.cumsum(0) - total)[image]  # the token's number within its image
        h, w, row, sub = h[image], w[image], row[image], sub[image]

        in_sub = t < sub
        u = torch.where(in_sub, t, t - sub - 1)  # tokens of the global crop are counted from its first token
        width = torch.where(in_sub, row, g + 1)
        y, x = u // width, u % width
        crop = torch.where(in_sub, 1 + (y // g) * w + x // g, 0)
        source = (first_crop[image] + crop) * (g * g) + (y % g) * g + x % g
        source = torch.where(x == width - 1, n_crops * g * g, source)
        source = torch.where(t == sub, n_crops * g * g + 1, source)
        return torch.where(is_image.flatten(), source, 0).view_as(is_image)


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    """What the classes of the model have in common: initialisation and activation checkpointing."""

    config: Phi3VConfig
    _no_split_modules = ["Phi3VDecoderLayer", "Phi3VVisionLayer"]
    _supports_flex_attn = False
    # Some checkpoints have a second copy of the text embedding in the image embedding.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\."]

    checkpoint_tower = True  # if False, activation checkpointing is used in the decoder alone

    def activation_checkpointing_enable(self, *args, **kwargs):
        super().activation_checkpointing_enable(*args, **kwargs)
        if not self.checkpoint_tower:
            for module in self.modules():
                if isinstance(module, Phi3VVisionLayer):
                    module.gradient_checkpointing = False

    def enable_input_require_grads(self):
        """Does nothing. transformers calls it because reentrant activation checkpointing loses the gradients of layers
        whose inputs need none. Non-reentrant checkpointing does not lose them. With inputs that need gradients, every
        backward pass would go through a frozen tower for nothing."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Phi3VImageEmbedding):
            init.normal_(module.glb_GN, std=self.config.initializer_range)
            init.normal_(module.sub_GN, std=self.config.initializer_range)


class Phi3VAttention(Phi3Attention):
    """With `packing`, attention within the groups of a packed row, which is the only row of the batch. `kept_rows` says
    for which rows attention is computed; without it, for all."""

    def forward(self, hidden_states, position_embeddings, *args, packing=None, kept_rows=None, **kwargs):
        if packing is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        heads = self.config.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads
        query, key, value = rotate(self.qkv_proj(hidden_states), *position_embeddings, heads, self.head_dim)
        if kept_rows is not None:
            query = query[:, kept_rows]
        dropout = self.attention_dropout if self.training else 0.0
        output = packed_attention(self, query, key, value, packing, kept_rows is not None, dropout)
        return self.o_proj(output.flatten(2)), None


class Phi3VRMSNorm(Phi3RMSNorm):
    """As `Phi3RMSNorm`, with less memory for the backward pass."""

    def forward(self, hidden_states: torch.Tensor, added: torch.Tensor | None = None):
        """The norm of `hidden_states`, or with `added` (their sum, its norm)."""
        if added is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return add_rms_norm(hidden_states, added, self.weight, self.variance_epsilon)


class Phi3VMLP(Phi3MLP):
    """As `Phi3MLP`, with less memory for the backward pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.hidden_act != "silu":
            return super().forward(hidden_states)
        return self.down_proj(swiglu(self.gate_up_proj(hidden_states)))


class Phi3VDecoderLayer(Phi3DecoderLayer):
    """As `Phi3DecoderLayer`. With `packing`, takes and returns the residual stream as `_sum_or_parts` says; and with
    `kept_rows` (n_kept,), only these rows are computed after attention, and returned."""

    def __init__(self, config: Phi3VConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = Phi3VAttention(config, layer_idx)
        self.mlp = Phi3VMLP(config)
        self.input_layernorm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, *args, packing=None, added=None, kept_rows=None, **kwargs):
        if packing is None:
            return super().forward(hidden_states, *args, **kwargs)
        hidden, x = _norm_of_sum(self.input_layernorm, hidden_states, added)
        x, _ = self.self_attn(x, packing=packing, kept_rows=kept_rows, **kwargs)
        if kept_rows is not None:
            hidden = hidden[:, kept_rows]
        hidden, x = self.post_attention_layernorm(hidden, self.resid_attn_dropout(x))
        return _sum_or_parts(self, hidden, self.resid_mlp_dropout(self.mlp(x)))


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """The model without its head. Where `input_ids` are negative, image tokens take the place of text embeddings."""

    def __init__(self, config: Phi3VConfig):
        Phi3PreTrainedModel.__init__(self, config)  # Phi3Model.__init__ would build its own layers
        if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
            raise ValueError(f"pad_token_id is {config.pad_token_id}, must be below vocab_size {config.vocab_size}")
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Phi3VDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def embed(
        self,
        input_ids,
        pixel_values=None,
        image_sizes=None,
        tiles=None,
        features=None,
        image_index=None,
        packing=None,
    ) -> torch.Tensor:
        """Token embeddings (batch, length, hidden), image tokens filled from the images in order of appearance.

        The images are given in one of three forms, as `Phi3VForCausalLM.forward` describes them: `pixel_values`, or
        with `packing` `tiles` or `features`. Raises ValueError if several forms are given, or if images and image
        tokens do not match. The latter is checked on a CPU alone, because it would make the host wait for a GPU.
        """
        given = [images for images in (pixel_values, tiles, features) if images is not None]
        if len(given) > 1:
            raise ValueError("give pixel_values, tiles or features: only one of them")
        if tiles is not None and packing is None:
            raise ValueError("tiles need packing, which knows how they make up the images")
        embeds = self.embed_tokens(input_ids.clamp(min=0))
        vision = self.vision_embed_tokens
        is_image = input_ids < 0
        if not given or len(given[0]) == 0:
            if input_ids.device.type == "cpu" and is_image.any():
                raise ValueError("input_ids hold image tokens, but no images were given")
            if not self._needs_vision_graph():
                return embeds
            blank = embeds.new_zeros(1, 3, vision.crop_size, vision.crop_size)
            sizes = is_image.new_full((1, 2), vision.crop_size, dtype=torch.long)
            return self._fill_in(embeds, is_image, vision(blank), sizes)
        if image_sizes is None:
            raise ValueError("images need image_sizes, the padded (height, width) of each of them")
        image_sizes = image_sizes.to(input_ids.device)
        h, w = (image_sizes // vision.crop_size).unbind(-1)
        crops_per_image = h * w + 1
        if features is not None:
            features = features.to(device=embeds.device, dtype=embeds.dtype)
            n_crops = len(features) // vision.grid**2
        else:
            if tiles is not None:
                tiles = tiles.to(embeds.device)
                crops = crops_of_tiles(tiles, packing.grids, packing.mean, packing.std, embeds.dtype)
            else:
                crops = _real_crops(pixel_values, crops_per_image).to(device=embeds.device, dtype=embeds.dtype)
            n_crops = len(crops)
        if input_ids.device.type == "cpu":
            appearing = image_sizes if image_index is None else image_sizes[image_index]
            self._check_images(is_image, appearing, crops_per_image, n_crops)
        table = vision(crops) if features is None else vision.with_separators(features)
        return self._fill_in(embeds, is_image, table, image_sizes, image_index)

    def _fill_in(self, embeds, is_image, table, image_sizes, image_index=None) -> torch.Tensor:
        """`embeds` with image tokens where `is_image` is True. table: the output of `Phi3VImageEmbedding.forward`."""
        n_crops = (len(table) - 2) // self.vision_embed_tokens.grid**2
        source = self.vision_embed_tokens.token_sources(is_image, image_sizes, n_crops, image_index)
        return torch.where(is_image[..., None], table.to(embeds.dtype)[source], embeds)

    def _needs_vision_graph(self) -> bool:
        """Whether a micro-batch without images must still go through the vision part, with a blank crop.

        The micro-batches of other ranks may have images. DDP waits for a gradient of every trainable parameter. ZeRO-2
        collects gradients in the order in which the backward pass computes them: if this order differs between ranks,
        it silently adds up gradients of different parameters. The same graph on every rank gives the same order.
        With a frozen language model, a loss would have no gradient at all.
        """
        if is_deepspeed_zero3_enabled():  # all ranks gather parameters module by module, in evaluation too
            return dist.is_initialized()
        if not (self.training and torch.is_grad_enabled()):
            return False
        vision = any(p.requires_grad for p in self.vision_embed_tokens.parameters())
        return vision and (dist.is_initialized() or not any(p.requires_grad for p in self.layers.parameters()))

    def _check_images(self, is_image, image_sizes, crops_per_image, n_crops):
        """Raises ValueError if the numbers of image tokens and of crops are not those that the sizes need.

        image_sizes: of every appearance of an image; crops_per_image: of every image.
        """
        h, w = (image_sizes // self.vision_embed_tokens.crop_size).unbind(-1)
        expected = num_image_tokens(h, w, self.vision_embed_tokens.grid).sum().item()
        if (found := is_image.sum().item()) != expected:
            raise ValueError(
                f"input_ids hold {found} image tokens, but image_sizes {image_sizes.tolist()} make {expected}"
            )
        if n_crops != (needed := crops_per_image.sum().item()):
            raise ValueError(f"the images have {n_crops} crops, but image_sizes {image_sizes.tolist()} need {needed}")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        pixel_values=None,
        image_sizes=None,
        tiles=None,
        features=None,
        image_index=None,
        packing=None,
        **kwargs,
    ):
        """As `Phi3Model.forward`, with images and `packing` as in `Phi3VForCausalLM.forward`. With `packing`, the last
        hidden states are only those of its `kept_rows`."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes, tiles, features, image_index, packing)
        if packing is not None:
            return self._forward_packed(inputs_embeds, position_ids, packing)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Positions count real tokens only, so that padding has no influence on the choice of rotary factors.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _forward_packed(self, hidden, position_ids, packing: Packing) -> BaseModelOutputWithPast:
        rotary = self.rotary_emb(hidden, position_ids, packing)
        kept_rows, added = packing.kept_rows.to(hidden.device, non_blocking=True), None
        for layer in self.layers:
            kept = kept_rows if layer is self.layers[-1] else None
            hidden, added = layer(hidden, added=added, position_embeddings=rotary, packing=packing, kept_rows=kept)
        return BaseModelOutputWithPast(last_hidden_state=_norm_of_sum(self.norm, hidden, added)[1])


def _real_crops(pixel_values: torch.Tensor, crops_per_image: torch.Tensor) -> torch.Tensor:
    """(n_crops, 3, S, S) without the padding of the official layout, where every image has room for the same number."""
    if pixel_values.dim() == 4:
        return pixel_values
    if len(pixel_values) != len(crops_per_image):
        raise ValueError(f"{len(pixel_values)} images in pixel_values, but {len(crops_per_image)} in image_sizes")
    is_real = torch.arange(pixel_values.shape[1], device=crops_per_image.device) < crops_per_image[:, None]
    return pixel_values[is_real.to(pixel_values.device)]


class GrowingLayer(DynamicLayer):
    """A layer of the cache of keys and values that has room for further tokens. `DynamicLayer` copies its whole content
    for every new token, which takes a third of the time when eight answers are generated together."""

    room = 64  # tokens; more would take much memory for large batches of long prompts

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last, self.buffers = None, ()

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        # If something else has changed the cache, such as beam search, self.keys is another tensor.
        if self.keys is not self.last or new > self.buffers[0].shape[-2]:
            shape = (*key_states.shape[:2], new + self.room)
            self.buffers = tuple(x.new_empty(*shape, x.shape[-1]) for x in (key_states, value_states))
            for buffer, held in zip(self.buffers, (self.keys, self.values), strict=True):
                if old:
                    buffer[:, :, :old] = held
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        self.last = self.keys
        return self.keys, self.values


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """Phi-3.5-vision with its language-model head."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._correct_stop_ids()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.model.vision_embed_tokens.freeze_unused()  # loading makes every parameter trainable
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers' own, with the parameter names of this class, which are the Hub's. By default, transformers
        would rename parameters under ZeRO-3 by its rules for a bare CLIP model, and the names would be wrong.

        A large model is saved in shards. If the folder holds a model already, nothing of its weights is left: the old
        index goes first, so that what was killed in between is no mixture of both models."""
        folder, is_main = Path(save_directory), kwargs.get("is_main_process", True)
        if is_main:
            (folder / INDEX).unlink(missing_ok=True)
        options = {"save_original_format": False, "max_shard_size": weights.SHARD_SIZE} | kwargs
        super().save_pretrained(save_directory, **options)
        if is_main:
            if (folder / INDEX).exists():
                (folder / "model.safetensors").unlink(missing_ok=True)
            let_others_read(save_directory)

    def _correct_stop_ids(self):
        """Replaces the Hub's stop token, but not one that a user has set."""
        for settings in (self.generation_config, self.config):
            if settings.eos_token_id in (_SHIPPED_EOS_ID, [_SHIPPED_EOS_ID]):
                if self.config.vocab_size > max(_STOP_IDS):
                    settings.eos_token_id = list(_STOP_IDS)

    def adjust_generation_fn(self, *args, **kwargs):
        try:
            super().adjust_generation_fn(*args, **kwargs)
        except Exception as e:  # a stranger's generation_config.json can hold anything
            logger.warning(f"generation_config.json can't be used ({' '.join(str(e).split())[:200]!r})")
        self._correct_stop_ids()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        tiles: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        packing: Packing | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """The loss of next-token prediction, or logits.

        input_ids: (batch, length). Image tokens are negative, and images come in the order of `pixel_values`.
        attention_mask: (batch, length), 0 for padding, which may be on either side.
        labels: (batch, length), -100 for tokens that are not supervised. With labels, only the loss is computed, from
            the logits of supervised tokens; `logits` is None.
        pixel_values: (n_images, 1 + max_crops, 3, S, S) in the official layout, where `image_sizes` tell which crops
            are real; or (n_crops, 3, S, S), the real crops alone. Each image's global crop comes first.
        image_sizes: (n_images, 2), the height and width of each image in pixels, resized and padded.
        num_items_in_batch: the number of supervised tokens of the whole optimizer step. The loss is the sum over tokens
            divided by it, so that the division into micro-batches and ranks makes no difference. Without it, the loss
            is the mean over tokens.
        logits_to_keep: as in transformers, for how many of the last positions logits are computed (0: all), or for
            which.
        packing: the structure of a packed row, `input_ids` and `position_ids` (1, length), made by `PackingCollator`.
            The arguments below are for such rows.
        tiles: uint8 (n_tiles, S, S, 3), the sub-crops of all images, in place of `pixel_values`.
        features: (n_crops * g * g, hidden), what the vision part computed earlier for all crops, in place of
            `pixel_values`.
        image_index: (n_appearances,), which image appears where; without it each appears once, in order.
        shift_labels: (n_targets,), the target of each of `packing.label_rows`; `labels` is ignored.
        Raises ValueError if images and image tokens do not match.
        """
        supervised = None
        if packing is not None:
            targets, supervised = shift_labels, packing.label_rows.to(shift_labels.device, non_blocking=True)
        elif labels is not None:
            # The host waits here for the number of supervised tokens. Before the decoder runs, the wait is short.
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
            supervised = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
            targets = targets[supervised]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            tiles=tiles,
            features=features,
            image_index=image_index,
            packing=packing,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss, logits = None, None
        if supervised is None:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        else:
            divisor = len(supervised) if num_items_in_batch is None else num_items_in_batch
            divisor = divisor.clamp(min=1) if torch.is_tensor(divisor) else max(divisor, 1)
            loss = cross_entropy(hidden.flatten(0, 1)[supervised], targets, divisor, self.lm_head)
        rest = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))  # named so before transformers 5.24
        if type(cache) is DynamicCache and not cache.get_seq_length():
            window = self.config.sliding_window  # the published one is wider than the longest example
            if window is None or window >= self.config.max_position_embeddings:
                cache.layers = [GrowingLayer() for _ in cache.layers]

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """Drops the cache when an example outgrows the original length. Its cached keys were rotated with the short
        factors; without the cache, the whole example is computed again with the long factors."""
        limit = self.model.rotary_emb.original_length if self.model.rotary_emb.factors else None
        cache = "cache" if "cache" in kwargs else "past_key_values"  # named so before transformers 5.24
        if limit and input_ids.shape[1] > limit and kwargs.get(cache) is not None and kwargs[cache].get_seq_length():
            lengths = input_ids.shape[1] if attention_mask is None else attention_mask.sum(-1)
            if torch.as_tensor(lengths == limit + 1).any():
                kwargs.update({cache: None, "next_sequence_length": None, "is_first_iteration": True})
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
