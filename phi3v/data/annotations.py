"""Reads conversations from a jsonl file, and reports all of the file's problems at once."""

import re
import reprlib
import sys
from pathlib import Path

from ..console import say
from ..errors import BadExamples, InputError
from ..inside import Inside, real_folders
from ..model.processing_phi3v import IMAGE_TAG
from ..model.tokenizer import END_TOKENS, OTHER_TOKENS, ROLE_TOKENS
from .image_folder import ImageFolder
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
    bad = bad or BadExamples()
    read = _Reader(ImageFolder(images_dir, follow_links), bad, literal_tags)
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


# Fields of an example and of a turn in other formats, and where their content belongs in this one.
_MISPLACED = {
    "image": "images belong into a turn, in its list images",
    "images": "images belong into a turn, in its list images",
    "system": "put it before the text of the first turn's user",
    "messages": "convert the file with tools/convert_conversations.py",
}


class _Reader:
    """Checks examples and adds their problems to `bad`. unused: the fields that were not used."""

    def __init__(self, images: ImageFolder, bad: BadExamples, literal_tags: bool):
        self.images, self.bad, self.literal_tags = images, bad, literal_tags
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
        others = {k: v for k, v in example.items() if k not in ("id", "source", "conversations")}
        self.other_fields(others, "", where, any(turn and turn["images"] for turn in checked))
        return {"id": id, "conversations": checked}

    def turn(self, turn, field: str, where: str) -> dict | None:
        if not isinstance(turn, dict):
            return self.bad.add(where, f"{field} must be an object with images, user and assistant")
        for role in ROLES:
            text = turn.get(role)
            if problem := text_problem(text) or (None if self.literal_tags else tag_problem(text)):
                self.bad.add(where, f"{field}.{role} {problem}")
        names, paths = turn.get("images", []), []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return self.bad.add(
                where, f"{field}.images is {_SHORT.repr(names)}, must be a list of file names (empty for none)"
            )
        for k, name in enumerate(names):
            path = self.images.path(name)
            if path is None:
                self.bad.add(where, f"{field}.images[{k}] is {_SHORT.repr(name)}, {self.images.problem(name)}")
            paths.append(path)
        others = {key: value for key, value in turn.items() if key not in ("images", *ROLES)}
        self.other_fields(others, f"{field}.", where, bool(names))
        # Every line of a video data set asks the same question, so keep one copy of it in memory.
        user, assistant = (sys.intern(text) if isinstance(text, str) else "" for text in map(turn.get, ROLES))
        return {"images": paths, "user": user, "assistant": assistant}

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
