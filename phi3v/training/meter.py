"""How fast a training goes."""

import contextlib
import time

import torch
from accelerate.utils import gather_object

from ..model.packing import Packing
from .costs import Costs
from .hardware import peak_memory, wait_for_device
from .workload import load_of_packing


class Meter:
    """Counts what a rank trains on, and says how fast it goes. Never makes the host wait for the device between reads.

    peak: FLOP/s of a rank's device.
    """

    def __init__(self, costs: Costs, peak: float):
        self.costs, self.peak = costs, peak
        self.started = None
        self._clear()

    def _clear(self):
        self.images = self.tokens = self.flops = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def paused(self, is_read: bool):
        """Time that is not counted. The clock starts at the first pause's end, as the first step is like no other.
        `is_read`: the device has to come to an end of what it has been given."""
        if is_read:
            wait_for_device()
        if self.started is None:
            self._clear()
            if torch.accelerator.is_available():
                torch.accelerator.reset_peak_memory_stats()
        else:
            self.seconds += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def add(self, packing: Packing):
        """A micro-batch, with the images that it encodes."""
        load = load_of_packing(packing)
        self.images += len(packing.grids)
        self.tokens += load.tokens
        self.flops += self.costs.flops(load)

    def read(self) -> dict[str, float]:
        """Of all ranks together since the last reading; memory is the largest rank's. Empty where no whole step has
        been timed. Every rank must call it."""
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
