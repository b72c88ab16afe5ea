"""What a layer with a LoRA adapter computes on an accelerator: PEFT's formula, with less memory traffic.

PEFT computes base(x) + B(A(x)) * scaling one operation after another. Each of the last two reads and writes tensors as
large as the output, and autograd adds up two gradients of the input. Here the matrix products with B, and in the
backward pass with A, add their results to what is there already. The scaling is applied to A(x), which is small.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from .functional import add_product
from .fused import is_fused


class _Down(torch.autograd.Function):
    """x → (x for the base layer, A(x)). The gradient of the second is added to that of the first, which the base layer
    has just computed and nobody else reads."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return x.view_as(x), F.linear(x, a)

    @staticmethod
    def backward(ctx, grad_x, grad):
        (x, a), grad = ctx.saved_tensors, grad.flatten(0, -2)
        needs_x, needs_a = ctx.needs_input_grad
        grad_a = grad.T @ x.flatten(0, -2) if needs_a else None
        return add_product(grad_x.flatten(0, -2), grad, a).view_as(x) if needs_x else None, grad_a


class _Up(torch.autograd.Function):
    """(base(x), A(x) * scaling) → their sum after the second went through B. Changes the first, which the base layer
    has just computed and does not keep."""

    @staticmethod
    def forward(ctx, output, down, b):
        ctx.save_for_backward(down, b)
        # Not `mark_dirty`: the output of a linear layer is a view, and autograd would copy the gradients of its base.
        add_product(output.flatten(0, -2), down.flatten(0, -2), b.T)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        (down, b), rows = ctx.saved_tensors, grad.flatten(0, -2)
        return grad, (rows @ b).view_as(down), rows.T @ down.flatten(0, -2)


def use_less_traffic(model: nn.Module):
    """Replaces the forward pass of all linear layers with an adapter, where functions are fused."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and hasattr(module, "get_base_layer"):
            module.forward = MethodType(_forward, module)


def _forward(layer: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    name = layer.active_adapters[0]
    if args or kwargs or not is_fused(x) or not _is_plain(layer, name):
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if _autocasts(kind) else a.dtype
    if x.dtype != dtype:
        return type(layer).forward(layer, x)
    x, down = _Down.apply(x, a.to(dtype))
    output = layer.base_layer(x)
    return _Up.apply(output, down * layer.scaling[name], b.to(dtype))


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Whether a layer has one adapter, as our scripts train it: without bias, dropout and variants, and not merged."""
    drops = layer.training and getattr(layer.lora_dropout[name], "p", 0) if name in layer.lora_A else True
    is_used = not layer.disable_adapters and not layer.merged and len(layer.active_adapters) == 1
    return is_used and not drops and not layer.lora_variant and layer.lora_B[name].bias is None
