"""Flash attention for tests on a CPU: a reference of the two passes of kernels, and a stand-in for the package.

Both check their arguments as the real kernels do, or more strictly.
"""

import sys
from types import ModuleType

import torch
from transformers import modeling_flash_attention_utils

from phi3v.model.varlen import Kernel, Segments

HALF = (torch.float16, torch.bfloat16)


def check_states(query, key, value, dtypes):
    assert query.dtype == key.dtype == value.dtype and query.dtype in dtypes, (query.dtype, key.dtype, value.dtype)
    assert query.device == key.device == value.device
    assert len(key) == len(value) and query.shape[-2] % key.shape[-2] == 0
    for x in (query, key, value):
        assert x.shape[-1] == query.shape[-1] <= 256 and x.shape[-1] % 8 == 0
        assert x.stride(-1) == 1 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
        assert x.data_ptr() % 16 == 0


def check_segments(query, key, s: Segments):
    for ends, most, rows in ((s.query_ends, s.most_queries, len(query)), (s.key_ends, s.most_keys, len(key))):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == query.device and ends.dim() == 1
        assert type(most) is int and most == max(ends.diff().tolist())
        assert ends[0] == 0 and ends[-1] == rows, "a kernel leaves rows after the last segment as they were in memory"
        assert (ends.diff() > 0).all(), "a segment without queries or keys is a case that kernels are rarely tried with"
    assert len(s.query_ends) == len(s.key_ends)


@torch.autocast("cpu", enabled=False)
def scores_of(query, key, scale, is_causal):
    """Scaled scores (…, heads, queries, keys) in fp32; the last query is aligned with the last key."""
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", query.float(), key.float()) * scale
    if is_causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries), -torch.inf)
    return scores


@torch.autocast("cpu", enabled=False)
def weighted(scores, value, dtype):
    """(…, queries, heads, head_dim): for each query the mean of the values, weighted by the softmax of its scores."""
    value = value.float().repeat_interleave(scores.shape[-3] // value.shape[-2], dim=-2)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), value).to(dtype)


def segments_in(s: Segments):
    """For each segment, the slices of its queries and of its keys."""
    q, k = s.query_ends.tolist(), s.key_ends.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


def reference(*dtypes) -> Kernel:
    """A kernel in plain torch that takes tensors of these dtypes. Its `forward.calls` lists the segments of each call:
    where queries end, where keys end, and whether it was causal."""
    calls = []

    def forward(query, key, value, s, scale):
        check_states(query, key, value, dtypes)
        check_segments(query, key, s)
        calls.append((s.query_ends.tolist(), s.key_ends.tolist(), s.is_causal))
        output, lse = torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[1], len(query))
        for q, k in segments_in(s):
            scores = scores_of(query[q], key[k], scale, s.is_causal)
            output[q], lse[:, q] = weighted(scores, value[k], query.dtype), scores.logsumexp(-1)
        return output, lse

    def backward(grad, query, key, value, output, lse, s, scale):
        """Like the kernels, computes with the given output and log-sum-exp, and not with its own."""
        check_states(query, key, value, dtypes)
        check_states(grad, output, output, dtypes)
        check_segments(query, key, s)
        assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == (query.shape[1], len(query))
        assert grad.shape == output.shape == query.shape
        grads, group = (
            [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)],
            query.shape[1] // key.shape[1],
        )
        for q, k in segments_in(s):
            p = (scores_of(query[q], key[k], scale, s.is_causal) - lse[:, q, None]).exp()
            own_key, own_value = (x[k].float().repeat_interleave(group, dim=1) for x in (key, value))
            own_grad = grad[q].float()
            along = (own_grad * output[q].float()).sum(-1).T[:, :, None]
            slope = p * (torch.einsum("qhd,khd->hqk", own_grad, own_value) - along) * scale
            found = (
                torch.einsum("hqk,khd->qhd", slope, own_key),
                torch.einsum("hqk,qhd->khd", slope, query[q].float()).unflatten(1, (-1, group)).sum(2),
                torch.einsum("hqk,qhd->khd", p, own_grad).unflatten(1, (-1, group)).sum(2),
            )
            for whole, rows, part in zip(grads, (q, k, k), found, strict=True):
                whole[rows] = part.to(whole.dtype)
        return tuple(grads)

    forward.calls = calls
    return Kernel(forward, backward, lacks=lambda: None, describe=lambda: "the reference of the tests")


def install_flash_attn(monkeypatch, *dtypes) -> Kernel:
    """Makes `import flash_attn` give a stand-in for version 2.8.3 that takes tensors of these dtypes, on a CPU too, and
    makes transformers use it. Returns the reference that computes packed rows."""
    kernel = reference(*dtypes)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        for own in zip(q, k, v, strict=True):
            check_states(*own, dtypes)
        return weighted(scores_of(q, k, softmax_scale or q.shape[-1] ** -0.5, causal), v, q.dtype)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        s = Segments(cu_seqlens_q, cu_seqlens_k, len(q), len(k), int(max_seqlen_q), int(max_seqlen_k), causal)
        parts = [(q[a][None], k[b][None], v[b][None]) for a, b in segments_in(s)]
        return torch.cat([flash_attn_func(*part, 0.0, softmax_scale, causal)[0] for part in parts])

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal
    ):
        assert dropout_p == 0
        s = Segments(cu_seqlens_q, cu_seqlens_k, len(q), len(k), max_seqlen_q, max_seqlen_k, causal)
        return *kernel.forward(q, k, v, s, softmax_scale), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        s = Segments(cu_seqlens_q, cu_seqlens_k, len(q), len(k), max_seqlen_q, max_seqlen_k, causal)
        grads = kernel.backward(dout, q, k, v, out, softmax_lse, s, softmax_scale)
        for target, found in zip((dq, dk, dv), grads, strict=True):
            assert target.is_contiguous() and target.dtype == q.dtype and target.shape == found.shape
            target.copy_(found)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    padding = ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    for module in (package, interface, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return kernel
