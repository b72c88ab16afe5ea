"""Functions whose gradients are written out, because autograd's would keep more or do more than it takes."""

import torch
import torch.nn.functional as F
from torch import nn

LOSS_CHUNK = 512  # rows of logits that exist at once: at a vocabulary of 32,064 these are 66 MB in fp32


class _QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x), as silu(1.702 x) / 1.702, whose derivative is silu'(1.702 x). Keeps x alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x * 1.702, inplace=True).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x * 1.702)


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuickGELU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up for the halves of one tensor. Keeps that tensor alone."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grads


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(…, 2 n), the gate's half first → (…, n)."""
    return _SwiGLU.apply(gate_up)


class _CrossEntropySum(torch.autograd.Function):
    """Projects to the vocabulary chunk by chunk, and takes each chunk's gradients at once, before its logits go."""

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
                # d loss / d scores is softmax minus one at the target.
                slope = log_p.exp_().scatter_add_(1, own, log_p.new_full((1, 1), -1.0).expand_as(own)).div_(divisor)
                grad_x, *new = torch.autograd.grad(scores, (x, *trained), slope.to(scores.dtype))
                grad_hidden[rows] = grad_x
                grads = new if grads is None else [a.add_(b) for a, b in zip(grads, new, strict=True)]
            del scores, log_p
        ctx.grads = grad_hidden, grads or [torch.zeros_like(p) for p in trained]
        return total / divisor

    @staticmethod
    def backward(ctx, grad):
        (grad_hidden, grads), ctx.grads = ctx.grads, None  # scaled in place, so that they serve once
        found = iter(g.mul_(grad) for g in grads)
        by_parameter = (next(found) if needed else None for needed in ctx.needs_input_grad[4:])
        return grad_hidden.mul_(grad), None, None, None, *by_parameter


def cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, divisor, head: nn.Module) -> torch.Tensor:
    """Sum of cross-entropies of `head(hidden)` at `targets`, divided by `divisor`, in fp32.

    hidden: (n, width); targets: (n,) int64; divisor: a number or a scalar tensor; head: any module from width to
    vocabulary. At most `LOSS_CHUNK` rows of logits exist at a time, and no row is projected twice; under ZeRO-3, which
    needs all ranks to call the head equally often, all rows at once.
    """
    if any(hasattr(p, "ds_id") for p in head.parameters()):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum") / divisor
    return _CrossEntropySum.apply(hidden, targets, divisor, head, *head.parameters())
