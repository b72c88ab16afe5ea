"""Makes DataLoaders whose workers fit into this machine's shared memory, and waits for their batches, but not for ever.

Workers hand over each batch in /dev/shm, with each of torch's strategies; a container often has 64 MiB of it.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader

from ..console import say
from ..errors import InputError
from ..ranks import local_world_size
from ..workers import begin_worker

SHARED_MEMORY = "/dev/shm"
USABLE_SHARE = 0.8  # of what is free there; NCCL and other programs need some too
PAGES = 64 * 2**10  # bytes: each of a batch's small tensors takes whole pages
BYTES_OF_TOKEN = 64  # its id, position, label and mask
POLL = 5  # seconds after which the process that waits for a batch looks for signals and dead workers
LONGEST_WAIT = 600  # seconds for one batch
# Called every POLL seconds of a wait, with the seconds waited so far. They may raise.
on_long_wait: list[Callable[[float], None]] = []


def shared_memory() -> float:
    """Bytes of shared memory that the workers of this process may fill; infinite where there is no limit of its own."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return float("inf")
    return USABLE_SHARE * state.f_bavail * state.f_frsize / local_world_size()


def plan_workers(
    workers: int, prefetch: int, batches: int, batch_bytes: float, held: int, room: float
) -> tuple[int, int]:
    """As many workers and as much prefetching as fit into `room` bytes, which changes the speed alone.

    workers, prefetch: what was asked for. batches: how many there are to make.
    batch_bytes: of the largest batch. held: how many batches the main process holds itself.
    Returns the workers, 0 if the main process has to make the batches, and the batches that each prepares in advance.
    """
    workers = min(workers, batches)
    affordable = int(room // batch_bytes) - held if room < float("inf") else workers * prefetch
    if affordable >= workers * prefetch:
        return workers, prefetch
    workers = max(0, min(workers, affordable))
    return workers, affordable // workers if workers else prefetch


def largest_batch(sizes: list, examples: int, tokens: int | None, bytes_of_crops: Callable[[int], float]) -> float:
    """The most bytes that a batch can have.

    sizes: the `Size` of each example. A batch has so many examples, or with `tokens` as many as have that many tokens.
    bytes_of_crops: takes a number of crops.
    """
    if tokens:
        crops = max(size.crops / size.tokens for size in sizes) * tokens
    else:
        crops = sum(sorted((size.crops for size in sizes), reverse=True)[:examples])
        tokens = max(size.tokens for size in sizes) * examples
    return bytes_of_crops(crops) + tokens * BYTES_OF_TOKEN + PAGES


def make_loader(
    dataset,
    *,
    num_workers: int,
    batch_bytes: float = 0,
    batches: int,
    prefetch: int | None = None,
    held: int = 1,
    kind: type = DataLoader,
    **options,
) -> DataLoader:
    """A DataLoader with at most `num_workers` workers: fewer if shared memory has no room for their batches, which
    rank 0 then says once. Read it with `batches_of` or `next_batch`.

    batch_bytes, batches, held: as in `plan_workers`; kind: the class of the DataLoader; options: its other arguments.
    """
    asked = prefetch or 2
    room = shared_memory()
    workers, prefetch = plan_workers(num_workers, asked, batches, max(batch_bytes, 1), held, room)
    if (workers, prefetch) != (min(num_workers, batches), asked):
        _say_once(
            f"{SHARED_MEMORY} has room for {room / 2**20:,.0f} MiB of a process's batches, of up to "
            f"{batch_bytes / 2**20:.1f} MiB each: "
            + (f"{workers} workers prepare {prefetch} each in advance" if workers else "the main process makes them")
            + f" instead of {num_workers} workers {asked} each, which is slower; docker run --shm-size gives more room"
        )
    if workers:
        options |= {"prefetch_factor": prefetch, "timeout": POLL, "worker_init_fn": begin_worker}
    else:
        options.pop("multiprocessing_context", None)
    return kind(dataset, num_workers=workers, **options)


@functools.cache
def _say_once(message: str):
    say(message)


def next_batch(iterator: Iterator):
    """The next item of a DataLoader's iterator. Raises InputError if none comes in LONGEST_WAIT seconds."""
    start = time.monotonic()
    while True:
        try:
            return next(iterator)
        except RuntimeError as e:
            if not str(e).startswith("DataLoader timed out"):
                raise
        waited = time.monotonic() - start
        for call in on_long_wait:
            call(waited)
        if waited >= LONGEST_WAIT:
            raise InputError(
                f"the processes that prepare images have made no batch for {waited:.0f} s: perhaps a disk does not "
                "answer, or memory is so short that they hardly run; --dataloader_num_workers 0 shows where they wait"
            )


def batches_of(loader: DataLoader) -> Iterator:
    """All batches of a DataLoader, as `next_batch` gives them."""
    iterator = iter(loader)
    while True:
        try:
            batch = next_batch(iterator)
        except StopIteration:
            return
        yield batch
