"""Chooses the examples of every optimizer step, and divides a step into micro-batches over ranks."""

import heapq
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from .conversations import ConversationDataset
from .sizes import Size


class StepSampler(Sampler[list[int]]):
    """Yields one rank's micro-batches, as lists of example numbers, for all optimizer steps of an epoch.

    Every rank draws the same steps of `batch_size` examples, in a random order that follows from `seed` and the epoch.
    Examples with the same images stay together. Each rank gets `accumulation` micro-batches per step. They either have
    `examples_per_gpu` examples each, or at most `max_tokens` tokens each; with `max_tokens`, `accumulation` is what the
    fullest step of all epochs needs. The micro-batches that ranks compute at the same moment have nearly equal numbers
    of tokens. The last step of an epoch may be smaller. If it leaves a rank without an example, the rank gets the
    shortest example i as ~i, which stands for the example without targets.

    sizes: of each example.
    images_keys: for each example a key that is equal for examples with the same images; None if it shares none.
    share_images: whether the images that examples of a micro-batch share count once, as `pack` makes them.
    original_length: longer examples share no images with shorter ones, because they take other rotary factors.
    Raises InputError if one example has more than `max_tokens` tokens.
    """

    def __init__(
        self,
        sizes: list[Size],
        images_keys: list,
        batch_size: int,
        *,
        examples_per_gpu: int | None = None,
        max_tokens: int | None = None,
        share_images: bool = True,
        original_length: float = math.inf,
        seed: int = 0,
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sizes, self.batch_size, self.seed, self.epoch, self.epochs = sizes, batch_size, seed, 0, epochs
        self.rank, self.world_size = rank, world_size
        self.examples_per_gpu, self.max_tokens = examples_per_gpu, max_tokens
        self.share_images, self.original_length = share_images, original_length
        numbers = {}
        self.images_keys = [
            ("alone", i) if key is None else numbers.setdefault(key, len(numbers)) for i, key in enumerate(images_keys)
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
        """The examples of every step of an epoch. Those with the same images are neighbours."""
        together = {}
        for i, key in enumerate(self.images_keys):
            together.setdefault(key, []).append(i)
        together = list(together.values())
        order = np.random.default_rng([self.seed, epoch]).permutation(len(together))
        examples = [i for k in order for i in together[k]]
        return [examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size)]

    def tokens(self, examples: list[int]) -> int:
        """How many tokens a micro-batch has. Shared images count once if `share_images`.

        Words that such examples have in common next to their images count each time, so the row may be a bit shorter.
        """
        total, last = 0, None
        for i in examples:
            size = self.sizes[i]
            key = self.images_keys[i], size.tokens > self.original_length
            total += size.tokens - (size.image_tokens if self.share_images and key == last else 0)
            last = key
        return total

    def crops(self, examples: list[int]) -> int:
        """How many crops a micro-batch has. Those of images that neighbours share count once."""
        keys = [self.images_keys[i] for i in examples]
        return sum(
            self.sizes[i].crops for i, key, last in zip(examples, keys, [None, *keys], strict=False) if key != last
        )

    def every_micro_batch(self) -> Iterator[list[int]]:
        """The micro-batches of all ranks in all epochs, without those that only fill up a step."""
        for epoch in range(self.epochs):
            for step in self._steps(epoch):
                yield from (own for own in self._division(step) if own)

    def _division(self, step: list[int]) -> list[list[int]]:
        """The micro-batches of all ranks of a step; some may be empty."""
        n = self.accumulation if len(step) == self.batch_size else self.rest_accumulation
        if self.max_tokens is None:
            cuts = np.linspace(0, len(step), n * self.world_size + 1).round().astype(int)
            return [step[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return self._bins(step, n)

    def _micro_batches(self, step: list[int]) -> list[list[int]]:
        """This rank's micro-batches of a step."""
        bins = [own or [~self.shortest] for own in self._division(step)]
        # Ranks wait for one another after each micro-batch, so those that run at the same time should be equally long.
        bins.sort(key=lambda own: -self.tokens([i if i >= 0 else ~i for i in own]))
        return bins[self.rank :: self.world_size]

    def _needed(self, step: list[int]) -> int:
        """The smallest number of micro-batches per rank into which the examples of a step fit."""
        n = max(1, math.ceil(self.tokens(step) / (self.max_tokens * self.world_size)))
        while self._bins(step, n) is None:
            n += 1
        return n

    def _needed_by_all(self, steps: list[list[int]], least: int) -> int:
        """The number of micro-batches per rank, at least `least`, into which each of these steps fits. It is the same
        for all steps, because the Trainer assumes that every epoch is as long as the first one, and that the last step
        of an epoch is not longer than the others."""
        n = max([least, *map(self._needed, steps)])
        while any(self._bins(step, n) is None for step in steps):
            n += 1
        return n

    def _bins(self, step: list[int], n: int) -> list[list[int]] | None:
        """The examples in n micro-batches per rank; None if they don't fit. The longest examples come first. Each
        goes into the micro-batch that has the fewest tokens."""
        fair = self.tokens(step) / (n * self.world_size)
        units = []
        for i in step:
            grown = units and self.images_keys[units[-1][0]] == self.images_keys[i] and units[-1] + [i]
            # Examples with the same images stay together, unless that would leave the other ranks waiting.
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
    """A DataLoader that passes the epoch, which the Trainer tells it, to its batch sampler."""

    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


def sampler_for(dataset: ConversationDataset, sizes: list[Size], batch_size: int, **options) -> StepSampler:
    """A StepSampler for a data set; `options` are StepSampler's."""
    return StepSampler(sizes, [dataset.images_key(i) for i in range(len(dataset))], batch_size, **options)
