"""Keeps the sizes of examples in the cache of `datasets`, so that a later run measures only new or changed ones."""

import contextlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..files import replacing
from ..image_files import formats
from .images import State
from .tables import writable_cache

Key = tuple[int, int]
FORM = 1  # to be raised when what is measured changes
FIELDS = 5  # of a Size
MOST = 10**6  # examples of one processor that are kept: 56 MB; a larger data set is kept whole


def key_of(text: str, images: Sequence, states: Sequence[State]) -> Key | None:
    """128 bits that change when an example's text, or the name, the size or a time of an image's file changes; None for
    an image that has no state, because it is in memory alone or can't be found."""
    if None in states:
        return None
    names = [str(image.get("path") if isinstance(image, dict) else image) for image in images]
    found = blake2b(repr((text, names, states)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


def settings_key(processor) -> str:
    """Changes with all but an example that its size depends on: the tokenizer and the settings of the processor."""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    content = repr((FORM, tokenizer, sorted(processor.image_processor.to_dict().items()), formats()))
    return blake2b(content.encode(), digest_size=16).hexdigest()


class KeptSizes:
    """The sizes that earlier runs with the same processor have measured. A file that can't be read counts as empty."""

    def __init__(self, processor):
        self.path = Path(writable_cache()) / "sizes-of-examples" / f"{settings_key(processor)}.npy"
        self.rows = np.zeros((2 + FIELDS, 0), np.uint64)  # (key and fields, examples), in the order of the keys
        with contextlib.suppress(OSError, ValueError, EOFError):
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if rows.dtype == np.uint64 and rows.ndim == 2 and len(rows) == len(self.rows):
                self.rows = np.asarray(rows)

    def get(self, key: Key) -> list[int] | None:
        """The fields of the Size that was kept under this key; None if there is none."""
        firsts = self.rows[0]
        i = firsts.searchsorted(np.uint64(key[0]))
        if i == len(firsts) or int(firsts[i]) != key[0] or int(self.rows[1, i]) != key[1]:
            return None
        return self.rows[2:, i].tolist()

    def add(self, rows: np.ndarray):
        """Writes the file with these sizes too, as rows of (key, fields), uint64. A cache that can't be written to, or
        a full disk, is no error: the next run measures again."""
        if np.isin(rows[:, 0], self.rows[0]).all():
            return
        others = self.rows[:, ~np.isin(self.rows[0], rows[:, 0])]
        known = np.concatenate([rows.T, others], axis=1)[:, : max(MOST, len(rows))]
        _, order = np.unique(known[0], return_index=True)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path, several_writers=True, durable=False) as partial, open(partial, "wb") as file:
                np.save(file, np.ascontiguousarray(known[:, order]))
