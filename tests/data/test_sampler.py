"""Which examples make a step, and how they are divided among ranks."""

import pytest

from phi3v.data.sampler import StepSampler
from phi3v.data.sizes import Size
from phi3v.errors import InputError


def sampler(sizes, images=None, batch_size=8, **options):
    return StepSampler(sizes, images or [None] * len(sizes), batch_size, **options)


SIZES = [Size(50 + 37 * i % 400, 30, 2, 5, i) for i in range(45)]
IMAGES = [i // 4 if i < 24 else None for i in range(45)]


@pytest.mark.parametrize("options", [{"examples_per_gpu": 2}, {"max_tokens": 900}], ids=["count", "tokens"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_example_is_trained_on_once_an_epoch(world_size, options):
    ranks = [sampler(SIZES, IMAGES, world_size=world_size, rank=r, epochs=3, **options) for r in range(world_size)]
    seen = []
    for epoch in range(3):
        for rank in ranks:
            rank.set_epoch(epoch)
        rows = [list(rank) for rank in ranks]
        assert len({len(row) for row in rows}) == 1 and len(rows[0]) == len(ranks[0])
        n = ranks[0].accumulation
        real = [i for row in rows for own in row for i in own if i >= 0]
        assert sorted(real) == list(range(45))
        for step in range(45 // 8):  # the steps that are full hold as many examples as asked for
            assert sum(len([i for i in own if i >= 0]) for row in rows for own in row[step * n : step * n + n]) == 8
        if "max_tokens" in options:
            assert all(rank.tokens(own) <= 900 for rank, row in zip(ranks, rows, strict=True) for own in row)
        seen.append(rows)
    assert seen[0] != seen[1]
    again = sampler(SIZES, IMAGES, world_size=world_size, rank=0, epochs=3, **options)
    assert list(again) == seen[0][0]


def test_the_load_is_even_over_ranks():
    ranks = [sampler(SIZES, batch_size=16, world_size=2, rank=r, max_tokens=1500) for r in (0, 1)]
    steps = list(zip(*ranks, strict=True))
    for first, second in steps[: 2 * ranks[0].accumulation]:
        assert abs(ranks[0].tokens(first) - ranks[0].tokens(second)) <= 150


def test_questions_of_one_image_stay_together():
    batches = list(sampler(SIZES, IMAGES, batch_size=8, examples_per_gpu=4))
    together = sum(
        IMAGES[a] is not None and IMAGES[a] == IMAGES[b] for own in batches for a, b in zip(own, own[1:], strict=False)
    )
    assert together >= 12


def test_an_example_that_fits_nowhere_is_named():
    with pytest.raises(InputError, match="--max_tokens_per_gpu 200 is less than the 449 tokens of example"):
        sampler([*SIZES, Size(449, 30, 2, 5, 0)], max_tokens=200)
