"""Attention within the groups of a packed row, on any device.

`varlen.py` has flash attention, for which a row is one call; this module has the two kinds that go group by group.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .packing import Group, Packing
from .varlen import KERNELS, varlen_attention

# transformers computes padded batches and the tower. With "varlen" it does so as with "sdpa".
AttentionInterface.register("varlen", sdpa_attention_forward)
AttentionMaskInterface.register("varlen", sdpa_mask)


def packed_attention(module, query, key, value, packing: Packing, trimmed: bool, dropout: float) -> torch.Tensor:
    """Attention within the groups of a packed row.

    query: (1, n, heads, head_dim) for all tokens, or with `trimmed` only for those of `Packing.kept_rows`.
    key, value: (1, length, key heads, head_dim). Returns (1, n, heads, head_dim).

    Flash attention computes all groups in one call. It has no dropout: with dropout, SDPA attention takes its place.
    Eager and SDPA attention go group by group, so no mask spans two groups: causal attention needs no mask, and
    branches need one of their own tokens by the group's tokens.
    """
    kind = module.config._attn_implementation
    if kind in KERNELS and not dropout:
        return varlen_attention(KERNELS[kind], query, key, value, packing, trimmed, module.scaling)
    attend = _eager if kind == "eager" else _sdpa
    options = {"dropout": dropout, "scaling": module.scaling, "enable_gqa": query.shape[2] != key.shape[2]}
    rows = [group.tail if trimmed else group.length for group in packing.groups]
    parts = [(n, sum(group.branches)) for n, group in zip(rows, packing.groups, strict=True)]
    queries = iter(_split(query, [n for part in parts for n in part if n]))
    keys, values = (_split(x, [group.size for group in packing.groups]) for x in (key, value))
    outputs = []
    for group, n, k, v in zip(packing.groups, rows, keys, values, strict=True):
        if n:
            mask = None
            if n < group.length:
                shape = (n, group.length)
                mask = packing.cached(shape, lambda s=shape: _tail_mask(*s, query.device))
            common = (x[:, :, : group.length] if group.branches else x for x in (k, v))
            outputs.append(attend(next(queries), *common, mask, is_causal=mask is None, **options))
        if group.branches:
            shape = (group.length, group.branches)
            mask = packing.cached(shape, lambda s=shape: _branch_mask(*s, query.device))
            outputs.append(attend(next(queries), k, v, mask, is_causal=False, **options))
    outputs = [output.transpose(1, 2) for output in outputs]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


@torch.enable_grad()
def difference_from_sdpa(config, device: torch.device, dtype: torch.dtype) -> float:
    """How much the attention of `config` and SDPA attention differ on a small packed row, with branches, in the output
    or in a gradient: the largest difference, as a share of the largest number."""
    groups = (Group(40, tail=40), Group(17, branches=(3, 9), tail=17), Group(70, tail=70))
    packing = Packing(groups, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, random = config.hidden_size // heads, torch.Generator().manual_seed(0)
    shapes = [(1, sum(group.size for group in groups), n, head_dim) for n in (heads, key_heads, key_heads, heads)]
    *states, grad = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
    found = []
    for kind in (config._attn_implementation, "sdpa"):
        own = SimpleNamespace(_attn_implementation=kind)
        module = SimpleNamespace(config=own, scaling=head_dim**-0.5)
        leaves = [x.clone().requires_grad_() for x in states]
        output = packed_attention(module, *leaves, packing, trimmed=False, dropout=0.0)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))])
    pairs = zip(*found, strict=True)
    return max(((one.float() - other.float()).abs().max() / other.float().abs().max()).item() for one, other in pairs)


def _split(states: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """(1, sum of lengths, heads, head_dim) → (1, heads, length, head_dim) for each length. Their gradients are joined
    in one step. The gradient of a slice would be a tensor of the whole row's size, for each group."""
    states = states.transpose(1, 2)
    return states.split(lengths, dim=2) if len(lengths) > 1 else (states,)


def _tail_mask(queries: int, keys: int, device) -> torch.Tensor:
    """bool (queries, keys) for the last `queries` of `keys` tokens: each attends to itself and those before it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _branch_mask(common: int, branches: tuple[int, ...], device) -> torch.Tensor:
    """bool (n, common + n) for the n tokens of all branches: each attends to the common part, to itself and to those
    before it in its branch."""
    own = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool, device=device).tril_() for n in branches))
    return torch.cat([own.new_ones(len(own), common), own], dim=1)


def _eager(query, key, value, mask, is_causal, dropout, scaling, enable_gqa):
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if is_causal:
        mask = _tail_mask(query.shape[2], key.shape[2], query.device)
    if query.dtype == torch.float16:  # the product with keys could overflow before it is scaled
        scores = (query * scaling @ key.transpose(2, 3)).float()
    else:
        scores = (query @ key.transpose(2, 3) * scaling).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(query.dtype), dropout) @ value


def _sdpa(query, key, value, mask, is_causal, dropout, scaling, enable_gqa):
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=enable_gqa
    )
