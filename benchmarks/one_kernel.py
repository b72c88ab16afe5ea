"""Operations that are one kernel on a GPU, but that torch divides into several on meta tensors, or cannot run there.

`replaced()` replaces them while a `Tracer` counts: rms_norm, scaled_dot_product_attention, `torch.compile`, and the
package flash-attn, which need not be installed. A compiled function counts as one kernel that reads its arguments, and
that writes its results and the arguments that it changes. It must be compiled within `replaced()`.
"""

import contextlib
import functools
import importlib.machinery
import math
import sys
import types
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from tracer import NORM_GRADIENTS, Tracer, size, tensors

ROWS_OF_A_PART = 16  # that torch 2.14's compiler adds up within a kernel that also computes something for each row


@contextlib.contextmanager
def replaced():
    """The context in which the operations are replaced."""
    with contextlib.ExitStack() as stack:
        for target, name, function in (
            (F, "rms_norm", one_kernel("rms_norm", F.rms_norm)),
            (F, "scaled_dot_product_attention", _attend),
            (torch, "compile", _compile),
            (torch, "is_autocast_enabled", lambda *_: False),  # torch raises RuntimeError for meta
            (flash_utils, "is_flash_attn_2_available", lambda *_: True),
            (flash_utils, "_loaded_implementation", None),
        ):
            stack.enter_context(mock.patch.object(target, name, function))
        stack.enter_context(mock.patch.dict(sys.modules, _flash_attn()))
        yield


def _compile(function: Callable | None = None, **options) -> Callable:
    if function is None:  # used as a decorator with options
        return _compile
    return one_kernel(getattr(function, "__name__", "compiled"), function)


def one_kernel(name: str, function: Callable) -> Callable:
    """`function` as one memory-bound kernel. Matrix products and attention within it still count as kernels of their
    own. Without an active tracer it is the function itself."""

    def run(*args, **kwargs):
        if Tracer.active is None:
            return function(*args, **kwargs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors((args, kwargs))):
            return _OneKernel.apply(name, functools.partial(function, **kwargs), *args)
        return _run_as_one(name, function, args, kwargs)

    return functools.update_wrapper(run, function)


def _run_as_one(name: str, function: Callable, args: tuple, kwargs: dict):
    tracer, given = Tracer.active, tensors((args, kwargs))
    versions = [t._version for t in given]
    with tracer.merged():
        out = function(*args, **kwargs)
    changed = [t for t, version in zip(given, versions, strict=True) if t._version != version]
    results = [t for t in tensors(out) if all(t is not c for c in changed)]
    tracer.operations[tracer._place()[1]] += 1
    # A sum over all rows, such as the gradient of a norm's weight, leaves the kernel as sums over some rows each, in
    # fp32. Two more kernels, of which torch's compiler has made the code, add these up and round the result.
    sums = [t for t in results if t.dim() == 1 and any(g.dim() > 1 for g in given)]
    rows = max((g.shape[:-1].numel() for g in given if g.dim() > 1), default=0)
    parts = [-(-rows // ROWS_OF_A_PART) * len(t) * 4 for t in sums]
    tracer.count("memory", name, 0.0, sum(map(size, given + changed + results)) + sum(parts))
    for t, part in zip(sums, parts, strict=True):
        tracer.count("memory", f"{name}_sum", 0.0, part + 4 * len(t))
        tracer.count("memory", f"{name}_sum", 0.0, 4 * len(t) + size(t))
    return out


class _OneKernel(torch.autograd.Function):
    """A function as one kernel, and its gradient as another one, which reads the function's arguments again."""

    @staticmethod
    def forward(ctx, name, function, *args):
        ctx.name = name
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in args))
        return _run_as_one(name, function, args, {})

    @staticmethod
    def backward(ctx, *grads):
        args = ctx.saved_tensors
        found = [torch.empty_like(a) if n else None for a, n in zip(args, ctx.needs_input_grad[2:], strict=True)]
        name = f"{ctx.name}_backward"
        read, written = (sum(map(size, tensors(tree))) for tree in ((grads, args), found))
        Tracer.active.count("memory", name, 0.0, read * (2 if name in NORM_GRADIENTS else 1) + written)
        return None, None, *found


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention with the kernels that it uses on an NVIDIA GPU in half precision: flash attention,
    or with a mask the memory-efficient kernel, which needs a mask of numbers in rows of a multiple of 16."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        zero, least = (torch.full((), x, dtype=query.dtype, device=query.device) for x in (0.0, -math.inf))
        attn_mask = torch.where(attn_mask, zero, least)
    keys = attn_mask.shape[-1]
    attn_mask = F.pad(attn_mask, (0, -keys % 16))[..., :keys] if keys % 16 else attn_mask
    attn_mask = attn_mask.expand(*query.shape[:3], keys)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


_library = torch.library.Library("phi3v_benchmarks", "DEF")
_BOUNDS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal"
_library.define(f"flash_attn(Tensor q, Tensor k, Tensor v, {_BOUNDS}) -> (Tensor, Tensor)")
_library.define(
    f"flash_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_BOUNDS}) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "flash_attn", "Meta")
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, causal):
    *batch, n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(*batch, heads, n, dtype=torch.float32)


@torch.library.impl(_library, "flash_attn_backward", "Meta")
def _(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class _FlashAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *bounds):
        out, lse = torch.ops.phi3v_benchmarks.flash_attn(q, k, v, *bounds)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bounds = bounds
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = torch.ops.phi3v_benchmarks.flash_attn_backward(grad, *ctx.saved_tensors, *ctx.bounds)
        return *grads, None, None, None


def _flash_attn() -> dict[str, types.ModuleType]:
    """The modules of flash-attn, with functions that only count."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **options):
        return _FlashAttn.apply(q, k, v, None, None, causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        return _FlashAttn.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    # The two passes below the autograd functions, as version 2.8 has them.
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, *options
    ):
        return *torch.ops.phi3v_benchmarks.flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, *options,
    ):  # fmt: skip
        bounds = cu_seqlens_q, cu_seqlens_k, causal
        torch.ops.phi3v_benchmarks.flash_attn_backward(dout, q, k, v, out, softmax_lse, *bounds)

    functions = {
        "flash_attn": (flash_attn_func, flash_attn_varlen_func),
        "flash_attn.flash_attn_interface": (_flash_attn_varlen_forward, _flash_attn_varlen_backward),
        "flash_attn.bert_padding": (),
    }
    modules = {}
    for name, own in functions.items():
        modules[name] = module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update({function.__name__: function for function in own})
    # transformers imports these too, and does not call them.
    modules["flash_attn"].__version__, modules["flash_attn"].flash_attn_with_kvcache = "2.8.3", None
    modules["flash_attn.bert_padding"].pad_input = modules["flash_attn.bert_padding"].unpad_input = None
    return modules
