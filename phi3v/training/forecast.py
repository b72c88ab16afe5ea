"""What --estimate prints."""

import torch

from .activation_checkpointing import DESCRIPTIONS, KINDS
from .estimate import ASSUMED_MFU, Estimate
from .hardware import GPUS, USABLE_SHARE, device_memory, peak_flops, published_peak
from .workload import Workload

WIDEST = max(map(len, DESCRIPTIONS.values()))


def describe(
    estimate: Estimate, workload: Workload, epochs: float, filled: int | None = None, checkpointing: str | None = None
) -> str:
    """What --estimate prints: parameters, data and FLOPs, the memory for micro-batches like `workload`, and the
    time on the GPU of this machine, or on common GPUs if it has none.

    filled: examples in an optimizer step, if each GPU's micro-batches are filled with as many tokens as fit. Then the
        lines say how many these are. checkpointing: as `Estimate.plan` takes it.
    """
    total, n = estimate.workload_of_examples(estimate.sizes), len(estimate.sizes)
    parts = estimate.costs["none"].flops_by_part(total)
    whole = sum(parts.values())
    tokens, crops = (sorted(getattr(s, name) for s in estimate.sizes) for name in ("tokens", "crops"))
    lines = [
        f"parameters     {estimate.parameters:,}, of which {estimate.trained:,} train"
        + (f" and {estimate.four_bit:,} are kept in 4 bits" if estimate.four_bit else ""),
        f"examples       {n:,}, each of {tokens[0]:,} to {tokens[-1]:,} tokens (median {tokens[n // 2]:,}) and "
        f"up to {crops[-1]} crops (median {crops[n // 2]})",
        f"FLOPs          {whole / n / 1e12:.3g} TFLOP for the forward and backward pass of a mean example: "
        + ", ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()),
        f"memory         expected peak on each of {estimate.world_size} devices, for micro-batches of up to "
        f"{workload.tokens:,} tokens and {workload.crops} crops"
        + (", the longest example alone:" if filled and workload.tokens == tokens[-1] else ":"),
    ]
    for kind in KINDS:
        ratio = estimate.costs[kind].flops(total, with_recomputation=True) / whole
        lines.append(f"  {DESCRIPTIONS[kind]:{WIDEST}}  {estimate.memory(workload, kind)}, {ratio:.2f} x the FLOPs")
    lines.append(f"time           if the devices compute at {ASSUMED_MFU:.0%} of their peak, which is an assumption:")
    gpus = GPUS
    if torch.cuda.is_available():
        gpus = {torch.cuda.get_device_name(): device_memory() / USABLE_SHARE / 2**30}
    for name, gib in gpus.items():
        budget, limit = USABLE_SHARE * gib * 2**30, ""
        kind = estimate.least_checkpointing(workload, budget)
        if filled:
            plan = estimate.plan_to_fill(filled, "auto", checkpointing, budget)
            kind = plan.checkpointing if plan.memory.peak <= plan.budget else None
            limit = f", up to {plan.tokens:,} tokens in a micro-batch"
        lines.append(f"  {name:24} {_describe_time(estimate, name, kind, epochs)}{limit if kind else ''}")
    return "\n".join(lines)


def _describe_time(estimate: Estimate, gpu: str, kind: str | None, epochs: float) -> str:
    """kind: of activation checkpointing; None if the GPU has too little memory."""
    if kind is None:
        return "does not fit"
    rate = estimate.examples_per_second(kind, published_peak(gpu) or peak_flops(torch.half)[0])
    seconds = len(estimate.sizes) / rate
    all_epochs = f", {_duration(seconds * epochs)} for {epochs:g} epochs" if epochs != 1 else ""
    return f"{_duration(seconds)} for an epoch{all_epochs}, {rate:.3g} examples/s, {DESCRIPTIONS[kind]}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
