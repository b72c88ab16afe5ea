"""Measures how fast a run trains: images and tokens per second, MFU and peak memory."""

import contextlib
import time

import torch
from accelerate.utils import gather_object

from ..model.packing import Packing
from ..old_versions import accelerator_memory
from .costs import Costs
from .hardware import peak_memory, wait_for_device
from .workload import workload_of_packing


class Meter:
    """Counts what this rank trains on, and the time that it takes.

    The host waits for the device only when a measurement is read.

    costs: of this run's micro-batches, from which their FLOPs follow.
    peak: FLOP/s of this rank's device.
    """

    def __init__(self, costs: Costs, peak: float):
        self.costs, self.peak = costs, peak
        self.started = None
        self._clear()

    def _clear(self):
        self.images = self.tokens = self.flops = 0
        self.seconds = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether a micro-batch has been counted."""
        return self.tokens > 0 or self.started is not None

    @contextlib.contextmanager
    def paused(self, is_read: bool):
        """The time within this context is not counted.

        Nor is anything before the end of the first such context, because the first step is slower than the others.

        is_read: whether `read` is called within; waits until the device has finished all that it was given.
        """
        if is_read:
            wait_for_device()
        if self.started is None:
            self._clear()
            if torch.accelerator.is_available():
                accelerator_memory().reset_peak_memory_stats()
        else:
            self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def add(self, packing: Packing):
        """Counts a micro-batch."""
        workload = workload_of_packing(packing)
        self.images += len(packing.grids)
        self.tokens += workload.tokens
        self.flops += self.costs.flops(workload)

    def read(self) -> dict[str, float]:
        """The speed of all ranks together since the last call, and the largest rank's peak memory.

        Empty if no whole step has been timed since. Every rank must call it.
        """
        totals = [float(self.images), float(self.tokens), float(self.flops), float(peak_memory())]
        ranks = gather_object([totals])
        images, tokens, flops, memory = zip(*ranks, strict=True)
        seconds = self.seconds
        self._clear()
        if not seconds:
            return {}
        return {
            "images_per_second": round(sum(images) / seconds, 2),
            "tokens_per_second": round(sum(tokens) / seconds, 1),
            "mfu": round(sum(flops) / seconds / (self.peak * len(ranks)), 4),
            "peak_memory_gib": round(max(memory) / 2**30, 2),
        }
