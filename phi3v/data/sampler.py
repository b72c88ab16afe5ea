"""Which examples make an optimizer step, and how a step is cut into micro-batches over ranks."""

import heapq
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from .conversations import ConversationDataset
from .sizes import Size


class StepSampler(Sampler[list[int]]):
    """One rank's micro-batches of every optimizer step of an epoch.

    Every rank draws the same steps of `batch_size` examples, at random by `seed` and epoch. Examples with the same
    images stay together. A step is cut into `accumulation` micro-batches a rank, either of `examples_per_gpu` examples
    each, or such that none holds more than `max_tokens`; then as many as the fullest step of all epochs needs. Ranks
    get micro-batches of nearly equal token counts at the same time. The last step of an epoch may be smaller; where it
    leaves a rank without an example, the shortest one stands in as ~i, which has no targets.

    sizes: of each example; images: what is equal for examples with the same images, None for none;
    share_images: whether these count once in a micro-batch.
    Raises InputError where one example holds more than `max_tokens`.
    """

    def __init__(
        self,
        sizes: list[Size],
        images: list,
        batch_size: int,
        *,
        examples_per_gpu: int | None = None,
        max_tokens: int | None = None,
        share_images: bool = True,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sizes, self.batch_size, self.seed, self.epoch = sizes, batch_size, seed, 0
        self.rank, self.world_size = rank, world_size
        self.examples_per_gpu, self.max_tokens, self.share_images = examples_per_gpu, max_tokens, share_images
        numbers = {}
        self.images = [
            ("alone", i) if key is None else numbers.setdefault(key, len(numbers)) for i, key in enumerate(images)
        ]
        self.shortest = min(range(len(sizes)), key=lambda i: sizes[i].tokens)
        rest = len(sizes) % batch_size
        if max_tokens is None:
            self.accumulation = batch_size // (world_size * examples_per_gpu)
            self.rest_accumulation = math.ceil(rest / (world_size * examples_per_gpu))
        else:
            longest = max(range(len(sizes)), key=lambda i: sizes[i].tokens)
            if sizes[longest].tokens > max_tokens:
                raise InputError(
                    f"--max_tokens_per_gpu {max_tokens} is less than the {sizes[longest].tokens} tokens of example "
                    f"{longest}: raise it, or lower --num_crops"
                )
            steps = [step for epoch in range(epochs) for step in self._steps(epoch)]
            self.rest_accumulation = self._needed_by_all([step for step in steps if len(step) < batch_size], 1)
            whole = [step for step in steps if len(step) == batch_size]
            self.accumulation = self._needed_by_all(whole, self.rest_accumulation)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sizes), self.batch_size)
        return whole * self.accumulation + (self.rest_accumulation if rest else 0)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps(self.epoch):
            yield from self._micro_batches(step)

    def _steps(self, epoch: int) -> list[list[int]]:
        """The examples of every step of an epoch, those with the same images next to one another."""
        together = {}
        for i, key in enumerate(self.images):
            together.setdefault(key, []).append(i)
        together = list(together.values())
        order = np.random.default_rng([self.seed, epoch]).permutation(len(together))
        examples = [i for k in order for i in together[k]]
        return [examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size)]

    def tokens(self, examples: list[int]) -> int:
        """Tokens of a micro-batch, where shared images count once."""
        total, last = 0, None
        for i in examples:
            total += self.sizes[i].tokens
            if self.share_images and self.images[i] == last:
                total -= self.sizes[i].image_tokens
            last = self.images[i]
        return total

    def _micro_batches(self, step: list[int]) -> list[list[int]]:
        """This rank's share of a step."""
        n = self.accumulation if len(step) == self.batch_size else self.rest_accumulation
        if self.max_tokens is None:
            cuts = np.linspace(0, len(step), n * self.world_size + 1).round().astype(int)
            bins = [step[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        else:
            bins = self._bins(step, n)
        bins = [own or [~self.shortest] for own in bins]
        # Ranks wait for one another at each micro-batch, so those of one moment should be equally long.
        bins.sort(key=lambda own: -self.tokens([i if i >= 0 else ~i for i in own]))
        return bins[self.rank :: self.world_size]

    def _needed(self, step: list[int]) -> int:
        """The fewest micro-batches a rank that hold the examples."""
        n = max(1, math.ceil(self.tokens(step) / (self.max_tokens * self.world_size)))
        while self._bins(step, n) is None:
            n += 1
        return n

    def _needed_by_all(self, steps: list[list[int]], least: int) -> int:
        """One number of micro-batches a rank for all steps: to the Trainer every epoch is as long as the first, and
        the last step of an epoch no longer than the others."""
        n = max([least, *map(self._needed, steps)])
        while any(self._bins(step, n) is None for step in steps):
            n += 1
        return n

    def _bins(self, step: list[int], n: int) -> list[list[int]] | None:
        """The examples in n micro-batches a rank, longest first into the emptiest; None where they don't fit."""
        fair = self.tokens(step) / (n * self.world_size)
        units = []
        for i in step:
            grown = units and self.images[units[-1][0]] == self.images[i] and units[-1] + [i]
            # A unit larger than a fair share would leave the other ranks waiting.
            if grown and self.tokens(grown) <= min(fair, self.max_tokens):
                units[-1] = grown
            else:
                units.append([i])
        bins = [(0, k, []) for k in range(n * self.world_size)]
        for unit in sorted(units, key=lambda unit: -self.tokens(unit)):
            _, k, own = heapq.heappop(bins)
            own = own + unit
            if self.tokens(own) > self.max_tokens:
                return None
            heapq.heappush(bins, (self.tokens(own), k, own))
        return [own for _, _, own in sorted(bins, key=lambda entry: entry[1])]


class EpochLoader(DataLoader):
    """A DataLoader whose batch sampler hears of the epoch, as the Trainer announces it."""

    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


def sampler_for(dataset: ConversationDataset, sizes: list[Size], batch_size: int, **options) -> StepSampler:
    return StepSampler(sizes, [dataset.images_key(i) for i in range(len(dataset))], batch_size, **options)
