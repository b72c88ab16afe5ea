"""Norms as an accelerator computes them."""

import pytest
import torch

from phi3v.model import norms
from phi3v.model.norms import layer_norm, rms_norm


def rows_and_weights(dtype):
    torch.manual_seed(0)
    rows = torch.randn(40, 96).to(dtype)
    weight, bias = 1 + 0.1 * torch.randn(96), 0.1 * torch.randn(96)
    return [x.to(dtype).requires_grad_() for x in (rows, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_an_accelerators_norms_are_a_cpus(norm, dtype, monkeypatch):
    found = []
    for on_cpu in (True, False):
        monkeypatch.setattr(norms, "_is_on_cpu", lambda x, on_cpu=on_cpu: on_cpu)
        x, weight, bias = rows_and_weights(dtype)
        out = rms_norm(x, weight, 1e-5) if norm == "rms" else layer_norm(x, weight, bias, 1e-5, round=True)
        out.sin().sum().backward()
        found.append([out, x.grad, weight.grad])
    for ours, cpus in zip(found[1], found[0], strict=True):
        assert ours.dtype == dtype
        assert (ours - cpus).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * cpus.norm()


def test_an_accelerators_norms_under_autocast(monkeypatch):
    """They compute in fp32. The result has the dtype of the input, or, before matrix products alone, of these."""
    monkeypatch.setattr(norms, "_is_on_cpu", lambda x: False)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = rows_and_weights(dtype)
        exact = torch.nn.functional.layer_norm(x.float(), (96,), weight.float(), bias.float(), 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert rms_norm(x, weight, 1e-5).dtype == dtype
            kept, rounded = (layer_norm(x, weight, bias, 1e-5, round=r) for r in (False, True))
        assert kept.dtype == dtype and torch.equal(kept, exact.to(dtype))
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())
