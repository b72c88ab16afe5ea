"""Reads conversations from a jsonl file, and reports all of the file's problems at once."""

import array
import functools
import json
import os
import reprlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..console import say
from ..errors import BadExamples, InputError
from ..inside import Inside, real_folders
from .image_folder import ImageFolder
from .places import places_problem, put_in_place
from .stored_lines import StoredLines
from .text_files import lines_of, parse_json
from .texts import SURROGATE, text_problem
from .unsupported import UnusedFields, field_problem, is_empty, media_problem, tag_problem

ROLES = ("user", "assistant")
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
    images = ImageFolder(images_dir, follow_links)
    examples = []
    for _, example in _checked(path, images, bad or BadExamples(), literal_tags, loss_on):
        example = _example(example, images, literal_tags)
        # Every line of a video data set asks the same question, so keep one copy of it in memory.
        for turn in example["conversations"]:
            turn |= {role: sys.intern(turn[role]) for role in (*ROLES, "system") if role in turn}
        examples.append(example)
    return examples


def store_conversations(
    path: Path,
    images_dir: Path,
    bad: BadExamples | None = None,
    follow_links: bool = False,
    literal_tags: bool = False,
    loss_on: str | None = None,
) -> "StoredConversations":
    """What `read_conversations` returns and raises, but the examples are in a file, and not in memory."""
    return StoredConversations(path, ImageFolder(images_dir, follow_links), bad or BadExamples(), literal_tags, loss_on)


class StoredConversations(StoredLines):
    """Examples in a file, as `store_conversations` returns them. `hashes` are those of their images' names."""

    def __init__(self, path: Path, images: ImageFolder, bad: BadExamples, literal_tags: bool, loss_on: str | None):
        self.root, hashes = images.root, array.array("q")

        def lines() -> Iterator[bytes]:
            for line, example in _checked(path, images, bad, literal_tags, loss_on):
                for turn in example["conversations"]:
                    names = turn.get("images", ())
                    joined = "\0".join(names)
                    is_normal = "./" not in joined and "//" not in joined
                    hashes.extend(map(hash, names if is_normal else map(os.path.normpath, names)))
                yield line

        super().__init__(lines(), functools.partial(_example_of_line, images=images, literal_tags=literal_tags))
        images.listings.clear()
        self.hashes = np.frombuffer(hashes, np.int64)

    def __getstate__(self):
        return super().__getstate__() | {"hashes": None}  # which differ from process to process

    def may_share_images(self, other: "StoredConversations") -> bool:
        """False if no image of the one is in the other; found out without reading the examples again."""
        if self.root != other.root or self.hashes is None or other.hashes is None:
            return True
        return bool(np.isin(other.hashes, self.hashes).any())


def _example_of_line(line: bytes, images: ImageFolder, literal_tags: bool) -> dict:
    return _example(json.loads(line.decode("utf-8")), images, literal_tags)


def _example(example: dict, images: ImageFolder, literal_tags: bool) -> dict:
    """An example that was checked, as `read_conversations` returns it."""
    example = _used_fields(example)
    turns = example["conversations"]
    for turn in turns:
        turn["images"] = list(map(images.path, turn["images"]))
        if not literal_tags:
            put_in_place(turn)
    if "system" in example:
        turns[0]["system"] = example.pop("system")
    return example


def _used_fields(example: dict) -> dict:
    turns = [
        {"images": turn.get("images", []), "user": turn["user"], "assistant": turn["assistant"]}
        | ({"train": False} if turn.get("train") is False else {})
        for turn in example["conversations"]
    ]
    used = {"id": example["id"], "conversations": turns}
    return used if is_empty(system := example.get("system")) else used | {"system": system}


def _checked(
    path: Path, images: ImageFolder, bad: BadExamples, literal_tags: bool, loss_on: str | None
) -> Iterator[tuple[bytes, dict]]:
    """Yields the JSON of each example that can be used, and the object that it stands for. Both have an id."""
    check = _Check(images, bad, literal_tags, loss_on)
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
    "system": "it belongs beside conversations, as the system text of the whole conversation",
    "messages": "convert the file with tools/convert_conversations.py",
    "train": "it belongs into a turn, beside the answer that is not learned",
}


_EXAMPLE_FIELDS = {"id", "source", "system", "conversations"}
_TURN_FIELDS = {"images", "train", *ROLES}


class _Check:
    """Adds the problems of examples to `bad`. unused: the fields that were not used. is_plain: whether the example that
    was checked last has an id, and no field that is not used and may be of any size or depth."""

    def __init__(self, images: ImageFolder, bad: BadExamples, literal_tags: bool, loss_on: str | None):
        self.images, self.bad, self.literal_tags, self.loss_on = images, bad, literal_tags, loss_on
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
        elif isinstance(id, str) and not id.isascii() and SURROGATE.search(id):
            return self.refuse(where, f"id is {_SHORT.repr(id)}, which is not valid Unicode")
        has_images, self.is_plain = False, id is not None and isinstance(example.get("source", ""), str)
        for i, turn in enumerate(turns):
            has_images |= self.turn(turn, i, where)
        if self.loss_on and all(isinstance(turn, dict) for turn in turns):
            if problem := nothing_to_learn(turns, self.loss_on):
                self.bad.add(where, problem)
        if not is_empty(system := example.get("system")):
            if problem := text_problem(system) or self.tag_problem(system):
                self.bad.add(where, f"system {problem}")
        if not example.keys() <= _EXAMPLE_FIELDS:
            self.is_plain = False
            others = {key: value for key, value in example.items() if key not in _EXAMPLE_FIELDS}
            self.other_fields(others, "", where, has_images)
        return True

    def turn(self, turn, number: int, where: str) -> bool:
        """Whether the turn has images."""
        if not isinstance(turn, dict):
            return self.refuse(where, f"conversations[{number}] must be an object with images, user and assistant")
        names = turn.get("images", [])
        are_names = isinstance(names, list) and set(map(type, names)) <= {str}
        for role in ROLES:
            problem = text_problem(text := turn.get(role))
            if not problem and role == "user" and are_names and not self.literal_tags:
                problem = places_problem(text, len(names))
            elif not problem:
                problem = self.tag_problem(text)
            if problem:
                self.bad.add(where, f"conversations[{number}].{role} {problem}")
        if not are_names:
            problem = f"is {_SHORT.repr(names)}, must be a list of file names (empty for none)"
            return self.refuse(where, f"conversations[{number}].images {problem}")
        for k in self.images.missing(names):
            problem = f"{_SHORT.repr(names[k])}, {self.images.problem(names[k])}"
            self.bad.add(where, f"conversations[{number}].images[{k}] is {problem}")
        train = turn.get("train")
        if train is not None and not isinstance(train, bool):
            self.bad.add(where, f"conversations[{number}].train is {_SHORT.repr(train)}, must be true or false")
        if not turn.keys() <= _TURN_FIELDS:
            self.is_plain = False
            others = {key: value for key, value in turn.items() if key not in _TURN_FIELDS}
            self.other_fields(others, f"conversations[{number}].", where, bool(names))
        return bool(names)

    def tag_problem(self, text: str) -> str | None:
        return None if self.literal_tags else tag_problem(text)

    def refuse(self, where: str, problem: str) -> bool:
        self.bad.add(where, problem)
        return False

    def other_fields(self, fields: dict, prefix: str, where: str, has_images: bool):
        """Adds a problem for each field whose content would be lost, and counts the others as unused."""
        for name, value in fields.items():
            problem = None
            if name in _MISPLACED and not is_empty(value) and (name != "train" or value is False):
                problem = f"is {_SHORT.repr(value)}, but {_MISPLACED[name]}"
            problem = problem or field_problem(name, value) or (None if has_images else media_problem(name, value))
            if problem:
                self.bad.add(where, f"{prefix}{name} {problem}")
            else:
                self.unused.add(f"conversations[].{name}" if prefix else name, value)


def nothing_to_learn(turns: list[dict], loss_on: str) -> str | None:
    """What is wrong with a conversation that is to be trained on, if no answer of it is learned; else None."""
    last = len(turns) - 1
    if loss_on == "last" and turns[-1].get("train") is False:
        return (
            f"conversations[{last}].train is false, but --loss_on last trains this answer alone: remove the field, or "
            "the example, or give --loss_on all"
        )
    if all(turn.get("train") is False for turn in turns):
        return "no answer is learned, because train is false in all turns: remove the field from a turn, or the example"
    return None
