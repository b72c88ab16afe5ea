"""Data sets from the Hub, or from local folders of the same layout, as tables whose images are read when needed."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import datasets
import pyarrow.parquet as pq

from ..console import tell
from ..errors import BadExamples, InputError
from ..hub import fetch_data
from ..hub_names import data_revision
from ..inside import Inside, real_folders
from ..ranks import is_first, is_first_of_node
from .annotations import ROLES
from .table_files import damage, features_of, files_of_split
from .texts import text_problem
from .unsupported import tag_problem

ROW = "row_in_split"  # a column with the number that a row has in its split
PLACE = "place_of_row"  # a column with the row's place as messages name it: data set, split, file and row
FOLDER = "folder_of_row"  # a column with the folder that images without content must lie in
TEXTS_ABOUT_IMAGES = {"images": [datasets.Image], "texts": [{"user": str, "assistant": str}]}


def load_table(
    repo: str, config: str | None, split: str, data_dir: str | None, columns: dict, revisions: str | None = None
) -> datasets.Dataset:
    """A split of a data set, or a slice of a split ("train[500:]"), with the additional columns ROW, PLACE and FOLDER.

    Only parquet files below the folder are read, which are found by their names. A README with other files, a script,
    and what the files say of their columns are not looked at, so that nothing in them leads elsewhere.

    repo, config: the data set's repository on the Hub, and the name of its configuration.
    data_dir: a local folder to read instead of the Hub. It holds a folder with the repository's own name, laid out like
        a snapshot of the repository, or with the files right in it. The folder may be a link; links below it that lead
        out of it are refused.
    columns: the columns that the table must have, with their types, such as `TEXTS_ABOUT_IMAGES`.
    revisions: --data_revision.
    Raises InputError if the split can't be loaded, lacks a column, has it with another type, or is empty.
    """
    source = repo if data_dir is None else Path(data_dir) / repo.split("/")[1]
    where, name = f"{source}{f' ({config})' if config else ''}", split.split("[")[0]
    if data_dir is not None and not source.is_dir():
        raise InputError(f"--data_dir {data_dir} holds no folder {source.name}, a copy of {repo}")
    folder = fetch_data(repo, config, data_revision(repo, revisions)) if data_dir is None else source
    files = files_of_split(folder, config, name, where, data_dir is None)
    data_files = {name: [str(path.relative_to(folder)) for path in files]}
    cache_dir = _cache_dir(folder, files)
    try:
        table = datasets.load_dataset(
            "parquet",
            data_dir=str(folder),
            data_files=data_files,
            split=name,
            features=features_of(pq.read_schema(files[0])),
            cache_dir=cache_dir,
        )
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table)})
        rows = range(len(table))[part.from_ : part.to]
    except Exception as e:  # the many things that can go wrong here share no other class
        reason = damage(files, data_dir is None) or _reason(e)
        raise InputError(f"{where}, split {split}, can't be loaded: {reason}") from None
    for column, wanted in columns.items():
        if column not in table.column_names:
            raise InputError(f"{where} has no column {column!r}, only {', '.join(table.column_names)}")
        if not _fits(table.features[column], wanted):
            raise InputError(f"{where}: column {column!r} is {table.features[column]}, must be {wanted}")
    if len(rows) == 0:
        raise InputError(f"{where}, split {split}, is empty: it has {len(table)} rows")
    places = _places(f"{where}, {name}", files, len(table))[rows.start : rows.stop]
    table = table.select(rows).add_column(ROW, list(rows)).add_column(PLACE, places)
    return table.add_column(FOLDER, [str(folder)] * len(rows))


def _reason(error: Exception) -> str:
    """What an exception and its cause say. `datasets` often has the reason only in the cause."""
    cause = error.__cause__
    texts = [" ".join(str(e).split()) or type(e).__name__ for e in (error, cause) if e]
    return ": ".join(text.rstrip(".") for text in dict.fromkeys(texts))


def _places(where: str, files: list[Path], n_rows: int) -> list[str]:
    """For each row of a split, how messages name it."""
    counts = [pq.read_metadata(path).num_rows for path in files]
    if sum(counts) != n_rows:  # files of another kind, or in another order
        return [f"{where} row {i}" for i in range(n_rows)]
    in_files = ((path.name, k) for path, count in zip(files, counts, strict=True) for k in range(count))
    return [f"{where} row {i} (row {k} of {name})" for i, (name, k) in enumerate(in_files)]


def _fits(feature, wanted) -> bool:
    """Whether a column's type fits a description: Image, str, a list with one description, or a dict of several."""
    if isinstance(wanted, list):
        return isinstance(feature, datasets.List) and _fits(feature.feature, wanted[0])
    if isinstance(wanted, dict):
        return isinstance(feature, dict) and all(k in feature and _fits(feature[k], v) for k, v in wanted.items())
    if wanted is str:
        return getattr(feature, "dtype", None) in ("string", "large_string")
    return isinstance(feature, wanted)


def undecoded(table: datasets.Dataset, index: int) -> dict:
    """A row whose images are still `{"bytes", "path", "name"}`, as `open_image` takes them."""
    row = table.with_format("arrow")[index : index + 1].to_pylist()[0]
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            row[column] = image_of_row(row[column], row)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            images = [None] if row[column] is None else row[column]
            row[column] = [image_of_row(image, row, number) for number, image in enumerate(images, 1)]
    return row


def image_of_row(image: dict | None, row: dict, number: int | None = None) -> dict:
    """An image of a row with its name for messages. If its content is in a file, that must lie in the row's folder."""
    name = f"{row[PLACE]}: its image{f' {number}' if number else ''}"
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    if content is None and path is not None:
        path = Inside(os.path.join(row[FOLDER], path), _folders_once(row[FOLDER]))
    return {"bytes": content, "path": path, "name": name}


_folders_once = cache(real_folders)


def _cache_dir(folder: Path, files: list[Path]) -> str:
    """A cache folder for these files alone. In its usual cache, `datasets` would not notice that a file has changed,
    and would keep returning the old content."""
    states = [(str(path.relative_to(folder)), path.stat()) for path in files]
    content = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in states])
    return str(writable_cache() / f"local-{hashlib.sha1(content.encode()).hexdigest()}")


@cache
def writable_cache() -> Path:
    """The folder for tables and for the sizes of examples: that of `datasets`, or a temporary one if that can't
    be written to."""
    wanted = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()
        return wanted
    except OSError:
        other = Path(tempfile.gettempdir()) / f"datasets-of-{os.getuid()}"
        if is_first_of_node():
            tell(
                f"{wanted} can't be written to: tables and sizes are kept in {other}; "
                "HF_DATASETS_CACHE chooses another folder"
            )
        return other


def question_keys(table: datasets.Dataset, name: str, bad: BadExamples | None = None) -> list[tuple[int, int]]:
    """(index of the row, position in its list) of every question in the column `texts`.

    The column holds lists of `{"user", "assistant", …}`. name: the table's name in messages.
    Questions and answers that are missing or hold a token of the chat format are an error, or as `bad` says left out.
    Rank 0 prints how many texts hold a tag such as <video>, which stays in them.
    """
    keys, bad, tags = [], bad or BadExamples(), 0
    for i, (row, texts) in enumerate(zip(table[ROW], table["texts"], strict=True)):
        where = f"{name} row {row}"
        if texts is None:
            bad.add(where, "texts is missing")
            continue
        for item, text in enumerate(texts):
            problems = [" is missing"] if text is None else []
            for role in ROLES if text else ():
                if problem := text_problem(text[role]):
                    problems.append(f".{role} {problem}")
            for problem in problems:
                bad.add(where, f"texts[{item}]{problem}", example=item)
            if not problems:
                keys.append((i, item))
                tags += any(tag_problem(text[role]) is not None for role in ROLES)
    bad.settle(name, len(keys))
    if tags and is_first():
        tell(f"warning: {name}: {tags:,} examples hold a tag such as <video> or <image>, which is read as text")
    return keys


class Conversations(Sequence):
    """Conversations that are built from a table's rows at each access, so that images are not kept in memory.

    keys: for each conversation (index of its row, item), where `item` says which part of the row it is about.
    build: called with the row and `item`; returns the conversation.
    """

    def __init__(self, table: datasets.Dataset, keys: list[tuple[int, int]], build: Callable):
        self.table, self.keys, self.build = table, keys, build
        self._row = None, None  # the number and the content of the row that was read last

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(range(*i.indices(len(self))))
        index, item = self.keys[i]
        if self._row[0] != index:  # questions about the same row follow one another
            self._row = index, undecoded(self.table, index)
        return self.build(self._row[1], item)

    def select(self, indices: Iterable[int]) -> "Conversations":
        return Conversations(self.table, [self.keys[i] for i in indices], self.build)
