"""Norms that keep little memory for the backward pass, on a CPU and under an accelerator's autocast.

In every layer a norm follows a sum, the residual stream plus what was computed from it. Where functions are fused (see
`fused`), one kernel computes both, and another one their gradients.
"""

import contextlib

import torch
import torch.nn.functional as F

from .fused import fused, is_worth_fusing


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, computed in fp32 or better. Keeps x and one number per row; autograd would keep up to four
    tensors of the size of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad, grad_x, grad_weight = x * scale, grad.to(scale.dtype), None, None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grad * weight
            along = torch.linalg.vecdot(grad, normed)[..., None].div_(-x.shape[-1])
            grad_x = torch.addcmul(grad, normed, along).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(…, width) → the same shape: each row divided by its root mean square, and multiplied by `weight` (width,).

    eps is added to the mean square.
    """
    if _is_on_cpu(x):
        return _RMSNorm.apply(x, weight, eps)  # accelerators have a fused kernel
    with _without_autocast(x):
        return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, round: bool) -> torch.Tensor:
    """(…, width) → the same shape, as `F.layer_norm`; weight, bias: (width,).

    round: under autocast on an accelerator, the result has the dtype of matrix products. Otherwise it has the dtype of
        `x`, as it always has on a CPU.
    """
    if _is_on_cpu(x):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    with _without_autocast(x) as products:
        normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return normed.to(products) if round and products else normed


# ---- A sum and its norm


def _example(n_rows: int, width: int, *others):
    """For `fused`: random tensors, `n_rows` of (rows, width) and then a weight (width,); then `others`."""

    def example(rows, dtype, device):
        random = torch.Generator().manual_seed(0)  # of its own, so that training draws the same numbers
        shapes = [(rows, width)] * n_rows + [(width,)]
        return *(torch.randn(shape, generator=random).to(device, dtype) for shape in shapes), *others

    return example


def _statistics(n: int):
    """An example of `n` numbers for each row, which are in fp32 as norms keep them."""
    return lambda rows, dtype, device: (torch.linspace(0.5, 2, rows, device=device)[:, None],) * n


@fused(_example(2, 3072, 1e-5))
def _add_rms_norm(x, added, weight, eps):
    total = x + added
    rows = total.float()
    scale = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, (rows * scale * weight).to(total.dtype), scale


@fused(lambda *of: (*_example(3, 3072)(*of), *_statistics(1)(*of)))
def _add_rms_norm_backward(grad_total, grad, total, weight, scale):
    rows, grad = total.float(), grad.float()
    slope = grad * weight
    along = (slope * rows).mean(-1, keepdim=True) * scale.square()
    grad_weight = (grad * rows * scale).flatten(0, -2).sum(0)
    return (grad_total + scale * (slope - rows * along)).to(total.dtype), grad_weight.to(weight.dtype)


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum and one number per row."""

    @staticmethod
    def forward(ctx, x, added, weight, eps):
        total, normed, scale = _add_rms_norm(x, added, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad):
        grad_x, grad_weight = _add_rms_norm_backward(grad_total, grad, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None


def add_rms_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added, and the `rms_norm` of this sum; all are (…, width)."""
    if is_worth_fusing(x):
        return _AddRMSNorm.apply(x, added, weight, eps)
    total = x + added
    return total, rms_norm(total, weight, eps)


@fused(lambda *of: (*_example(2, 1024)(*of), *_example(0, 1024, 1e-5, of[1])(*of)))
def _add_layer_norm(x, added, weight, bias, eps, dtype):
    total = x + added
    rows = total.float()
    mean = rows.mean(-1, keepdim=True)
    scale = ((rows - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, ((rows - mean) * scale * weight + bias).to(dtype), mean, scale


@fused(lambda *of: (*_example(3, 1024)(*of), *_statistics(2)(*of)))
def _add_layer_norm_backward(grad_total, grad, total, weight, mean, scale):
    normed, grad = (total.float() - mean) * scale, grad.float()
    slope = grad * weight
    along = (slope * normed).mean(-1, keepdim=True)
    grad_x = grad_total + scale * (slope - slope.mean(-1, keepdim=True) - normed * along)
    grad_weight, grad_bias = ((grad * normed).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0))
    return grad_x.to(total.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


class _AddLayerNorm(torch.autograd.Function):
    """Keeps the sum and two numbers per row."""

    @staticmethod
    def forward(ctx, x, added, weight, bias, eps, dtype):
        total, normed, mean, scale = _add_layer_norm(x, added, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, scale)
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad):
        grad_x, grad_weight, grad_bias = _add_layer_norm_backward(grad_total, grad, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, grad_bias, None, None


def add_layer_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, round: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added, and the `layer_norm` of this sum; all are (…, width)."""
    if is_worth_fusing(x):
        with _without_autocast(x) as products:
            dtype = products if round and products else torch.promote_types(x.dtype, added.dtype)
            return _AddLayerNorm.apply(x, added, weight, bias, eps, dtype)
    total = x + added
    return total, layer_norm(total, weight, bias, eps, round)


def _is_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


@contextlib.contextmanager
def _without_autocast(x: torch.Tensor):
    """Within this context, operations on the device of `x` compute in the dtype of their inputs. Gives the dtype that
    autocast chooses for matrix products; None if there is no autocast.

    Autocast on CUDA computes norms in fp32 and returns fp32, so that the backward pass would keep their input and the
    tower's residual stream twice as large. The kernels compute in fp32 anyway, whatever the dtype of their input is.
    """
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        yield None
        return
    with torch.autocast(kind, enabled=False):
        yield torch.get_autocast_dtype(kind)
