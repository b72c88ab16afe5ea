"""How long a GPU would take for a counted micro-batch, under assumptions that stand here and are printed with it.

A PREDICTION: nothing here is measured on a GPU. The assumptions stay as they are, so that predictions of different
versions of the code can be compared.
"""

from collections import Counter
from dataclasses import dataclass

from tracer import Kernel

from phi3v.training.workload import Workload


@dataclass(frozen=True)
class GPU:
    """What is assumed of a GPU.

    peak: FLOP/s in half precision, as published. matrix, attention, attention_backward: the share of the peak that
        these kernels achieve. bandwidth: bytes/s that memory-bound kernels achieve.
    shortest: seconds that every kernel takes at least.
    link: bytes/s that the GPU sends to other GPUs. buckets: seconds for which ZeRO-2, in each micro-batch, keeps the
        GPU busy with collecting the gradients of the whole model.
    has_flash: whether flash attention runs on it.
    """

    peak: float
    matrix: float
    attention: float
    attention_backward: float
    bandwidth: float
    shortest: float
    link: float
    buckets: float
    has_flash: bool = True


GPUS = {
    "A100": GPU(312e12, 0.77, 0.52, 0.45, 1.75e12, 2.5e-6, 185e9, 12e-3),
    "H100": GPU(989e12, 0.66, 0.36, 0.30, 2.9e12, 2.0e-6, 319e9, 7e-3),
    "RTX 4090": GPU(165e12, 0.85, 0.60, 0.50, 0.91e12, 2.5e-6, 10e9, 23e-3),
    "V100": GPU(125e12, 0.70, 0.30, 0.20, 0.78e12, 2.5e-6, 90e9, 27e-3, has_flash=False),
}
WHOLE = 4.134e9  # trained parameters of the whole model, to which `buckets` belongs
ADAM_BYTES = 30  # read and written for each parameter: gradient, fp32 copy, two moments, and the new weight
# Seconds of the host for an operation of the forward pass and of the backward pass, and what a launch takes in addition
HOST_FORWARD, HOST_BACKWARD, HOST_LAUNCH = 7e-6, 4.5e-6, 3e-6

ASSUMPTIONS = f"""\
Assumptions, the same for every prediction:
- A kernel takes the time of its FLOPs at the achieved share of the peak, or of its bytes at the achieved bandwidth,
  whichever is longer, and never less than the shortest kernel. Kernels run one after another.
- The host takes {HOST_FORWARD * 1e6:g} µs for an operation of the forward pass or of recomputation, and {HOST_BACKWARD * 1e6:g} µs for one of the backward
  pass, views included (from a CPU run with tiny tensors, one thread of a Xeon), and {HOST_LAUNCH * 1e6:g} µs more for each launch. The
  Trainer's and DeepSpeed's own Python is not counted. A pass takes as long as the slower of host and GPU.
- ZeRO-2 all-reduces the gradients of every micro-batch during its backward pass, which takes no less time than that.
  It also keeps the GPU busy with collecting them in buckets. ZeRO-1, and DDP for adapters, do both once a step, and
  add up the gradients of micro-batches before.
- The optimizer reads and writes {ADAM_BYTES} bytes for each parameter that it updates. ZeRO then gathers the weights.
- MFU counts the FLOPs that the mathematics needs, as training reports it: causal attention, and nothing recomputed.
- Whether memory suffices is not looked at: see docs/hardware.md, or --estimate.
The figures of A100 and H100 are fixed. Those of RTX 4090 and V100 are guesses from their data sheets. None has been
confirmed on a GPU. GPUs send so fast that the optimizer's step of the whole model takes 48 ms on 8 A100, 28 on 8 H100."""  # noqa: E501


@dataclass(frozen=True)
class Trace:
    """What was counted in a micro-batch. trained: parameters; operations: that the host dispatches in each phase."""

    kernels: list[Kernel]
    operations: dict[str, int]
    workload: Workload
    flops: float
    trained: int
    adapters: bool

    def total(self, field: str, **where) -> float:
        """The sum of a field of the kernels that are as `where` says; "launches" counts them."""
        found = (k for k in self.kernels if all(getattr(k, name) == value for name, value in where.items()))
        return sum(1 if field == "launches" else getattr(k, field) for k in found)


def kernel_seconds(kernel: Kernel, gpu: GPU) -> float:
    share = gpu.attention if kernel.kind == "attention" else gpu.matrix
    if kernel.kind == "attention" and "backward" in kernel.name:
        share = gpu.attention_backward
    return max(kernel.flops / (share * gpu.peak), kernel.moved / gpu.bandwidth, gpu.shortest)


def predict(found: Trace, gpu: GPU, micro_batches: int, gpus: int, zero: int = 2) -> dict[str, float]:
    """Predicted seconds of a micro-batch and a step, and the MFU. micro_batches: in a step, of one GPU."""
    busy, host = Counter(), Counter()
    for kernel in found.kernels:
        where, seconds = "forward" if kernel.phase == "forward" else "backward", kernel_seconds(kernel, gpu)
        busy[where] += seconds
        busy[kernel.kind] += seconds
        host[where] += HOST_LAUNCH
    for phase, n in found.operations.items():
        host["forward" if phase == "forward" else "backward"] += n * (
            HOST_BACKWARD if phase == "backward" else HOST_FORWARD
        )
    forward, backward = (max(busy[where], host[where]) for where in ("forward", "backward"))

    gradients = found.trained * (4 if found.adapters else 2)  # bytes
    others = (gpus - 1) / gpus
    all_reduce = 2 * gradients * others / gpu.link
    exposed = max(all_reduce - backward, 0.0)  # what is left of it after the backward pass
    buckets = gpu.buckets * found.trained / WHOLE
    accumulate = 3 * gradients / gpu.bandwidth  # read twice, written once
    updated = found.trained / (1 if found.adapters else gpus)
    optimizer = updated * ADAM_BYTES / gpu.bandwidth
    if not found.adapters:
        optimizer += 2 * found.trained * others / gpu.link  # to gather the weights
    if zero == 2 and not found.adapters:
        micro_batch = forward + backward + exposed + buckets
        step = micro_batches * micro_batch + optimizer
    else:
        micro_batch = forward + backward
        step = micro_batches * micro_batch + (micro_batches - 1) * accumulate + exposed + buckets + optimizer
    return {
        "matrix": busy["matrix"],
        "attention": busy["attention"],
        "memory": busy["memory"],
        "host": host["forward"] + host["backward"],
        "all_reduce": all_reduce,
        "buckets": buckets,
        "micro_batch": micro_batch,
        "optimizer": optimizer,
        "step": step,
        "mfu": micro_batches * found.flops / step / gpu.peak,
    }
