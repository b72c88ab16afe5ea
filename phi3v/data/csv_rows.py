"""Reads the rows of a CSV or TSV file, and finds rows that are not what their writer meant."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import BadExamples, InputError
from .text_files import text_of

DELIMITERS = {".csv": (",", "a comma"), ".tsv": ("\t", "a tab")}
MOST_AGAIN = 2_000_000  # lines that are read again after rows with wrong quotes, beside three times all lines
_LINE_BREAK = re.compile("\r\n|\r|\n")
_QUOTES = 'put quotes around the whole field, and write each quote inside of it twice, as in "5"" wide"'


def rows(path: Path, bad: BadExamples, is_image: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Yields for each row of a table where it starts and its fields by column; None for a row that was added to `bad`.

    is_image: whether a text names an image. A row is bad if it has more or fewer fields than
    the header, or if a quote of it is not closed, so that it would swallow the rows that follow.
    Raises InputError for a header without the columns image (or images), question and answer, or with one twice.
    """
    delimiter, delimiter_name = DELIMITERS[path.suffix.lower()]
    lines = list(io.StringIO(text_of(path), newline=""))  # not splitlines, which also splits at U+2028
    found = _records(path, lines, delimiter, is_image)
    _, header, problem = next((record for record in found if record[1] or record[2]), (0, [], None))
    if problem:
        raise InputError(f"{path}:1: {problem}")
    missing = [name for name in ("image", "question", "answer") if name not in header]
    if missing and not (missing == ["image"] and "images" in header):
        raise InputError(
            f"{path}: there is no column {', '.join(missing)}, only {header!r:.300}: the first line must name the "
            f"columns in small letters, with {delimiter_name} between them"
        )
    if twice := [name for name, n in Counter(header).items() if name and n > 1]:
        raise InputError(f"{path}: the column {twice[0]!r:.100} is there twice: rename or remove one")
    for number, fields, problem in found:
        where = f"{path}:{number}"
        if not any(fields) and not problem:
            continue  # an empty line, or one of nothing but delimiters
        if not problem and len(fields) != len(header):
            problem = (
                f"the row has {len(fields)} fields, but the header has {len(header)}: {fields!r:.200}; put quotes "
                f"around a field that holds {delimiter_name}"
            )
        if problem:
            bad.add(where, problem)
        yield where, None if problem else dict(zip(header, fields, strict=True))


def _records(path: Path, lines: list[str], delimiter: str, is_image) -> Iterator[tuple[int, list[str], str | None]]:
    """Yields the number of the first line, the fields and the problem of each record.

    After a record whose quotes are wrong, reading resumes at its second line, so that the lines that it has swallowed
    are read as rows of their own. Raises InputError if this would take quadratic time.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is less than a long answer
    start, first, reader, header, again = 0, 0, None, None, 0
    while start < len(lines):
        if reader is None:
            first, rest = start, (lines[i] for i in range(start, len(lines)))
            reader = csv.reader(rest, delimiter=delimiter, strict=True)
        number, problem = start + 1, None
        try:
            fields = next(reader)
            start = first + reader.line_num
        except csv.Error as e:
            fields, problem = [], f"the quotes of this row are wrong ({e}): {_QUOTES}"
        header = header or fields
        if not problem and _swallows_rows(fields, header, delimiter, is_image):
            problem = f"a quote opens in this row and closes in line {start}, where other rows begin: {_QUOTES}"
        if problem:
            again += (first + reader.line_num) - number
            start, reader = number, None
        yield number, fields, problem
        if again > MOST_AGAIN + 3 * len(lines):
            raise InputError(
                f"{path}:{number}: the quotes of this row and of many before it are wrong, and looking for where they "
                f"end would take too long: {_QUOTES}"
            )


def _swallows_rows(fields: list[str], header: list[str], delimiter: str, is_image) -> bool:
    """Whether the text of a quoted field holds further rows: a line of it names an image where rows have theirs, or in
    a table without images, all its lines have as many fields as a row."""
    column = next((i for i, name in enumerate(header) if name in ("image", "images")), None)
    inner = [line for field in fields for line in _LINE_BREAK.split(field)[1:]]
    if not inner or column is None:
        return False
    found = [row for row in csv.reader(inner, delimiter=delimiter, quoting=csv.QUOTE_NONE) if len(row) > 1]
    images = [row[column].strip(' "') for row in found if len(row) > column]
    if any(is_image(name.strip()) for image in images for name in image.split(";")):
        return True
    is_shaped = len(found) == len(inner) and all(len(row) == len(header) for row in found)
    return is_shaped and not any(images) and not fields[column].strip()
