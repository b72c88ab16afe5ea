"""Reads conversations from a jsonl file, and reports all of the file's problems at once."""

import array
import functools
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..console import say
from ..errors import BadExamples, InputError
from ..inside import Inside, real_folders
from ..model.chat import END_TOKENS, IMAGE_TAG, OTHER_TOKENS, ROLE_TOKENS
from .image_folder import ImageFolder
from .stored_lines import StoredLines
from .text_files import lines_of, parse_json
from .unsupported import UnusedFields, field_problem, is_empty, media_problem, tag_problem

ROLES = ("user", "assistant")
_RESERVED = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS + END_TOKENS + OTHER_TOKENS)) + r"|<\|placeholder\d+\|>|" + IMAGE_TAG.pattern
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = reprlib.Repr()  # shortens values of any length and depth for messages
_SHORT.maxstring = _SHORT.maxother = 80


def read_conversations(
    path: Path,
    images_dir: Path,
    bad: BadExamples | None = None,
    follow_links: bool = False,
    literal_tags: bool = False,
) -> list[dict]:
    """Reads one object per line, `{"id", "conversations": [turn, …]}`, as `convert_ucf101.py` writes it.

    A turn is `{"images": [names], "user": text, "assistant": text}`. Image names are relative to `images_dir` and
    become paths. A line without an id gets the id `path:line`. Rank 0 names other fields, which are not used.

    bad: decides about bad lines; by default they are an error. follow_links: as in `ImageFolder`, and whether `path`
    itself may be a link out of its folder. literal_tags: whether tags such as <video> may stand in texts.
    Raises one InputError, which names file, line, field and value of the first ten problems and counts all of them.
    Problems are: a line that has another form, an image that does not exist or lies outside `images_dir`, an id that
    occurs twice, a text that is empty or contains a token of the chat format or a place for another medium, and a field
    that the model can't use, such as video. Raises InputError in any case if the file can't be read or has no examples.
    """
    images = ImageFolder(images_dir, follow_links)
    examples = []
    for _, example in _checked(path, images, bad or BadExamples(), literal_tags):
        example = _example(example, images)
        # Every line of a video data set asks the same question, so keep one copy of it in memory.
        for turn in example["conversations"]:
            turn |= {role: sys.intern(turn[role]) for role in ROLES}
        examples.append(example)
    return examples


def store_conversations(
    path: Path,
    images_dir: Path,
    bad: BadExamples | None = None,
    follow_links: bool = False,
    literal_tags: bool = False,
) -> "StoredConversations":
    """What `read_conversations` returns and raises, but the examples are in a file, and not in memory."""
    return StoredConversations(path, ImageFolder(images_dir, follow_links), bad or BadExamples(), literal_tags)


class StoredConversations(StoredLines):
    """Examples in a file, as `store_conversations` returns them. `hashes` are those of their images' names."""

    def __init__(self, path: Path, images: ImageFolder, bad: BadExamples, literal_tags: bool):
        self.root, hashes = images.root, array.array("q")

        def lines() -> Iterator[bytes]:
            for line, example in _checked(path, images, bad, literal_tags):
                for turn in example["conversations"]:
                    names = turn.get("images", ())
                    joined = "\0".join(names)
                    is_normal = "./" not in joined and "//" not in joined
                    hashes.extend(map(hash, names if is_normal else map(os.path.normpath, names)))
                yield line

        super().__init__(lines(), functools.partial(_example_of_line, images=images))
        images.listings.clear()
        self.hashes = np.frombuffer(hashes, np.int64)

    def __getstate__(self):
        return super().__getstate__() | {"hashes": None}  # which differ from process to process

    def may_share_images(self, other: "StoredConversations") -> bool:
        """False if no image of the one is in the other; found out without reading the examples again."""
        if self.root != other.root or self.hashes is None or other.hashes is None:
            return True
        return bool(np.isin(other.hashes, self.hashes).any())


def _example_of_line(line: bytes, images: ImageFolder) -> dict:
    return _example(json.loads(line.decode("utf-8")), images)


def _example(example: dict, images: ImageFolder) -> dict:
    """An example that was checked, with paths of its images."""
    example = _used_fields(example)
    for turn in example["conversations"]:
        turn["images"] = list(map(images.path, turn["images"]))
    return example


def _used_fields(example: dict) -> dict:
    turns = [
        {"images": turn.get("images", []), "user": turn["user"], "assistant": turn["assistant"]}
        for turn in example["conversations"]
    ]
    return {"id": example["id"], "conversations": turns}


def _checked(path: Path, images: ImageFolder, bad: BadExamples, literal_tags: bool) -> Iterator[tuple[bytes, dict]]:
    """Yields the JSON of each example that can be used, and the object that it stands for. Both have an id."""
    check = _Check(images, bad, literal_tags)
    used, seen = 0, {}
    for number, line in lines_of(path if images.follow_links else Inside(str(path), real_folders(path.parent))):
        where = f"{path}:{number}"
        try:
            example = parse_json(line)
        except ValueError as e:
            if not used and not bad.problems and line.lstrip().startswith(b"["):
                raise InputError(f"{where}: the file is one JSON array: write one object per line") from None
            cut = "" if line.endswith(b"\n") else "the file's last line is cut off: "
            bad.add(where, f"{cut}{e}")
            continue
        before = len(bad.problems)
        if not check.example(example, where) or bad.skip and len(bad.problems) > before:
            continue
        if example.get("id") is None:
            example["id"] = where
        key = str(example["id"])
        if (first := seen.setdefault(key, number)) != number:
            bad.add(where, f"id is {_SHORT.repr(example['id'])}, which line {first} already has")
        if len(bad.problems) == before:
            used += 1
            yield line if check.is_plain else json.dumps(_used_fields(example)).encode("ascii"), example
    bad.settle(str(path), used)
    if not used:
        raise InputError(f"{path} holds no examples")
    say(*check.unused.lines(path))


# Fields of an example and of a turn in other formats, and where their content belongs in this one.
_MISPLACED = {
    "image": "images belong into a turn, in its list images",
    "images": "images belong into a turn, in its list images",
    "system": "put it before the text of the first turn's user",
    "messages": "convert the file with tools/convert_conversations.py",
}


_EXAMPLE_FIELDS = {"id", "source", "conversations"}
_TURN_FIELDS = {"images", *ROLES}


class _Check:
    """Adds the problems of examples to `bad`. unused: the fields that were not used. is_plain: whether the example that
    was checked last has an id, and no field that is not used and may be of any size or depth."""

    def __init__(self, images: ImageFolder, bad: BadExamples, literal_tags: bool):
        self.images, self.bad, self.literal_tags = images, bad, literal_tags
        self.unused, self.is_plain = UnusedFields(), True

    def example(self, example, where: str) -> bool:
        """Whether the example has the right form, apart from what is in its turns."""
        if not isinstance(example, dict):
            return self.refuse(where, f"a line must hold a JSON object, not {type(example).__name__}")
        turns = example.get("conversations")
        if not isinstance(turns, list) or not turns:
            return self.refuse(where, "conversations must be a list of turns with at least one")
        id = example.get("id")
        if id is None:
            pass
        elif isinstance(id, bool) or not isinstance(id, (str, int)) or id == "":
            return self.refuse(where, f"id is {_SHORT.repr(id)}, must be a text or a whole number")
        elif isinstance(id, str) and not id.isascii() and _SURROGATE.search(id):
            return self.refuse(where, f"id is {_SHORT.repr(id)}, which is not valid Unicode")
        has_images, self.is_plain = False, id is not None and isinstance(example.get("source", ""), str)
        for i, turn in enumerate(turns):
            has_images |= self.turn(turn, i, where)
        if not example.keys() <= _EXAMPLE_FIELDS:
            self.is_plain = False
            others = {key: value for key, value in example.items() if key not in _EXAMPLE_FIELDS}
            self.other_fields(others, "", where, has_images)
        return True

    def turn(self, turn, number: int, where: str) -> bool:
        """Whether the turn has images."""
        if not isinstance(turn, dict):
            return self.refuse(where, f"conversations[{number}] must be an object with images, user and assistant")
        for role in ROLES:
            text = turn.get(role)
            if problem := text_problem(text) or (None if self.literal_tags else tag_problem(text)):
                self.bad.add(where, f"conversations[{number}].{role} {problem}")
        names = turn.get("images", [])
        if not isinstance(names, list) or not set(map(type, names)) <= {str}:
            problem = f"is {_SHORT.repr(names)}, must be a list of file names (empty for none)"
            return self.refuse(where, f"conversations[{number}].images {problem}")
        for k in self.images.missing(names):
            problem = f"{_SHORT.repr(names[k])}, {self.images.problem(names[k])}"
            self.bad.add(where, f"conversations[{number}].images[{k}] is {problem}")
        if not turn.keys() <= _TURN_FIELDS:
            self.is_plain = False
            others = {key: value for key, value in turn.items() if key not in _TURN_FIELDS}
            self.other_fields(others, f"conversations[{number}].", where, bool(names))
        return bool(names)

    def refuse(self, where: str, problem: str) -> bool:
        self.bad.add(where, problem)
        return False

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
