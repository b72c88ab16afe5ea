"""What every example takes, found out by all ranks together before a training."""

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
    """`size` of every example, looked up by all ranks together, once for a dataset."""
    if dataset.sizes is not None:
        return dataset.sizes
    probes = sorted({i * (len(dataset) - 1) // 15 for i in range(16)})
    looked_at = [(len(dataset), [tuple(dataset.size(i)) for i in probes])]  # on all ranks, as their disks may differ
    first, *others = gather_object(looked_at)
    for other, found in enumerate(others, 1):
        if found != first:
            raise InputError(
                f"processes 0 and {other} have different data: {first[0]:,} and {found[0]:,} examples, or others; give "
                "every node the same files"
            )
    own = range(rank(), len(dataset), world_size())
    sizes = [(i, dataset.size(i)) for i in tqdm(own, desc=desc, disable=disable_tqdm or not is_first())]
    dataset.sizes = [size for _, size in sorted(gather_object(sizes))]
    return dataset.sizes


def fingerprint(sizes: list[Size]) -> str:
    """Differs where a text, the size of an image or of its file, or the order of examples does."""
    return hashlib.sha256(repr([tuple(size) for size in sizes]).encode()).hexdigest()[:16]
