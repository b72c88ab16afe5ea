"""Elementwise functions that are compiled: the same results, one graph for all lengths, and plain ones if it fails."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden_cases import load
from helpers import packed_row
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from phi3v.model import functional, fused, norms
from phi3v.model.functional import QuickGELU, _quick_gelu, rotate, swiglu

CPU = torch.device("cpu")
# Its name before torch 2.7 is cache_size_limit.
RECOMPILE_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


@pytest.fixture(autouse=True)
def own_graphs(monkeypatch):
    monkeypatch.setattr(fused, "LEAST_NUMBERS", 0)
    torch._dynamo.reset()
    counters.clear()
    yield
    fused.turn_off()
    torch._dynamo.reset()


def outputs_and_gradients(rows, dtype=torch.float32, by_heads=False):
    """Of all functions, for random inputs of this many rows. by_heads: the gradient of the query lies head by head in
    memory, as attention may return it."""
    random = torch.Generator().manual_seed(rows)
    sizes = (48, 40, 96, 32, 32, 24, 24)
    inputs = [torch.randn(1, rows, n, generator=random).to(dtype).requires_grad_() for n in sizes]
    angles = torch.randn(2, 1, rows, 4, generator=random).to(dtype).repeat(1, 1, 1, 2)
    weights = [torch.randn(n, generator=random).to(dtype).requires_grad_() for n in (32, 24, 24)]
    outputs = swiglu(inputs[0]), QuickGELU()(inputs[1]), *rotate(inputs[2] * 1.0, *angles, (4, 2, 2), 12)
    outputs += norms.add_rms_norm(*inputs[3:5], weights[0], 1e-5)
    outputs += norms.add_layer_norm(*inputs[5:], *weights[1:], 1e-5, round=False)
    inputs += weights
    grads = [torch.randn(x.shape, generator=random).to(dtype) for x in outputs]
    if by_heads:
        grads[2] = grads[2].transpose(1, 2).contiguous().transpose(1, 2)
    return *outputs, *torch.autograd.grad(outputs, inputs, grads)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        tolerance = 8 * torch.finfo(one.dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_fused_functions_compute_what_plain_ones_do():
    plain = outputs_and_gradients(100, torch.bfloat16)
    assert fused.turn_on(CPU, torch.bfloat16, backend="eager") == []
    assert_close(outputs_and_gradients(100, torch.bfloat16), plain)
    assert all(function.compiled for function in fused.Fused.every)


def test_one_graph_serves_all_lengths():
    """Also in parts that do not train, under autocast, and under activation checkpointing. No graph breaks."""
    expected = outputs_and_gradients(130)
    fused.compile_all(CPU, backend="eager")
    outputs_and_gradients(100)
    assert counters["stats"]["unique_graphs"] == len(fused.Fused.every) and not counters["graph_break"]
    assert_close(outputs_and_gradients(130), expected)
    for rows in (999, 64):
        outputs_and_gradients(rows)
    with torch.autocast("cpu", torch.bfloat16):
        outputs_and_gradients(200)
    swiglu(torch.randn(1, 80, 48))  # of a part that does not train
    x = torch.randn(1, 77, 48, requires_grad=True)
    checkpoint(swiglu, x, use_reentrant=False).backward(torch.ones(1, 77, 24))
    assert counters["stats"]["unique_graphs"] == len(fused.Fused.every)
    outputs_and_gradients(100, by_heads=True)  # a layout of its own is one graph more, for all lengths
    outputs_and_gradients(150, by_heads=True)
    assert counters["stats"]["unique_graphs"] == len(fused.Fused.every) + 1


def test_few_rows_and_other_devices_are_not_compiled():
    fused.compile_all(torch.device("cuda"), backend="eager")
    outputs_and_gradients(100)
    fused.compile_all(CPU, backend="eager")
    outputs_and_gradients(fused.FEWEST_ROWS - 1)
    assert not counters["stats"]["unique_graphs"]


def fails(graph, inputs):
    raise RuntimeError("no compiler\nfound")


def doubles(graph, inputs):
    return lambda *args: tuple(2 * x for x in graph(*args))


@pytest.mark.parametrize(("backend", "reason"), [(fails, "can't be compiled"), (doubles, "differs .* by 1.0e[+]00")])
def test_plain_functions_run_where_compiled_ones_fail_or_differ(backend, reason):
    (line,) = fused.turn_on(CPU, torch.float32, backend=backend)
    assert re.search(f"on rank 0, quick_gelu: .*{reason}", line) and "\n" not in line
    assert not any(function.compiled for function in fused.Fused.every)


def test_all_ranks_run_plain_functions_if_one_must(monkeypatch):
    def gather(found, own):
        found[:] = [own, "swiglu: it differs"]

    monkeypatch.setattr(fused, "dist", SimpleNamespace(is_initialized=lambda: True, all_gather_object=gather))
    monkeypatch.setattr(fused, "world_size", lambda: 2)
    (line,) = fused.turn_on(CPU, torch.float32, backend="eager")
    assert line.endswith("on rank 1, swiglu: it differs")
    assert not any(function.compiled for function in fused.Fused.every)


@torch._dynamo.config.patch({RECOMPILE_LIMIT: 1})
def test_a_function_that_can_not_be_compiled_later_runs_plain():
    fused.compile_all(CPU, backend="eager")
    with warnings.catch_warnings(action="error"):
        _quick_gelu(torch.randn(70, 8))
    x = torch.randn(70, 9)
    with pytest.warns(UserWarning, match="quick_gelu could not be compiled for other inputs"):
        found = _quick_gelu(x)
    assert torch.equal(found, _quick_gelu.plain(x)) and _quick_gelu.compiled is None


def test_errors_of_a_compiled_function_are_not_hidden():
    """Such as too little memory, of which training has its own message."""

    def too_large(*args):
        raise torch.OutOfMemoryError("out of memory")

    fused.compile_all(CPU, backend=lambda graph, inputs: too_large)
    with pytest.raises(torch.OutOfMemoryError):
        _quick_gelu(torch.randn(70, 8))


@pytest.mark.slow
def test_the_compiler_of_a_device(tmp_path, monkeypatch):
    """Of the CPU here. The results are within two roundings of the exact ones."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Compiling the headers once for all kernels pays only for many kernels.
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    monkeypatch.setattr(fused.Fused, "every", [functional._swiglu_backward, functional._rotate_backward])
    assert fused.turn_on(CPU, torch.bfloat16) == []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_computes_the_same_with_fused_functions(frozen, checkpointing):
    """Its layers hand the residual stream to the next one as two parts, unless activations are recomputed."""
    row = packed_row([([(1, 2)], 20, 8, "a"), ([(1, 1)], 9, 5, "b")])
    packing = row.pop("packing")
    found = []
    for fuse in (False, True):
        if fuse:
            fused.compile_all(CPU, backend="eager")
        model = load().train()
        if frozen:
            model.model.vision_embed_tokens.img_processor.requires_grad_(False)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(**row, packing=replace(packing, _on_device={})).loss
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        assert (found[1][name] - plain).abs().max() <= 1e-4 * plain.abs().max() + 1e-7, name
    assert counters["stats"]["unique_graphs"] >= 8
