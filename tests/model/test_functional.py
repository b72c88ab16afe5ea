"""The loss, computed in chunks; rotary position embedding."""

import copy

import pytest
import torch

from phi3v.model.functional import QuickGELU, cross_entropy, rotate, swiglu


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


def test_rotate_against_autograd():
    """More heads of queries than of keys, and heads of which a part is rotated. Every part has a gradient."""
    torch.manual_seed(0)
    heads, head_dim, rotary_dim = (4, 2, 2), 12, 8
    qkv, cos, sin = torch.randn(1, 5, 96, requires_grad=True), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split(heads, dim=-2)

    def plain(x):
        first, second, rest = x[..., :4], x[..., 4:rotary_dim], x[..., rotary_dim:]
        turned = torch.cat([-second, first], -1) * sin[..., None, :]
        return torch.cat([x[..., :rotary_dim] * cos[..., None, :] + turned, rest], -1)

    expected = plain(query), plain(key), value
    found = rotate(qkv * 1.0, cos, sin, heads, head_dim)
    grads = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, qkv, grads)[0] for x in (found, expected)))


def test_quick_gelu_of_all_numbers_of_fp16():
    """Above 38,500, 1.702 x is infinite in fp16, but neither the value nor the derivative is."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()].requires_grad_()
    found = QuickGELU()(x)
    (grad,) = torch.autograd.grad(found.sum(), x)
    exact = x.detach().double()
    gate = torch.sigmoid(1.702 * exact)
    torch.testing.assert_close(found.double(), exact * gate, rtol=2e-3, atol=3e-4)
    torch.testing.assert_close(grad.double(), gate * (1 + 1.702 * exact * (1 - gate)), rtol=2e-3, atol=5e-4)


def test_gradients_of_swiglu_in_fp16_are_finite_where_the_exact_ones_are():
    """The product of the gradient and `up` is infinite in fp16, and the derivative of silu is 0 or small."""
    gate, up, grad = torch.tensor([-60000.0, -100.0, -8.0, 0.0, 9.0]), torch.tensor(300.0), torch.tensor(400.0)
    gate_up = torch.cat([gate, up.expand(5)]).half().requires_grad_()
    (found,) = torch.autograd.grad(swiglu(gate_up), gate_up, grad.half().expand(5))
    exact = torch.cat([gate, up.expand(5)]).double().requires_grad_()
    (expected,) = torch.autograd.grad(swiglu(exact), exact, grad.double().expand(5))
    largest = torch.finfo(torch.float16).max
    finite = expected.abs() <= largest
    assert finite.sum() == 9 and found[finite].isfinite().all()
    torch.testing.assert_close(found[finite].double(), expected[finite], rtol=2e-3, atol=1e-3)
