"""Reads the objects of a json list or of a jsonl file, with the line where each is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import BadExamples, InputError
from .text_files import JSON_DECODER, lines_of, parse_json, text_of

_BLANK = re.compile(r"[ \t\r\n]*")


def rows(path: Path, bad: BadExamples) -> Iterator[tuple[str, dict | None]]:
    """Yields for each object where it is and the object; None for one that was added to `bad`.

    Raises InputError for a list that is not valid JSON. In a jsonl file, every line is a row of its own.
    """
    first = next((line for _, line in lines_of(path)), b"")
    for where, value, problem in _items(path) if first.lstrip().startswith(b"[") else _lines(path):
        if not problem and not isinstance(value, dict):
            problem = f"must be an object, not {type(value).__name__}"
        if problem:
            bad.add(where, problem)
        yield where, None if problem else value


def _lines(path: Path) -> Iterator[tuple[str, object, str | None]]:
    for number, line in lines_of(path):
        value = problem = None
        try:
            value = parse_json(line)
        except ValueError as e:
            problem = f"is not valid JSON: {e}"
            if line.strip() == b"{":
                problem += "; write a list of objects, or each object in one line"
        yield f"{path}:{number}", value, problem


def _items(path: Path) -> Iterator[tuple[str, object, str | None]]:
    text = text_of(path)
    at, line, counted, number = text.index("[") + 1, 1, 0, 0

    def skip_blanks(at: int) -> int:
        return _BLANK.match(text, at).end()

    try:
        while text[(at := skip_blanks(at)) : at + 1] != "]":
            number += 1
            if number > 1:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("there is no ',' or ']' after an object", text, at)
                at = skip_blanks(at + 1)
            line, counted = line + text.count("\n", counted, at), at
            value, at = JSON_DECODER.raw_decode(text, at)
            yield f"{path}:{line}, object {number}", value, None
        if rest := text[at + 1 :].strip():
            raise json.JSONDecodeError(f"there is more after the end of the list, {rest!r:.80}", text, at + 1)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}, object {number}, is not valid JSON: {e.msg}") from None
    except RecursionError:
        raise InputError(f"{path}:{line}, object {number}, is nested too deeply") from None
    except InputError:
        raise
    except ValueError as e:  # a key that is there twice, or a number of too many digits
        reason = "holds a number with more digits than can be read" if "digits" in str(e) else e
        raise InputError(f"{path}:{line}, object {number}: {reason}") from None
