"""The files of the cache of vision features: where they are, reading and writing them.

Each image has one file, `FOLDER/<model>/<image>.safetensors`, with the rows that `Phi3VImageEmbedding` computes from
its crops, without the separators. The model's part of the name is a digest of everything that the features depend
on, and the image's part is a digest of its content, so that features of another model or another image are never used.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.images import image_name
from ..errors import InputError
from ..files import replacing
from ..model.rgb import exif_orientation


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

    def read(self, images: Sequence) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """The features (n_crops * rows, width) of all images, and the (down, across) sub-crops of each image.

        Raises InputError if an image can't be read, and if its features are missing or damaged.
        """
        features, grids = [torch.zeros(0, self.width, dtype=self.dtype)], []
        for image in images:
            path = self.path(image)
            try:
                content = load_file(path)
                features.append(content["features"])
                grids.append(tuple(content["grid"].tolist()))
            except (OSError, SafetensorError, KeyError) as e:
                raise InputError(
                    f"{path}, the features of {image_name(image)}, can't be read ({e}): delete the file if "
                    "it is damaged, and start again; all nodes must see the same folder"
                ) from None
        return torch.cat(features), grids

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
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is None:
        try:
            content = Path(image["path"] if isinstance(image, dict) else image).read_bytes()
        except (OSError, TypeError) as e:
            raise InputError(f"{image_name(image)} can't be read ({e})") from None
    return hashlib.sha256(content).hexdigest()[:32]


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
