"""Measures all examples before training, and recognises a data set that has changed."""

import hashlib

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from ..errors import InputError
from ..ranks import is_first, is_first_of_node, rank, world_size
from .kept_sizes import KeptSizes
from .measuring import Size, measure

NO_KEY = (0, 0)  # of a size that is not kept


def all_sizes(dataset, desc: str, disable_tqdm: bool = False) -> list[Size]:
    """The `Size` of every example of a `ConversationDataset`, on every rank. All ranks call it and share the work.

    The sizes are kept in `dataset.sizes`, and for later runs as `KeptSizes` says. desc: what the progress bar says.
    Raises InputError if ranks have different data, or as `ConversationDataset.size` does.
    """
    if dataset.sizes is not None:
        return dataset.sizes
    probes = sorted({i * (len(dataset) - 1) // 15 for i in range(16)})
    probed = [(len(dataset), [tuple(dataset.size(i)) for i in probes])]  # on every rank, because disks may differ
    first, *others = gather_object(probed)
    for other, found in enumerate(others, 1):
        if found != first:
            numbers = f"{first[0]:,} and {found[0]:,} examples"
            if first[0] == found[0]:
                numbers = f"both have {first[0]:,} examples, but not the same ones"
            raise InputError(f"processes 0 and {other} have different data ({numbers}): give every node the same files")
    # Each rank measures neighbours, which often have the same images.
    first, end = (len(dataset) * n // world_size() for n in (rank(), rank() + 1))
    kept, no_bar = KeptSizes(dataset.processor), disable_tqdm or not is_first()
    found = tqdm(measure(dataset, range(first, end), kept), total=end - first, desc=desc, disable=no_bar)
    own = np.zeros((end - first, len(kept.rows)), np.uint64)
    for row, (size, key) in zip(own, found, strict=True):
        row[:] = *(key or NO_KEY), *size
    sizes = np.concatenate(gather_object([own]))
    if is_first_of_node():
        kept.add(sizes[sizes[:, :2].any(1)])
    dataset.sizes = [Size(*row) for row in sizes[:, 2:].tolist()]
    return dataset.sizes


def fingerprint(sizes: list[Size]) -> str:
    """16 hex digits that change when a text, the size of an image or of its file, or the examples' order changes."""
    return hashlib.sha256(repr([tuple(size) for size in sizes]).encode()).hexdigest()[:16]
