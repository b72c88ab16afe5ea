"""Workers fit into the shared memory of the machine, and what they make does not depend on how many they are."""

import pytest
import torch
from helpers import digest_of_weights, train

from phi3v.data import loading
from phi3v.data.collate import Collator, PackingCollator
from phi3v.data.conversations import ConversationDataset
from phi3v.data.loading import largest_batch, plan_workers
from phi3v.data.sizes import all_sizes


@pytest.mark.parametrize(
    ("workers", "prefetch", "batches", "held", "room", "planned"),
    [
        (8, 4, 1000, 1, float("inf"), (8, 4)),
        (8, 4, 1000, 1, 33, (8, 4)),
        (8, 4, 1000, 1, 32, (8, 3)),
        (8, 4, 1000, 1, 9, (8, 1)),
        (8, 4, 1000, 1, 8, (7, 1)),
        (8, 4, 1000, 1, 2, (1, 1)),
        (1, 4, 1000, 1, 3.9, (1, 2)),
        (8, 4, 1000, 1, 1.9, (0, 4)),
        (8, 4, 1000, 5, 5, (0, 4)),
        (8, 4, 1000, 1, 0, (0, 4)),
        (5000, 4, 6, 1, float("inf"), (6, 4)),  # a worker without a batch has nothing to do
        (0, 2, 6, 1, 0, (0, 2)),
    ],
)
def test_prefetching_is_lowered_before_workers(workers, prefetch, batches, held, room, planned):
    assert plan_workers(workers, prefetch, batches, 1, held, room) == planned
    found_workers, found_prefetch = planned
    assert found_workers == 0 or found_workers * found_prefetch + held <= room


def bytes_of(batch: dict) -> int:
    parts = [*batch.values(), *vars(batch.get("packing", Collator)).values()]
    pages = [-(-part.nbytes // 4096) * 4096 for part in parts if isinstance(part, torch.Tensor)]
    return sum(pages)


def test_no_batch_is_larger_than_expected(toy_examples, processor):
    dataset = ConversationDataset(toy_examples, processor)
    sizes = all_sizes(dataset, "", disable_tqdm=True)
    collators = [PackingCollator(processor, 4096, False), Collator(processor, "left", normalise=False)]
    for collate in collators:
        for n in (1, 3, len(dataset)):
            batches = [collate([dataset[i] for i in range(k, min(k + n, len(dataset)))]) for k in range(0, 24, n)]
            largest = max(map(bytes_of, batches))
            tokens = max(sum(size.tokens for size in sizes[k : k + n]) for k in range(0, 24, n))
            expected = largest_batch(sizes, n, None, dataset.bytes_of_crops)
            assert largest <= expected
            assert largest <= largest_batch(sizes, 1, tokens, dataset.bytes_of_crops)
    assert expected < 4 * largest


@pytest.mark.slow
def test_too_little_shared_memory_changes_the_speed_alone(toy_data, tmp_path, monkeypatch, capsys):
    flags = "--max_steps 2 --batch_size 4 --learning_rate 1e-3 --deepspeed none --no_eval_before".split()
    flags += ["--dataloader_num_workers", "2", "--dataloader_pin_memory", "false"]
    digests = set()
    cases = {float("inf"): None, 1.75 * 2**20: "2 workers prepare 1 each", 0: "the main process makes them"}
    for room, said in cases.items():
        loading._say_once.cache_clear()
        monkeypatch.setattr(loading, "shared_memory", lambda room=room: room)
        train(toy_data, tmp_path / str(room), *flags)
        digests.add(digest_of_weights(tmp_path / str(room)))
        lines = [line for line in capsys.readouterr().out.splitlines() if "/dev/shm has room for" in line]
        assert len(lines) == (2 if said else 0) and (not said or said in lines[0])  # training, and evaluation
    assert len(digests) == 1
