"""The jsonl reader: conversations with images, and all that is wrong with a file of them at once."""

import json
import os
import re
import reprlib
import sys
from pathlib import Path

from ..errors import InputError, Problems
from ..model.processing_phi3v import END_TOKENS, IMAGE_TAG, OTHER_TOKENS, ROLE_TOKENS

ROLES = ("user", "assistant")
_RESERVED = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS + END_TOKENS + OTHER_TOKENS)) + r"|<\|placeholder\d+\|>|" + IMAGE_TAG.pattern
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHORT = reprlib.Repr()  # of any value, however long or deep
_SHORT.maxstring = _SHORT.maxother = 80


def read_conversations(path: Path, images_dir: Path) -> list[dict]:
    """Reads `{"id", "source", "conversations": [turn, …]}`, one object a line, as `convert_ucf101.py` writes it.

    Image names, given relative to `images_dir`, become paths; a line without an id gets `path:line`; fields of other
    names are left out. Raises one InputError that names file, line, field and value of the first ten problems and
    counts all: content that is not of that form, an image that is missing or lies outside `images_dir` (also by a
    symbolic link), an id that stands twice, a text that is empty or holds a token of the chat format.
    """
    problems, images = Problems(), _Images(images_dir)
    examples, seen = [], {}
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path} can't be read: it is no regular file")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_UTF16_MARKS):
                    raise InputError(f"{path} is UTF-16: save it as UTF-8")
                line = line.removeprefix(_UTF8_MARK)
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    example = _parse(line)
                except ValueError as e:
                    if not examples and not problems and line.lstrip().startswith(b"["):
                        raise InputError(f"{where}: the file is one JSON array: write its objects one a line") from None
                    cut = "" if line.endswith(b"\n") else "the file's last line is cut off: "
                    problems.add(where, f"{cut}{e}")
                    continue
                example = _conversation(example, where, images, problems)
                if example is None:
                    continue
                key = str(example["id"])
                if (first := seen.setdefault(key, number)) != number:
                    problems.add(where, f"id is {_SHORT.repr(example['id'])}, which line {first} has already")
                examples.append(example)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: convert videos or conversations first, or check the folder") from None
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror}") from None
    problems.raise_if_any(str(path))
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


def _object(pairs: list[tuple]) -> dict:
    """What the JSON decoder makes of an object; of a key that stands twice it would keep the last value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_SHORT.repr(twice)} stands twice in an object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(line: bytes):
    """The line's JSON value; ValueError says what is wrong with it."""
    if b"\0" in line:
        raise ValueError("holds NUL bytes: the file is damaged, or no text")
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 ({e.reason} at byte {e.start + 1} of the line): save it as UTF-8") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not a JSON object ({e.msg} at column {e.colno})") from None
    except RecursionError:
        raise ValueError("not a JSON object that can be read: nested too deeply") from None
    except ValueError as e:
        if "digits" in str(e):
            raise ValueError("holds a number with more digits than can be read") from None
        raise


def _conversation(example, where: str, images: "_Images", problems: Problems) -> dict | None:
    """The example with just what is used of it; None where it is not of the form at all."""
    if not isinstance(example, dict):
        return problems.add(where, f"a line must hold a JSON object, not {type(example).__name__}")
    turns = example.get("conversations")
    if not isinstance(turns, list) or not turns:
        return problems.add(where, "conversations must be a list of turns with at least one")
    id = example.get("id")
    if id is None:
        id = where
    elif isinstance(id, bool) or not isinstance(id, (str, int)) or id == "":
        return problems.add(where, f"id is {_SHORT.repr(id)}, must be a text or a whole number")
    elif isinstance(id, str) and not id.isascii() and _SURROGATE.search(id):
        return problems.add(where, f"id is {_SHORT.repr(id)}, which is no valid Unicode")
    checked = []
    for i, turn in enumerate(turns):
        field = f"conversations[{i}]"
        if not isinstance(turn, dict):
            problems.add(where, f"{field} must be an object with images, user and assistant")
            continue
        for role in ROLES:
            if problem := text_problem(turn.get(role)):
                problems.add(where, f"{field}.{role} {problem}")
        names, paths = turn.get("images", []), []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.add(
                where, f"{field}.images is {_SHORT.repr(names)}, must be a list of file names (empty for none)"
            )
            continue
        for k, name in enumerate(names):
            path = images.path(name)
            if path is None:
                problems.add(where, f"{field}.images[{k}] is {_SHORT.repr(name)}, {images.problem(name)}")
            paths.append(path)
        # Every line of a video data set asks the same: one copy of the question is enough.
        user, assistant = (sys.intern(text) if isinstance(text, str) else "" for text in map(turn.get, ROLES))
        checked.append({"images": paths, "user": user, "assistant": assistant})
    return {"id": id, "conversations": checked}


def text_problem(text) -> str | None:
    """What is wrong with a text that is to stand in a conversation, to be said behind its name; None for nothing."""
    if not isinstance(text, str) or not text.strip():
        return f"is {_SHORT.repr(text)}, must be a text that is not empty"
    if not text.isascii() and _SURROGATE.search(text):
        return f"is {_SHORT.repr(text)}, which is no valid Unicode: half of a surrogate pair stands alone"
    if "\0" in text:
        return f"is {_SHORT.repr(text)}, which holds a NUL character: take it out"
    if "<" in text and (found := _RESERVED.search(text)):
        return (
            f"holds {_SHORT.repr(found[0])}, which the chat format reserves: take it out (images are listed in images, "
            "and their tags are put before the text)"
        )
    return None


def check_text(text, where: str) -> str:
    """Returns a text that can stand in a conversation; raises InputError for anything else."""
    if problem := text_problem(text):
        raise InputError(f"{where} {problem}")
    return text


class _Images:
    """Which names are images inside a folder. Lists every folder once: a look-up of each file takes far longer,
    above all on a network's file system."""

    def __init__(self, root: Path):
        self.root = os.fspath(root)
        self.real_root = os.path.realpath(root)
        self.listings: dict[str, set[str]] = {}

    def path(self, name: str) -> str | None:
        """The path of a regular file inside the folder, and None for any other name."""
        folder, slash, file = name.rpartition("/")
        folder += slash
        listing = self.listings.get(folder)
        if listing is None:
            listing = self.listings[folder] = self._listing(folder)
        # What is not listed may be a symbolic link, spelled in another way, or in a folder that can't be listed.
        if file in listing or self.problem(name) is None:
            return os.path.join(self.root, name)
        return None

    def _listing(self, folder: str) -> set[str]:
        """The regular files of a folder, without links."""
        if folder.startswith("/") or ".." in folder.split("/"):
            return set()
        try:
            if not self._is_inside(os.path.join(self.root, folder)):
                return set()
            with os.scandir(os.path.join(self.root, folder)) as entries:
                return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except (OSError, ValueError):
            return set()

    def _is_inside(self, path: str) -> bool:
        return os.path.commonpath([self.real_root, os.path.realpath(path)]) == self.real_root

    def problem(self, name: str) -> str | None:
        """Why a name is no image inside the folder, to be said behind it; None where it is one."""
        if name.startswith("/") or ".." in name.split("/"):
            return f"must be a path inside {self.root}"
        path = os.path.join(self.root, name)
        try:
            if not self._is_inside(path):
                return f"which is a symbolic link out of {self.root}: put the file itself there"
            if os.path.isfile(path):
                return None
            return f"but {path} is no file" if os.path.exists(path) else f"but {path} does not exist"
        except (OSError, ValueError):  # a name that no file can have
            return f"but {path} can't exist"
