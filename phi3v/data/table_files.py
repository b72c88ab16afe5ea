"""The parquet files of a table: which ones they are, what their columns hold, and where they are damaged."""

import os
import re
import shlex
import stat
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from ..hub import missing_parts
from ..inside import is_inside, real_folders


def files_of_split(folder: Path, config: str | None, split: str, where: str, on_hub: bool) -> list[Path]:
    """The parquet files of a split, in their order.

    where: the table's name in messages. on_hub: whether the folder is from the Hub.
    Raises InputError if some or all are missing, and for a file that is no regular one or lies outside of the folder.
    """
    found = sorted((folder / (config or "data")).glob("*-*.parquet"))
    files = [path for path in found if path.name.startswith(f"{split}-")]
    if (found or on_hub) and not files:
        splits = ", ".join(sorted({path.name.partition("-")[0] for path in found}))
        raise InputError(f"{where} has no split {split!r}" + (f", only {splits}" if splits else " on the Hub"))
    for own in (folder / config if config else folder / "data", folder):
        files = files or sorted({*own.glob(f"{split}-*.parquet"), *own.glob(f"{split}.parquet")})
    if not files:
        wanted = folder / (config or "data") / f"{split}-*.parquet"
        raise InputError(f"{where}, split {split}, can't be loaded: there is no file {wanted}")
    if missing := missing_parts(files):
        raise InputError(f"{where}, split {split}: {folder} lacks {_some(missing)}: copy all files of the data set")
    folders = real_folders(folder)
    for path in files:
        if not is_inside(os.path.realpath(path), folders):
            raise InputError(f"{path} is a link out of {folder}: put the file itself there")
        if not re.fullmatch(r"[\w.+-]+", path.name):  # `datasets` reads addresses and patterns in names
            raise InputError(f"{path}: rename the file, so that its name has letters, digits and -_.+ only")
        if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a regular file: copy the data set again")
    return files


def features_of(schema: pa.Schema) -> datasets.Features:
    """The types of columns by how they are stored. A file can say that a column is of a type for which `datasets` opens
    whatever file or address the column names. Here, images are the only such type, and `undecoded` reads them."""
    features = datasets.Features.from_arrow_schema(schema.remove_metadata())
    for field in schema:
        if _is_image(field.type):
            features[field.name] = datasets.Image()
        elif pa.types.is_list(field.type) and _is_image(field.type.value_type):
            features[field.name] = datasets.List(datasets.Image())
    return features


def _is_image(type: pa.DataType) -> bool:
    if not pa.types.is_struct(type) or {field.name for field in type} != {"bytes", "path"}:
        return False
    content, path = type.field("bytes").type, type.field("path").type
    return any(is_type(content) for is_type in (pa.types.is_binary, pa.types.is_large_binary)) and any(
        is_type(path) for is_type in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    )


def damage(files: list[Path], in_hub_cache: bool) -> str | None:
    """Which of the parquet files is damaged, from which row on, and what to do; None if all can be read."""
    for path in files:
        row = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1):
                    row += len(batch)
        except (OSError, pa.ArrowException, ValueError) as e:
            name, reason = f"{path.parent.name}/{path.name}", " ".join(str(e).split())
            help = "copy the file again"
            if in_hub_cache:
                help = f"run `rm {shlex.quote(os.path.realpath(path))}` and start again, and it is downloaded anew"
            return f"{name} is damaged at its row {row} ({reason}): {help}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more files" if len(names) > 10 else "")
