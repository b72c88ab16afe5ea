"""Reads conversations from a jsonl file, and reports all of the file's problems at once."""

import json
import os
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..console import say
from ..errors import BadExamples, InputError
from ..inside import Inside, Outside, open_file, real_folders
from ..model.processing_phi3v import IMAGE_TAG
from ..model.tokenizer import END_TOKENS, OTHER_TOKENS, ROLE_TOKENS
from .image_folder import ImageFolder
from .places import places_problem, put_in_place
from .unsupported import UnusedFields, field_problem, is_empty, media_problem, tag_problem

ROLES = ("user", "assistant")
_RESERVED = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS + END_TOKENS + OTHER_TOKENS)) + r"|<\|placeholder\d+\|>|" + IMAGE_TAG.pattern
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHORT = reprlib.Repr()  # shortens values of any length and depth for messages
_SHORT.maxstring = _SHORT.maxother = 80


def read_conversations(
    path: Path,
    images_dir: Path,
    bad: BadExamples | None = None,
    follow_links: bool = False,
    literal_tags: bool = False,
    loss_on: str | None = None,
) -> list[dict]:
    """Reads one object per line, `{"id", "system": text, "conversations": [turn, …]}`; id and system may be missing.

    A turn is `{"images": [names], "user": text, "assistant": text}`, and may have `"train": false`. Image names are
    relative to `images_dir` and become paths. A line without an id gets the id `path:line`. The first turn gets the
    text of `system`, and turns with images inside of their text are marked, as `conversations.py` describes turns.
    Rank 0 names other fields, which are not used.

    bad: decides about bad lines; by default they are an error. follow_links: as in `ImageFolder`, and whether `path`
    itself may be a link out of its folder. literal_tags: whether tags such as <video> and <image> are text.
    loss_on: --loss_on if the examples are to be trained on, which then must have an answer to learn.
    Raises one InputError, which names file, line, field and value of the first ten problems and counts all of them.
    Problems are: a line that has another form, an image that does not exist or lies outside `images_dir`, an id that
    occurs twice, a text that is empty or contains a token of the chat format or a place for another medium, and a field
    that the model can't use, such as video. Raises InputError in any case if the file can't be read or has no examples.
    """
    bad = bad or BadExamples()
    read = _Reader(ImageFolder(images_dir, follow_links), bad, literal_tags, loss_on)
    examples, seen = [], {}
    for number, line in lines_of(path if follow_links else Inside(str(path), real_folders(path.parent))):
        where = f"{path}:{number}"
        try:
            example = parse_json(line)
        except ValueError as e:
            if not examples and not bad.problems and line.lstrip().startswith(b"["):
                raise InputError(f"{where}: the file is one JSON array: write one object per line") from None
            cut = "" if line.endswith(b"\n") else "the file's last line is cut off: "
            bad.add(where, f"{cut}{e}")
            continue
        before = len(bad.problems)
        example = read.conversation(example, where)
        if example is None or bad.skip and len(bad.problems) > before:
            continue
        key = str(example["id"])
        if (first := seen.setdefault(key, number)) != number:
            bad.add(where, f"id is {_SHORT.repr(example['id'])}, which line {first} already has")
        if len(bad.problems) == before:
            examples.append(example)
    bad.settle(str(path), len(examples))
    if not examples:
        raise InputError(f"{path} holds no examples")
    say(*read.unused.lines(path))
    return examples


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


# Fields of an example and of a turn in other formats, and where their content belongs in this one.
_MISPLACED = {
    "image": "images belong into a turn, in its list images",
    "images": "images belong into a turn, in its list images",
    "system": "it belongs beside conversations, as the system text of the whole conversation",
    "messages": "convert the file with tools/convert_conversations.py",
}


class _Reader:
    """Checks examples and adds their problems to `bad`. unused: the fields that were not used."""

    def __init__(self, images: ImageFolder, bad: BadExamples, literal_tags: bool, loss_on: str | None):
        self.images, self.bad, self.literal_tags, self.loss_on = images, bad, literal_tags, loss_on
        self.unused = UnusedFields()

    def conversation(self, example, where: str) -> dict | None:
        """The example's id and turns, checked; None if nothing of it is usable."""
        if not isinstance(example, dict):
            return self.bad.add(where, f"a line must hold a JSON object, not {type(example).__name__}")
        turns = example.get("conversations")
        if not isinstance(turns, list) or not turns:
            return self.bad.add(where, "conversations must be a list of turns with at least one")
        id = example.get("id")
        if id is None:
            id = where
        elif isinstance(id, bool) or not isinstance(id, (str, int)) or id == "":
            return self.bad.add(where, f"id is {_SHORT.repr(id)}, must be a text or a whole number")
        elif isinstance(id, str) and not id.isascii() and _SURROGATE.search(id):
            return self.bad.add(where, f"id is {_SHORT.repr(id)}, which is not valid Unicode")
        checked = [self.turn(turn, f"conversations[{i}]", where) for i, turn in enumerate(turns)]
        if self.loss_on and all(checked) and (problem := nothing_to_learn(checked, self.loss_on)):
            self.bad.add(where, problem)
        if not is_empty(system := example.get("system")):
            if problem := text_problem(system) or self.tag_problem(system):
                self.bad.add(where, f"system {problem}")
            elif checked[0]:
                checked[0]["system"] = sys.intern(system)
        others = {k: v for k, v in example.items() if k not in ("id", "source", "system", "conversations")}
        self.other_fields(others, "", where, any(turn and turn["images"] for turn in checked))
        return {"id": id, "conversations": checked}

    def tag_problem(self, text: str) -> str | None:
        return None if self.literal_tags else tag_problem(text)

    def turn(self, turn, field: str, where: str) -> dict | None:
        if not isinstance(turn, dict):
            return self.bad.add(where, f"{field} must be an object with images, user and assistant")
        names, paths = turn.get("images", []), []
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        for role in ROLES:
            problem = text_problem(text := turn.get(role))
            if not problem and role == "user" and are_names and not self.literal_tags:
                problem = places_problem(text, len(names))
            elif not problem:
                problem = self.tag_problem(text)
            if problem:
                self.bad.add(where, f"{field}.{role} {problem}")
        if not are_names:
            return self.bad.add(
                where, f"{field}.images is {_SHORT.repr(names)}, must be a list of file names (empty for none)"
            )
        for k, name in enumerate(names):
            path = self.images.path(name)
            if path is None:
                self.bad.add(where, f"{field}.images[{k}] is {_SHORT.repr(name)}, {self.images.problem(name)}")
            paths.append(path)
        others = {key: value for key, value in turn.items() if key not in ("images", "train", *ROLES)}
        self.other_fields(others, f"{field}.", where, bool(names))
        train = turn.get("train")
        if train is not None and not isinstance(train, bool):
            self.bad.add(where, f"{field}.train is {_SHORT.repr(train)}, must be true or false")
        made = {"images": paths, "user": turn.get("user"), "assistant": turn.get("assistant")}
        made |= {role: "" for role in ROLES if not isinstance(made[role], str)}
        if not self.literal_tags:
            put_in_place(made)
        # Every line of a video data set asks the same question, so keep one copy of it in memory.
        made |= {role: sys.intern(made[role]) for role in ROLES}
        return made | {"train": False} if train is False else made

    def other_fields(self, fields: dict, prefix: str, where: str, has_images: bool):
        """Adds a problem for each field whose content would be lost, and counts the others as unused."""
        for name, value in fields.items():
            problem = None
            if name in _MISPLACED and not is_empty(value):
                problem = f"is {_SHORT.repr(value)}, but {_MISPLACED[name]}"
            problem = problem or field_problem(name, value) or (None if has_images else media_problem(name, value))
            if problem:
                self.bad.add(where, f"{prefix}{name} {problem}")
            else:
                self.unused.add(f"conversations[].{name}" if prefix else name, value)


def nothing_to_learn(turns: list[dict], loss_on: str) -> str | None:
    """What is wrong with a conversation that is to be trained on, if no answer of it is learned; else None."""
    last = len(turns) - 1
    if loss_on == "last" and not turns[-1].get("train", True):
        return (
            f"conversations[{last}].train is false, but --loss_on last trains this answer alone: remove the field, or "
            "the example, or give --loss_on all"
        )
    if not any(turn.get("train", True) for turn in turns):
        return "no answer is learned, because train is false in all turns: remove the field from a turn, or the example"
    return None


def text_problem(text) -> str | None:
    """What is wrong with a text of a conversation, worded to follow the text's name; None if nothing is."""
    if not isinstance(text, str) or not text.strip():
        return f"is {_SHORT.repr(text)}, must be a text that is not empty"
    if not text.isascii() and _SURROGATE.search(text):
        return f"is {_SHORT.repr(text)}, which is not valid Unicode: it holds half of a surrogate pair"
    if "\0" in text:
        return f"is {_SHORT.repr(text)}, which holds a NUL character: remove it"
    if "<" in text and (found := _RESERVED.search(text)):
        return (
            f"holds {_SHORT.repr(found[0])}, which the chat format reserves: remove it (list images in the field "
            "images; their tags are put before the text automatically)"
        )
    return None


def check_text(text, where: str) -> str:
    """Returns `text` if it can be used in a conversation; raises InputError with its name `where` otherwise."""
    if problem := text_problem(text):
        raise InputError(f"{where} {problem}")
    return text


def check_texts(texts, where: str):
    """Raises InputError unless `texts` is a list with at least one text, all of which can stand in a conversation."""
    if not texts:
        raise InputError(f"{where} is empty")
    for i, text in enumerate(texts):
        check_text(text, f"{where}[{i}]")
