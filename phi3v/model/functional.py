"""Functions with hand-written gradients, which keep less memory and compute less than autograd would.

The model and its loss call them in place of transformers' own code. Each computes the same values, to rounding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .fused import fused, is_worth_fusing

LOSS_CHUNK = 512  # rows of logits that exist at the same time: 66 MB in fp32 for a vocabulary of 32,064


def _random(*shapes):
    """An example for `fused`: random tensors of (rows, *shape). The examples below have the widths of Phi-3.5-vision,
    for which the functions are then compiled already."""

    def example(rows, dtype, device):
        random = torch.Generator().manual_seed(0)  # of its own, so that training draws the same numbers
        return tuple(4 * torch.randn(rows, *shape, generator=random).to(device, dtype) for shape in shapes)

    return example


def _quick_gelu_pure(x):
    return x * torch.sigmoid(x * 1.702)


@fused(_random((4096,)), _quick_gelu_pure)
def _quick_gelu(x):
    if x.dtype == torch.float16:  # 1.702 x can be infinite, and silu would return it
        return torch.sigmoid(x * 1.702).mul_(x)
    return F.silu(x * 1.702, inplace=True).mul_(1 / 1.702)


def _quick_gelu_backward_pure(grad, x):
    return torch.ops.aten.silu_backward(grad, x * 1.702)


@fused(_random((4096,), (4096,)), _quick_gelu_backward_pure)
def _quick_gelu_backward(grad, x):
    x = x * 1.702
    if x.dtype == torch.float16:  # the derivative of silu is NaN at infinity; here it is 0 or 1 long before
        x = x.clamp_(-1000, 1000)
    return torch.ops.aten.silu_backward(grad, x)


class _QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, with the derivative silu'(1.702 x). Keeps only x for the backward
    pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    def backward(ctx, grad):
        return _quick_gelu_backward(grad, *ctx.saved_tensors)


class QuickGELU(nn.Module):
    """CLIP's activation, x * sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELU.apply(x)


@fused(_random((16384,)))
def _swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward_pure(grad, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad], dim=-1)


@fused(_random((8192,), (16384,)), _swiglu_backward_pure)
def _swiglu_backward(grad, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    grads = torch.empty_like(gate_up)
    grad_gate, grad_up = grads.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate), out=grad_up)
    if grad.dtype == torch.float16:  # grad * up can be infinite where the derivative of silu is 0
        torch.mul(torch.ops.aten.silu_backward(grad, gate), up, out=grad_gate)
    else:
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grads


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up for the halves of one tensor. Keeps only that tensor."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return _swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (…, 2 n), where the gate is the first half, → (…, n)."""
    return _SwiGLU.apply(gate_up)


def _turned(heads, cos, sin):
    """(n, heads, head_dim) rotated, as a new tensor."""
    half = cos.shape[-1] // 2
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat([part.to(heads.dtype) for part in parts], dim=-1)


def _rotate_pure(qkv, cos, sin, n_heads, head_dim):
    heads = qkv.unflatten(-1, (-1, head_dim))
    return torch.cat([_turned(heads[:, :n_heads], cos, sin), heads[:, n_heads:]], dim=-2).flatten(-2)


def _rotate_backward_pure(query, key, value, cos, sin):
    return torch.cat([_turned(query, cos, -sin), _turned(key, cos, -sin), value], dim=-2).flatten(-2)


def _angles(rows, dtype, device):
    angles = torch.arange(rows * 48.0).view(rows, 48).repeat(1, 2)
    return tuple(x.to(device, dtype) for x in (angles.cos(), angles.sin()))


@fused(lambda *of: (*_random((9216,))(*of), *_angles(*of), 64, 96), _rotate_pure)
def _rotate_(qkv, cos, sin, n_heads, head_dim):
    heads = qkv[..., : n_heads * head_dim].unflatten(-1, (n_heads, head_dim))
    half = cos.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half : 2 * half]
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    rotated = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
    return qkv


@fused(lambda *of: (*_random((32, 96), (32, 96), (32, 96))(*of), *_angles(*of)), _rotate_backward_pure)
def _rotate_backward(query, key, value, cos, sin):
    qkv = torch.cat([query, key, value], dim=-2)
    n_heads, head_dim = query.shape[-2] + key.shape[-2], query.shape[-1]
    return _rotate_.plain(qkv.flatten(-2), cos, -sin, n_heads, head_dim)


class _Rotate(torch.autograd.Function):
    """Rotates query and key, and keeps only the angles. The gradients of query, key and value become one tensor in one
    step. Autograd would make three tensors of its size, of zeros and one part each, and add them."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, head_dim):
        ctx.save_for_backward(cos, sin)
        # `mark_dirty` can't be told of this change, because views are returned. Nothing else may use `qkv`.
        qkv = _rotate_(qkv, cos, sin, sum(heads[:2]), head_dim)
        return qkv.unflatten(-1, (-1, head_dim)).split(heads, dim=-2)

    @staticmethod
    def backward(ctx, *grads):
        return _rotate_backward(*grads, *ctx.saved_tensors), None, None, None, None


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: tuple[int, int, int], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Applies rotary position embedding to query and key, in place, and returns query, key and value (…, n, own heads,
    head_dim).

    qkv: (…, n, sum(heads) * head_dim), which has them one after the other. It can't be used afterwards.
    cos, sin: (…, n, rotary_dim) with two equal halves. The first `rotary_dim` numbers of each head are rotated.
    heads: how many heads query, key and value have.
    """
    return _Rotate.apply(qkv, cos, sin, heads, head_dim)


class _Projections(torch.autograd.Function):
    """Linear layers of one input. In the backward pass each matrix product adds to the one before, so that the gradient
    of the input is written once for each layer. Autograd would also read and add up the gradients."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.save_for_backward(x, *parameters)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(parameters[::2], parameters[1::2], strict=True))

    @staticmethod
    def backward(ctx, *grads):
        x, *parameters = ctx.saved_tensors
        rows, grad_x, found = x.flatten(0, -2), None, []
        for grad, weight in zip(grads, parameters[::2], strict=True):
            grad = grad.flatten(0, -2)
            grad_x = add_product(grad_x, grad, weight.to(grad.dtype))
            found += [grad.T @ rows.to(grad.dtype), grad.sum(0)]
        found = [own.to(p.dtype) for own, p in zip(found, parameters, strict=True)]
        return grad_x.view_as(x).to(x.dtype), *found


def project_to_heads(x: torch.Tensor, layers: tuple[nn.Module, ...], head_dim: int) -> list[torch.Tensor]:
    """Linear layers of (n, length, width), each as (n, heads, length, head_dim)."""
    parameters = [p for layer in layers for p in layer.parameters()]
    trained = torch.is_grad_enabled() and x.requires_grad and all(p.requires_grad for p in parameters)
    # ZeRO-3 gathers parameters when their module is called.
    plain = any(type(layer) is not nn.Linear for layer in layers) or any(hasattr(p, "ds_id") for p in parameters)
    if trained and not plain and is_worth_fusing(x):
        outputs = _Projections.apply(x, *parameters)
    else:
        outputs = [layer(x) for layer in layers]
    return [output.unflatten(-1, (-1, head_dim)).transpose(1, 2) for output in outputs]


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in one matrix product, in place; without `total`, a @ b. All are matrices of one dtype."""
    return a @ b if total is None else torch.addmm(total, a, b, out=total)


class _CrossEntropySum(torch.autograd.Function):
    """Projects to the vocabulary chunk by chunk, and computes a chunk's gradients in the forward pass, so that its
    logits can be freed before the next chunk."""

    @staticmethod
    def forward(ctx, hidden, targets, divisor, head, *parameters):
        trained = [p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed]
        needs_grad = ctx.needs_input_grad[0] or bool(trained)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grads = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        leaf = hidden.detach().requires_grad_(needs_grad)
        for start in range(0, len(hidden), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            with torch.set_grad_enabled(needs_grad):
                x = leaf[rows]
                scores = head(x)
            log_p = F.log_softmax(scores.detach().float(), dim=-1)
            own = targets[rows, None]
            total -= log_p.gather(1, own).sum()
            if needs_grad:
                # The derivative of the loss by the scores is the softmax, minus 1 at the target.
                slope = log_p.exp_().scatter_add_(1, own, log_p.new_full((1, 1), -1.0).expand_as(own))
                grad_x, *new = torch.autograd.grad(scores, (x, *trained), slope.to(scores.dtype))
                grad_hidden[rows] = grad_x
                new = [g.float() if g.dtype == torch.float16 else g for g in new]  # the sum over chunks could overflow
                grads = new if grads is None else [a.add_(b) for a, b in zip(grads, new, strict=True)]
            del scores, log_p
        # The gradients are divided in the backward pass, where fp16's loss scale multiplies them. Divided here, without
        # the loss scale, they could underflow.
        ctx.divisor, ctx.parameters_dtypes = divisor, [p.dtype for p in parameters]
        ctx.grads = grad_hidden, grads or [torch.zeros_like(p) for p in trained]
        return total / divisor

    @staticmethod
    def backward(ctx, grad):
        (grad_hidden, grads), ctx.grads = ctx.grads, None  # scaled in place below, so they can be used only once
        grad = grad.float() / ctx.divisor
        found = iter(grads)
        needed = zip(ctx.parameters_dtypes, ctx.needs_input_grad[4:], strict=True)
        by_parameter = (next(found).mul_(grad).to(dtype) if wanted else None for dtype, wanted in needed)
        return grad_hidden.mul_(grad), None, None, None, *by_parameter


def cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, divisor, head: nn.Module) -> torch.Tensor:
    """The sum of the cross-entropies between `head(hidden)` and `targets`, divided by `divisor`, in fp32.

    hidden: (n, width); targets: (n,) int64; divisor: a number or a scalar tensor; head: any module from width to
    vocabulary. At most `LOSS_CHUNK` rows of logits exist at the same time, and no row is projected twice. Under ZeRO-3
    all rows are projected at once, because all ranks must call the head equally often.
    """
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum") / divisor
    return _CrossEntropySum.apply(hidden, targets, divisor, head, *head.parameters())
