"""Which examples make a step, and how they are divided among ranks."""

from types import SimpleNamespace

import pytest
import torch

from phi3v.data.sampler import StepSampler
from phi3v.data.sizes import Size
from phi3v.errors import InputError
from phi3v.model.packing import IGNORE_INDEX, pack
from phi3v.training.hardware import ATTENTION
from phi3v.training.steps import plan_steps, shares_images


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


ORIGINAL = 60  # tokens from which examples take the long rotary factors


def question(image_tokens, text, key):
    """An example as `ConversationDataset` encodes it: an image of so many tokens, and then these words."""
    ids = torch.cat([torch.full((image_tokens,), -1), torch.tensor(text)])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-2:] = ids[-2:]
    tiles = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": [(1, 1)], "images_key": key}


def counted_and_packed(attention, examples, share_images=True):
    """How many tokens the sampler counts for a micro-batch, and how many its row has."""
    args = SimpleNamespace(share_images=share_images, attn_implementation=attention, batch_size=len(examples))
    args.batch_size_per_gpu = len(examples)
    training_args = SimpleNamespace(max_steps=1, num_train_epochs=1, seed=0, process_index=0, world_size=1)
    sizes = [Size(len(e["input_ids"]), int((e["input_ids"] < 0).sum()), 2, 2, 0) for e in examples]
    dataset = SimpleNamespace(sizes=sizes, images_key=lambda i: examples[i]["images_key"])
    dataset = type("Data", (SimpleNamespace,), {"__len__": lambda self: len(examples)})(**vars(dataset))
    _, sampler = plan_steps(args, training_args, dataset, None, ORIGINAL)
    row = pack(examples, ORIGINAL, shares_images(args))["input_ids"]
    return sampler.tokens(range(len(examples))), row.shape[1]


@pytest.mark.parametrize("share_images", [True, False])
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_count_of_a_micro_batch_is_the_length_of_its_row(attention, share_images):
    """Eight questions about one page, with different first words, and examples that share no image with others."""
    page = [question(30, [100 + i, *range(5 + i)], key="page") for i in range(8)]
    counted, packed = counted_and_packed(attention, page, share_images)
    assert counted == packed == (30 + 8 * 6 + 28 if share_images else 8 * 36 + 28)
    alone = [question(30, range(7), key=None), question(0, range(9), key=None)]
    counted, packed = counted_and_packed(attention, [*page[:3], *alone, *page[3:]], share_images)
    assert counted == packed


@pytest.mark.parametrize("attention", ATTENTION)
def test_examples_beyond_the_original_length_share_no_image_with_shorter_ones(attention):
    mixed = [question(30, [100 + i, *range(5 if i < 2 else 40)], key="page") for i in range(4)]
    counted, packed = counted_and_packed(attention, mixed)
    assert counted == packed


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_row_is_never_longer_than_counted(attention):
    alike = [question(30, [*range(6), 100 + i, 1, 2], key="page") for i in range(8)]  # six first words in common
    counted, packed = counted_and_packed(attention, alike)
    assert counted - packed == 7 * 6
