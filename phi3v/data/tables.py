"""Data sets of the Hub, or local folders of the same layout, as tables whose images stay on disk until needed."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets

from ..errors import InputError, Problems
from ..ranks import is_first
from .annotations import ROLES, text_problem
from .images import read_image

ROW = "row_in_split"
TEXTS_ABOUT_IMAGES = {"images": [datasets.Image], "texts": [{"user": str, "assistant": str}]}


def load_table(repo: str, config: str | None, split: str, data_dir: str | None, columns: dict) -> datasets.Dataset:
    """A split (or a slice of one, "train[500:]") of a data set, with a column `ROW` for the number that each row has
    in the split.

    data_dir: a folder that holds a folder by the repository's own name, laid out as a snapshot of the repository;
        None for the Hub.
    columns: what the table must have, as in `{"images": [Image], "texts": [{"user": str, "assistant": str}]}`.
    Raises InputError where it can't be loaded, lacks a column or has it with another type, or is empty.
    """
    source = repo if data_dir is None else Path(data_dir) / repo.split("/")[1]
    where = f"{source}{f' ({config})' if config else ''}"
    if data_dir is not None and not source.is_dir():
        raise InputError(f"--data_dir {data_dir} holds no folder {source.name}, a copy of {repo}")
    cache_dir = None if data_dir is None else _cache_dir(source)
    try:
        name = split.split("[")[0]
        table = datasets.load_dataset(str(source), config, split=name, cache_dir=cache_dir)
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table)})
        rows = range(len(table))[part.from_ : part.to]
    except Exception as e:  # what can go wrong on the way has no class in common
        raise InputError(f"{where}, split {split}, can't be loaded: {' '.join(str(e).split())[:300]}") from None
    for name, wanted in columns.items():
        if name not in table.column_names:
            raise InputError(f"{where} has no column {name!r}, only {', '.join(table.column_names)}")
        if not _fits(table.features[name], wanted):
            raise InputError(f"{where}: column {name!r} is {table.features[name]}, must be like {wanted}")
    if len(rows) == 0:
        raise InputError(f"{where}, split {split}, is empty: it has {len(table)} rows")
    return table.select(rows).add_column(ROW, list(rows))


def _fits(feature, wanted) -> bool:
    """Whether a column's type is the one described: Image, str, a list of one description, or a dict of several."""
    if isinstance(wanted, list):
        return isinstance(feature, datasets.List) and _fits(feature.feature, wanted[0])
    if isinstance(wanted, dict):
        return isinstance(feature, dict) and all(k in feature and _fits(feature[k], v) for k, v in wanted.items())
    if wanted is str:
        return getattr(feature, "dtype", None) in ("string", "large_string")
    return isinstance(feature, wanted)


def undecoded(table: datasets.Dataset, index: int) -> dict:
    """A row whose images are still `{"bytes", "path"}`, so that they are opened where errors can name them."""
    return table.with_format("arrow")[index : index + 1].to_pylist()[0]


def _cache_dir(folder: Path) -> str:
    """A cache for just these files: under its usual one, `datasets` would go on giving the old content of a folder
    whose files have changed since."""
    files = [(str(path.relative_to(folder)), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    content = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{hashlib.sha1(content.encode()).hexdigest()}")


def without_seen_images(train: datasets.Dataset, evaluation: datasets.Dataset) -> datasets.Dataset:
    """`train` without the rows of which an image is also in `evaluation`, pixel for pixel; says how many there were.

    Both have a column `image`, or `images` with several. The hashes are kept in the cache of `datasets`.
    """
    seen = {digest for row in _hashes(evaluation) for digest in row}
    keep = [i for i, row in enumerate(_hashes(train)) if seen.isdisjoint(row)]
    if len(keep) == len(train):
        return train
    if is_first():
        print(f"{len(train) - len(keep)} of {len(train)} training rows left out: their images are evaluated on")
    if not keep:
        raise InputError("every training image is in the evaluation set too: choose another split")
    return train.select(keep)


def _hashes(table: datasets.Dataset):
    column = "images" if "images" in table.column_names else "image"

    def digest(batch) -> dict:
        hashes = []
        for row in batch.to_pylist():
            hashes.append([])
            for image in row[column] if isinstance(row[column], list) else [row[column]]:
                rgb = read_image(image, f"row {row[ROW]}: its image")
                hashes[-1].append(hashlib.sha1(repr(rgb.size).encode() + rgb.tobytes()).hexdigest())
        return {"hashes": hashes}

    pixels = table.select_columns([column, ROW]).with_format("arrow")
    hashed = pixels.map(
        digest,
        batched=True,
        batch_size=32,
        num_proc=min(8, len(os.sched_getaffinity(0))) if len(table) > 5000 else None,
        remove_columns=[column, ROW],
        desc="hashing images",
    )
    return hashed.with_format(None)["hashes"]


def question_keys(table: datasets.Dataset, name: str) -> list[tuple[int, int]]:
    """(index, item) of every question in the column `texts`, which holds lists of `{"user", "assistant", …}`.

    name: the table's, for messages. Raises one InputError for all questions and answers that are missing or hold a
    token of the chat format.
    """
    keys, problems = [], Problems()
    for i, (row, texts) in enumerate(zip(table[ROW], table["texts"], strict=True)):
        where = f"{name} row {row}"
        if texts is None:
            problems.add(where, "texts is missing")
            continue
        for item, text in enumerate(texts):
            if text is None:
                problems.add(where, f"texts[{item}] is missing")
                continue
            for role in ROLES:
                if problem := text_problem(text[role]):
                    problems.add(where, f"texts[{item}].{role} {problem}")
            keys.append((i, item))
    problems.raise_if_any(name)
    return keys


class Conversations(Sequence):
    """Conversations that are built from a table's rows when they are asked for.

    keys: (index, item) for each conversation; build: makes it of the table's content there, and of `item`.
    """

    def __init__(self, table: datasets.Dataset, keys: list[tuple[int, int]], build: Callable):
        self.table, self.keys, self.build = table, keys, build

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(range(*i.indices(len(self))))
        index, item = self.keys[i]
        return self.build(undecoded(self.table, index), item)

    def select(self, indices: Iterable[int]) -> "Conversations":
        return Conversations(self.table, [self.keys[i] for i in indices], self.build)
