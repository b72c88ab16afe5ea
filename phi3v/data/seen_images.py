"""Training rows whose images are in the evaluation set too are left out."""

import hashlib
import os

import datasets

from ..console import tell
from ..errors import BadExamples, InputError
from ..ranks import is_first
from .images import read_image
from .tables import FOLDER, PLACE, image_of_row


def without_seen_images(
    train: datasets.Dataset, evaluation: datasets.Dataset, bad: BadExamples | None = None
) -> datasets.Dataset:
    """`train` without the rows that have an image which is also in `evaluation`, pixel for pixel.

    Both tables have a column `image`, or a column `images` with lists. The images' hashes are cached by `datasets`.
    Rank 0 prints how many rows were left out. Raises InputError if no row is left, and for an image that can't be read,
    unless `bad` says that such examples are left out; this happens later, when the image is needed.
    """
    skip = bad is not None and bad.skip
    seen = {digest for row in _hashes(evaluation, skip) for digest in row}
    keep = [i for i, row in enumerate(_hashes(train, skip)) if seen.isdisjoint(row)]
    if len(keep) == len(train):
        return train
    if is_first():
        tell(f"{len(train) - len(keep)} of {len(train)} training rows left out: their images are in the evaluation set")
    if not keep:
        raise InputError("every training image is in the evaluation set too: choose another split")
    return train.select(keep)


def _hashes(table: datasets.Dataset, skip: bool):
    """For each row the hashes of its images' sizes and pixels; with `skip` without images that can't be read."""
    column = "images" if "images" in table.column_names else "image"

    def digest(batch) -> dict:
        hashes = []
        for row in batch.to_pylist():
            hashes.append([])
            for image in row[column] if isinstance(row[column], list) else [row[column]]:
                try:
                    rgb = read_image(image_of_row(image, row), f"{row[PLACE]}: its image")
                except InputError:
                    if skip:
                        continue
                    raise
                hashes[-1].append(hashlib.sha1(repr(rgb.size).encode() + rgb.tobytes()).hexdigest())
        return {"hashes": hashes}

    pixels = table.select_columns([column, PLACE, FOLDER]).with_format("arrow")
    hashed = pixels.map(
        digest,
        batched=True,
        batch_size=32,
        num_proc=min(8, len(os.sched_getaffinity(0))) if len(table) > 5000 else None,
        remove_columns=[column, PLACE, FOLDER],
        desc="hashing images",
    )
    return hashed.with_format(None)["hashes"]
