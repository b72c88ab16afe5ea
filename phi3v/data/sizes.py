"""Measures all examples before training, and recognises a data set that has changed."""

import hashlib
import os
import zlib
from typing import NamedTuple

from accelerate.utils import gather_object
from tqdm import tqdm

from ..errors import InputError
from ..ranks import is_first, rank, world_size


class Size(NamedTuple):
    """How large an example is, and a checksum by which a changed example is noticed."""

    tokens: int
    image_tokens: int  # of these tokens
    crops: int  # sub-crops and global crops of all its images
    targets: int  # supervised tokens
    digest: int  # as `digest` computes it


def digest(text: str, images: list) -> int:
    """A checksum of an example's text and of its images, without reading an image's file."""
    return zlib.crc32(repr([text, *map(_file_size_or_checksum, images)]).encode())


def _file_size_or_checksum(image) -> int | None:
    """The size of an image's file in bytes, or a checksum of a file's content that is in memory; None for others."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return zlib.crc32(image["bytes"])
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
        return os.path.getsize(path)
    return None


def all_sizes(dataset, desc: str, disable_tqdm: bool = False) -> list[Size]:
    """The `Size` of every example of a `ConversationDataset`, on every rank. All ranks call it and share the work.

    The sizes are kept in `dataset.sizes`. desc: what the progress bar says.
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
    own = range(rank(), len(dataset), world_size())
    sizes = [(i, dataset.size(i)) for i in tqdm(own, desc=desc, disable=disable_tqdm or not is_first())]
    dataset.sizes = [size for _, size in sorted(gather_object(sizes))]
    return dataset.sizes


def fingerprint(sizes: list[Size]) -> str:
    """16 hex digits that change when a text, the size of an image or of its file, or the examples' order changes."""
    return hashlib.sha256(repr([tuple(size) for size in sizes]).encode()).hexdigest()[:16]
