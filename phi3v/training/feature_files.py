"""The files of the cache of vision features: where they are, reading and writing them.

Each image has one file, `FOLDER/<model>/<image>.safetensors`, with the rows that `Phi3VImageEmbedding` computes from
its crops, without the separators. The model's part of the name is a digest of everything that the features depend
on, and the image's part is a digest of its content, so that features of another model or another image are never used.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..data.images import image_name, read_bytes
from ..errors import InputError
from ..files import replacing
from ..inside import open_file
from ..model.rgb import exif_orientation

MOST_HEADER_BYTES = 10_000  # of a file, beside its features
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors names them


class FeatureCache:
    """Reads features from the cache, which a `ConversationDataset` then returns in place of crops.

    folder: holds the features of one model.
    rows: of features for one crop.
    width: of a row, the hidden size of the decoder.
    """

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype):
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype

    def path(self, image) -> Path:
        return self.folder / f"{_image_digest(image)}.safetensors"

    def read(self, images: Sequence, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The features (n_crops * rows, width) of all images, which have these sub-crops (down, across).

        Raises InputError if an image can't be read, and if its features are missing or not what they must be.
        """
        features = [torch.zeros(0, self.width, dtype=self.dtype)]
        for image, grid in zip(images, grids, strict=True):
            path = self.path(image)
            try:
                self.check_shape(path, grid)
                features.append(load_file(path)["features"])
                if not all_finite(features[-1]):
                    raise ValueError("some of its numbers are NaN or infinite")
            except (OSError, SafetensorError, ValueError) as e:
                raise InputError(
                    f"{path}, the features of {image_name(image)}, can't be read ({e}): delete the file if "
                    "it is damaged, and start again; all nodes must see the same folder"
                ) from None
        return torch.cat(features)

    def check_shape(self, path: Path, grid: tuple[int, int]):
        """Looks at all of a file but the features' numbers. Raises ValueError, OSError or SafetensorError if it does
        not hold the features of an image with these sub-crops."""
        crops = grid[0] * grid[1] + 1
        with open_file(path) as file:
            if file.seek(0, os.SEEK_END) > self.bytes_of(crops) + MOST_HEADER_BYTES:
                raise ValueError("the file is too large")
        with safe_open(path, "pt") as content:
            if set(content.keys()) != {"features", "grid"}:
                raise ValueError(f"it holds {', '.join(sorted(content.keys()))!r:.80}, not features and grid")
            features, stored = (content.get_slice(name) for name in ("features", "grid"))
            found = features.get_dtype(), features.get_shape()
            wanted = DTYPES[self.dtype], [crops * self.rows, self.width]
            if found != wanted:
                raise ValueError(f"it holds features {found[1]} of {found[0]}, not {wanted[1]} of {wanted[0]}")
            if (stored.get_dtype(), stored.get_shape()) != ("I64", [2]) or stored[:].tolist() != list(grid):
                raise ValueError(f"it is of an image that does not have {grid[0]} x {grid[1]} sub-crops")

    def bytes_of(self, crops: int) -> int:
        return crops * self.rows * self.width * self.dtype.itemsize

    def blank(self, grids: list[tuple[int, int]]) -> torch.Tensor:
        """Features of zeros, for images with these sub-crops that can't be read."""
        return torch.zeros(sum(h * w + 1 for h, w in grids) * self.rows, self.width, dtype=self.dtype)


def _image_digest(image) -> str:
    """A digest of the image's file, or of its pixels if it is in memory. Raises InputError if a file can't be read."""
    if isinstance(image, Image.Image):
        facts = (image.mode, image.size, image.getpalette())
        if (orientation := exif_orientation(image)) != 1:
            facts += (orientation,)
        content = repr(facts).encode() + image.tobytes()
        return hashlib.sha256(content).hexdigest()[:32]
    return hashlib.sha256(read_bytes(image)).hexdigest()[:32]


def all_finite(features: torch.Tensor) -> bool:
    return all(map(math.isfinite, torch.stack(features.aminmax()).tolist()))


def write_features(path: Path, features: torch.Tensor, grid: tuple[int, int]):
    """Writes the features of an image, whole or not at all, even if two runs write the same file at the same time.

    Raises InputError if the file can't be written.
    """
    content = {"features": features.cpu(), "grid": torch.tensor(grid)}
    try:
        with replacing(path, durable=False, several_writers=True) as partial:
            save_file(content, partial)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} can't be written ({' '.join(str(e).split())}): free disk space") from None


def reading_seconds(path: Path) -> float:
    """The time to read a file of features from the disk. Asks the system to drop its copy in memory before."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    load_file(path)["features"].clone()
    return time.perf_counter() - start


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run may rename or delete the file at this moment
            total += path.stat().st_size if path.is_file() else 0
    return total
