"""Reads files of text in UTF-8, and JSON, with errors that say where a file is wrong."""

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..inside import Outside, open_file

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHORT = reprlib.Repr()  # shortens values of any length and depth for messages
_SHORT.maxstring = _SHORT.maxother = 80


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the content of each line that is not blank. Raises InputError if the file can't be read.

    path: of any file, or an `Inside` path.
    """
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_UTF16_MARKS):
                    raise InputError(f"{path} is UTF-16: save it as UTF-8")
                line = line.removeprefix(_UTF8_MARK)
                if line.strip():
                    yield number, line
        except OSError as e:
            raise InputError(f"{path} can't be read: {e.strerror}") from None


def text_of(path: Path) -> str:
    """The content of a file in UTF-8. Raises InputError with the line where it is not."""
    with _opened(path) as file:
        content = file.read()
    if content.startswith(_UTF16_MARKS):
        raise InputError(f"{path} is UTF-16: save it as UTF-8")
    try:
        return content.removeprefix(_UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise InputError(f"{path}:{line} is not UTF-8 ({e.reason}): save the file as UTF-8") from None


def _opened(path: Path) -> BinaryIO:
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: convert videos or conversations first, or check the folder")
    try:
        return open_file(path)
    except Outside as e:
        raise InputError(f"{path} can't be read: {e}; put the file itself there, or give --follow_links") from None
    except ValueError as e:
        raise InputError(f"{path} can't be read: it is {e}") from None
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror}") from None


def _object(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Python's decoder silently keeps the last value of a key that occurs twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {_SHORT.repr(twice)} occurs twice in an object")
    return made


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(line: bytes):
    """The JSON value of a line. Raises ValueError that says what is wrong with it."""
    if b"\0" in line:
        raise ValueError("holds NUL bytes: the file is damaged, or not a text file")
    try:
        return JSON_DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 ({e.reason} at byte {e.start + 1} of the line): save it as UTF-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not a JSON object ({e.msg} at column {e.colno})") from None
    except RecursionError:
        raise ValueError("not a readable JSON object: nested too deeply") from None
    except ValueError as e:
        if "digits" in str(e):
            raise ValueError("holds a number with more digits than can be read") from None
        raise
