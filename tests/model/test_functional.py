"""The loss, computed in chunks."""

import copy

import pytest
import torch

from phi3v.model.functional import cross_entropy


@pytest.mark.parametrize("divisor", [64, 20_000])
def test_gradients_of_the_loss_in_fp16(divisor):
    """Gradients in fp16 are close to those in fp32 under fp16's loss scale, for any number of tokens a step."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 4000, bias=False), torch.randn(1100, 64)
    targets = torch.randint(0, 4000, (1100,))
    found = []
    for dtype in (torch.float32, torch.float16):
        own, x = copy.deepcopy(head).to(dtype), hidden.to(dtype, copy=True).requires_grad_()
        (cross_entropy(x, targets, divisor, own) * 65536).backward()
        found.append((x.grad.float(), own.weight.grad.float()))
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() < 2e-3 * exact.norm()
