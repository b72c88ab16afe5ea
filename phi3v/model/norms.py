"""Norms that keep little memory for the backward pass, on a CPU and under an accelerator's autocast."""

import contextlib

import torch
import torch.nn.functional as F


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
