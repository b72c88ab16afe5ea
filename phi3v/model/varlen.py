"""Flash attention for packed rows: one call computes all groups of a row, of whatever lengths ("varlen").

There are two kernels, which are named as `attn_implementation` names them:
- "flash_attention_2": of the package flash-attn.
- "varlen": torch's own, which has the same origin. If FlashAttention-3 is installed and the GPU is a Hopper, torch runs
  that in its place.

Both are called as forward and backward pass, below the autograd functions that they come with, so that branches can
share the tokens of their images.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.attention
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from .packing import Packing


class Segments(NamedTuple):
    """Which queries attend to which keys: the queries of each segment to the keys of the same segment.

    query_ends, key_ends: int32 (n_segments + 1,), on the device: the rows at which segments end, after a 0.
    queries, keys: how many there are in all segments.
    most_queries, most_keys: how many there are in the largest segment.
    is_causal: whether the queries are the last of their segment's tokens, and attend to none that come after them.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    queries: int
    keys: int
    most_queries: int
    most_keys: int
    is_causal: bool


class Kernel(NamedTuple):
    """A kernel's two passes. Tensors are (tokens, heads, head_dim), log-sum-exps fp32 (heads, queries).

    forward: (query, key, value, segments, scale) → output, log-sum-exp of the scaled scores.
    backward: (gradient of the output, query, key, value, output, log-sum-exp, segments, scale) → gradients of query,
        key and value.
    lacks: () → what this installation lacks to run it, None if nothing. describe: () → its name and version.
    """

    forward: Callable
    backward: Callable
    lacks: Callable
    describe: Callable


# ---- The package flash-attn (version 2.8.3 was read; 2.7 has the same functions)


def _package_forward(query, key, value, s: Segments, scale):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    ends = s.query_ends, s.key_ends, s.most_queries, s.most_keys
    return _flash_attn_varlen_forward(query, key, value, *ends, 0.0, scale, s.is_causal)[:2]


def _package_backward(grad, query, key, value, output, lse, s: Segments, scale):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    ends = s.query_ends, s.key_ends, s.most_queries, s.most_keys
    deterministic = torch.are_deterministic_algorithms_enabled()
    _flash_attn_varlen_backward(
        *(grad, query, key, value, output, lse, *grads, *ends),
        *(0.0, scale, s.is_causal, -1, -1, 0.0, None, deterministic),  # no window, no soft cap, no slopes
    )
    return grads


def _package_lacks() -> str | None:
    if is_flash_attn_2_available() and is_flash_attn_greater_or_equal("2.7.0"):
        return None
    return "the package flash-attn 2.7 or newer (MAX_JOBS=32 pip install flash-attn --no-build-isolation)"


def _package_describe() -> str:
    return f"flash attention of the package flash-attn {importlib.metadata.version('flash-attn')}"


# ---- torch's own. torch.nn.attention.varlen calls the same operations, and on some GPUs, without causality, those of
# cuDNN; it can choose differently in the two passes. So the operations are called here.


def _torch_forward(query, key, value, s: Segments, scale):
    _flash_attention_3()
    ends = s.query_ends, s.key_ends, s.most_queries, s.most_keys
    no_dropout, no_mask = 0.0, False
    return torch.ops.aten._flash_attention_forward(
        query, key, value, *ends, no_dropout, s.is_causal, no_mask, scale=scale
    )[:2]


def _torch_backward(grad, query, key, value, output, lse, s: Segments, scale):
    ends = s.query_ends, s.key_ends, s.most_queries, s.most_keys
    # Without dropout the kernel reads neither of these.
    random_state, unused = query.new_empty(2, dtype=torch.uint64), query.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, output, lse, *ends, 0.0, s.is_causal, random_state, unused, scale=scale
    )


def _torch_lacks() -> str | None:
    try:
        has_operations = importlib.util.find_spec("torch.nn.attention.varlen") is not None  # torch 2.10 or newer
    except ImportError:
        has_operations = False
    is_built = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()
    return None if has_operations and is_built else "torch 2.10 or newer, built for CUDA"


def _torch_describe() -> str:
    active, problem = _flash_attention_3()
    name = f"flash attention of torch {torch.__version__}"
    if active:
        return f"FlashAttention-3 (flash_attn_interface), through torch {torch.__version__}"
    return f"{name}; FlashAttention-3 is installed and can't be used: {problem}" if problem else name


def _has_flash_attention_3() -> bool:
    """Whether FlashAttention-3 is installed and the GPU is a Hopper, the only one that torch runs it on."""
    if importlib.util.find_spec("flash_attn_interface") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] == 9


@functools.cache
def _flash_attention_3() -> tuple[bool, str]:
    """Puts FlashAttention-3 in the place of torch's kernel, if it is there, from the first use on. Not earlier, because
    torch then also runs it for SDPA attention, where it fails with dropout. Returns whether it runs, and what has gone
    wrong."""
    if not _has_flash_attention_3():
        return False, ""
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError, AttributeError, OSError) as e:
        return False, " ".join(str(e).split())[:200]
    return True, ""


KERNELS = {  # by the names of `attn_implementation`
    "flash_attention_2": Kernel(_package_forward, _package_backward, _package_lacks, _package_describe),
    "varlen": Kernel(_torch_forward, _torch_backward, _torch_lacks, _torch_describe),
}


def kernels_best_first() -> list[str]:
    """The names of KERNELS, the fastest first on this machine, whether it has them or not."""
    return sorted(KERNELS, key=lambda kind: kind == "varlen", reverse=_has_flash_attention_3())


# ---- Attention


class Layout(NamedTuple):
    """How a row is given to a kernel.

    own: what can be computed as ordinary causal examples. Of a group with branches, that is the common part with its
        first branch, and each other branch alone.
    shared: the other branches attend to the common part as well: a segment for each such group, not causal. None if
        there is none.
    query_rows, key_rows: of `shared`, the rows of these queries and keys, as a slice or int64.
    """

    own: Segments
    shared: Segments | None
    query_rows: slice | torch.Tensor | None
    key_rows: slice | torch.Tensor | None


class _Attention(torch.autograd.Function):
    """Queries of `Layout.shared` attend to two sets of keys. Each gives an output and the log-sum-exp of its scores;
    with these the outputs are joined exactly. In the backward pass, each call of the kernel is given the joined output
    and log-sum-exp: so it computes the softmax over all keys, and from it the exact gradients for its own keys. Ring
    attention does the same with the keys of other devices (Liu et al., 2023, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, query, key, value, kernel, layout, scale):
        query, key, value = map(_aligned, (query, key, value))
        output, lse = _run_forward(kernel, query, key, value, layout.own, scale)
        if layout.shared:
            rows, keys = layout.query_rows, layout.key_rows
            more = _run_forward(kernel, query[rows], key[keys], value[keys], layout.shared, scale)
            output[rows], lse[:, rows] = _joined(output[rows], lse[:, rows], *more)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.call = kernel, layout, scale
        return output

    @staticmethod
    def backward(ctx, grad):
        kernel, layout, scale = ctx.call
        query, key, value, output, lse = ctx.saved_tensors
        grad = _aligned(grad)
        grads = kernel.backward(grad, query, key, value, output, lse, layout.own, scale)
        if layout.shared:
            rows, keys = layout.query_rows, layout.key_rows
            states = query[rows], key[keys], value[keys], output[rows], lse[:, rows].contiguous()
            more = kernel.backward(grad[rows], *states, layout.shared, scale)
            for whole, own, part in zip(grads, (rows, keys, keys), more, strict=True):
                whole[own].add_(part) if isinstance(own, slice) else whole.index_add_(0, own, part)
        return *grads, None, None, None


def _joined(output, lse, more, more_lse) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exp over two sets of keys, from those over each; computed in fp32."""
    share = torch.sigmoid(more_lse - lse).T[..., None]  # of the second set in the softmax over both
    return torch.lerp(output.float(), more.float(), share).to(output.dtype), torch.logaddexp(lse, more_lse)


def _run_forward(kernel: Kernel, query, key, value, segments: Segments, scale):
    # Kernels don't compute rows after the last segment: these rows and their gradients would be what was in memory.
    if (len(query), len(key), len(value)) != (segments.queries, segments.keys, segments.keys):
        raise ValueError(
            f"{len(query)} queries, {len(key)} keys and {len(value)} values for segments of {segments.queries} queries "
            f"and {segments.keys} keys"
        )
    return kernel.forward(query, key, value, segments, scale)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) with each head of each token at a multiple of 16 bytes, which the kernels read at once;
    a copy where that is not so. The memory of every tensor begins at such a multiple."""
    per_16_bytes = 16 // x.element_size()
    if x.shape[-1] % per_16_bytes:
        raise ValueError(f"flash attention needs heads of a multiple of {per_16_bytes} numbers, not {x.shape[-1]}")
    steps = (*x.stride()[:2], x.storage_offset())
    if x.stride(-1) == 1 and not any(step % per_16_bytes for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def varlen_attention(kernel: Kernel, query, key, value, packing: Packing, trimmed: bool, scale: float) -> torch.Tensor:
    """Attention within the groups of a packed row, as `attention.packed_attention`, by a kernel of `KERNELS`.

    query: (1, n, heads, head_dim); key, value: (1, length, key heads, head_dim). Under autocast, they are converted to
    its dtype, because the kernels take only half precision. Returns (1, n, heads, head_dim).
    """
    device = query.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layout = packing.cached(("varlen", trimmed), lambda: layout_of(packing, trimmed, device))
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    return _Attention.apply(query, key, value, kernel, layout, scale)[None]


def layout_of(packing: Packing, trimmed: bool, device) -> Layout:
    """`trimmed` as in `attention.packed_attention`."""
    own, shared, query_rows, key_rows, q, k = [], [], [], [], 0, 0
    for group in packing.groups:
        rows = group.tail if trimmed else group.length
        first, *others = group.branches or (0,)
        # The first branch comes right after the common part, so together they are an ordinary causal example.
        own += [(rows + first, group.length + first), *((n, n) for n in others)]
        if others:
            start = q + rows + first
            query_rows.append((start, start + sum(others)))
            key_rows.append((k, k + group.length))
            shared.append((sum(others), group.length))
        q += rows + sum(group.branches)
        k += group.size
    if not shared:
        return Layout(_segments(own, device, is_causal=True), None, None, None)
    rows = (_rows(spans, device) for spans in (query_rows, key_rows))
    return Layout(_segments(own, device, is_causal=True), _segments(shared, device, is_causal=False), *rows)


def _rows(spans: list[tuple[int, int]], device) -> slice | torch.Tensor:
    """An index for the rows from start to end of each span. For one span it is a slice, which copies nothing."""
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(*span) for span in spans]).to(device, non_blocking=True)


def _segments(lengths: list[tuple[int, int]], device, is_causal: bool) -> Segments:
    """lengths: of each segment, how many queries and keys it has."""
    queries, keys = zip(*lengths, strict=True)
    ends = (torch.tensor([0, *own]).cumsum(0).to(torch.int32) for own in (queries, keys))
    ends = (own.to(device, non_blocking=True) for own in ends)
    return Segments(*ends, sum(queries), sum(keys), max(queries), max(keys), is_causal)
