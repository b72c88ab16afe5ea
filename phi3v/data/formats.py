"""Reads conversations in common formats: a table, LLaVA's json, and messages, as turns of a question and an answer."""

import re
import reprlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import BadExamples, InputError
from ..model.chat import join_pieces
from . import csv_rows, json_rows
from .places import PLACE, places_problem
from .texts import text_problem
from .unsupported import UnusedFields, field_problem, is_empty, media_problem, tag_problem

# With a number, or for the next image. The search looks at each space once: it would take quadratic time to try every
# space of a long row of them as the first one.
IMAGE_PLACE = re.compile(r"(?:(?<!\s)\s+)?(?:<image>|<\|image_(\d{1,9})\|>)\s*")
_NUMBERED_PLACE = re.compile(r"<\|image_\d{1,9}\|>")
ROLES = {"human": "user", "gpt": "assistant"}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
NAMES_OF_IMAGE = ("image", "path", "url", "image_url", "file")  # fields of a part that can name its image
CONTENT_OF_IMAGE = {"base64", "bytes", "data", "file_id", "source"}  # fields that hold it in a way that is not read
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class Formats:
    """Reads one file, and counts what a user should know of.

    bad: decides about rows that can't be used. is_image: whether a text names an image, as csv_rows.py uses it.
    literal_tags: whether tags such as <video> may stand in texts, and <image> in answers and where there is no image.
    unused: the fields that were not used. notes: other facts, each with the number of examples that it is true of.
    """

    def __init__(self, path: Path, bad: BadExamples, is_image: Callable[[str], bool], literal_tags: bool = False):
        self.path, self.bad, self.is_image, self.literal_tags = path, bad, is_image, literal_tags
        self.unused, self.notes = UnusedFields(), Counter()

    def __iter__(self) -> Iterator[tuple[str, list[dict] | None]]:
        """Yields for each row where it is in the file, and its turns; None for a row that was added to `bad`.

        A turn is `{"images": [names], "user": text, "assistant": text}`, and the first may have `"system"`. An answer
        that is not learned has `"train": False`. Images that have places inside or behind a text keep them, as
        `<image>`; with literal_tags, which makes text of `<image>`, they come before it. Raises InputError for a file
        that can't be read as a whole.
        """
        is_table = self.path.suffix.lower() in csv_rows.DELIMITERS
        rows = csv_rows.rows(self.path, self.bad, self.is_image) if is_table else json_rows.rows(self.path, self.bad)
        for where, row in rows:
            turns = None
            if row is not None:
                with self.bad.catching(where):
                    try:
                        turns = self.checked(self.turns_of_row(row) if is_table else self.turns_of_object(row))
                    except RecursionError:
                        raise InputError("is nested too deeply") from None
            yield where, turns

    def turns_of_row(self, row: dict[str, str]) -> list[dict]:
        images = [name.strip() for key in ("image", "images") for name in row.get(key, "").split(";") if name.strip()]
        turn = {"images": images, "user": row["question"], "assistant": row["answer"]}
        if system := row.get("system", "").strip():
            turn["system"] = system
        parts, literal = [("text", turn["user"])], self.literal_tags and not images
        places, late = _places(parts, literal)
        if len(places) > len(images):
            raise InputError(f"the question has places for {len(places)} images, but the row has {len(images)}")
        if places:
            _fill(places, deque(images), len(images))
            turn["user"] = self.text_of(parts, literal, late)
        used = ("image", "images", "question", "answer", "system")
        self.other_fields([field for field in row.items() if field[0] not in used], images)
        return [turn]

    def turns_of_object(self, example: dict) -> list[dict]:
        kinds = [key for key in ("messages", "conversations") if example.get(key) is not None]
        if len(kinds) != 1:
            problem = "both messages and conversations" if kinds else "neither messages nor conversations"
            raise InputError(f"has {problem}, but must have one of them; its fields are {_SHORT.repr(sorted(example))}")
        messages, system = example[kinds[0]], example.get("system")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InputError(f"{kinds[0]} is {_SHORT.repr(messages)}, must be a list of objects")
        if system is not None and not isinstance(system, str):
            raise InputError(f"system is {_SHORT.repr(system)}, must be a text")
        others = [(key, example[key]) for key in example if key not in (*kinds, "image", "images", "system")]
        read = [read_message(message, kinds[0], others) for message in messages]
        made = self.turns(read, images_of(example), system)
        answers = (message for message, (role, *_) in zip(messages, read, strict=True) if role == "assistant")
        for turn, message in zip(made, answers, strict=True):
            turn |= {"train": False} if message.get("train") is False else {}
        self.other_fields(others, [image for turn in made for image in turn["images"]])
        return made

    def turns(self, messages: list[tuple], images: list[str], system: str | None) -> list[dict]:
        """Turns made of messages as `read_message` returns them.

        images: those of the example. Those for which no message has a place go to the first turn, after its own.
        system: a text that is put before those of system messages.
        """
        images = _named_once(messages, images)
        has_images = images or any(own or any(what == "image" for what, _ in parts) for _, parts, own in messages)
        rest, made, question, any_late = deque(images), [], None, False
        before, systems = "", [system.strip()] if system and system.strip() else []
        for role, parts, own in messages:
            own = deque(own)
            literal = self.literal_tags and (role == "assistant" or not has_images)
            places, late = _places(parts, literal)
            text = self.text_of(parts, literal, late and role == "user")
            if role == "assistant" and (places or own):
                raise InputError(
                    "an answer has an image, but only questions can: remove it, or give --literal_tags if its <image> "
                    "is text"
                )
            names = _fill(places, own or rest, len(own or images)) + list(own)
            any_late |= late
            if role == "system" and not names:
                if made or question:  # only the beginning of a conversation has a place for a system text
                    before += f"{text}\n" if text else ""
                elif text:
                    systems.append(text)
            elif role == "user" and question is None:
                question = {"images": names, "user": before + text}
                before = ""
            elif role == "assistant" and question is not None:
                made.append({**question, "assistant": text})
                question = None
            else:
                raise InputError(
                    f"a message of {_SHORT.repr(role)} is out of turn, or has an image where none can be: questions of "
                    "the user and answers of the assistant must alternate"
                )
        if not made or question is not None or before:
            raise InputError("the last message must be an answer")
        made[0]["images"] += rest
        if systems:
            made[0]["system"] = "\n".join(systems)
        change = "are before it now" if self.literal_tags else "stay there"
        self.notes[f"images that were behind or inside of a text {change}"] += any_late
        self.notes["more images than places for them: the others follow those of the first question"] += bool(
            rest and len(rest) < len(images)
        )
        return made

    def text_of(self, parts: list[tuple], literal: bool, late: bool) -> str:
        """The text of a message. late: whether an image comes after some text, so that the images keep their places."""
        if late and not self.literal_tags:
            text = join_pieces([(what == "image", PLACE if what == "image" else value) for what, value in parts])
            return _NUMBERED_PLACE.sub(PLACE, text).strip()
        text = "\n".join(value for what, value in parts if what == "text")
        return (text if literal else IMAGE_PLACE.sub("\n", text)).strip()

    def other_fields(self, fields: list[tuple], images: list):
        """Raises InputError for a field whose content would be lost, and counts the others as unused."""
        for name, value in fields:
            field = name.rpartition("].")[2]
            if problem := field_problem(field, value) or (None if images else media_problem(field, value)):
                raise InputError(f"{name} {problem}")
        for name, value in fields:
            self.unused.add(name, value)

    def checked(self, turns: list[dict]) -> list[dict]:
        """The turns. Raises InputError if a text of theirs can't stand in a conversation."""
        has_tag = False
        for turn in turns:
            without = len(turn["images"]) - turn["user"].count(PLACE)  # images that have no place
            if 0 < without < len(turn["images"]) and not self.literal_tags:
                turn["user"] += "\n" + without * PLACE
            for role in ("system", "user", "assistant") if "system" in turn else ("user", "assistant"):
                problem, of_places = text_problem(turn[role]), role == "user" and not self.literal_tags
                tag = places_problem(turn[role], len(turn["images"])) if of_places else tag_problem(turn[role])
                if not problem and tag:
                    problem, has_tag = (None if self.literal_tags else tag), True
                if problem:
                    raise InputError(f"the {role}'s text {problem}")
        self.notes["a tag such as <video> is text: train with --literal_tags too"] += has_tag
        return turns


def images_of(fields: dict) -> list[str]:
    """The names in the fields image and images of an example or a message, each a text or a list."""
    one, several = (image_names(fields.get(name), name) for name in ("image", "images"))
    if one and several and one != several:
        raise InputError(f"image is {_SHORT.repr(one)}, but images is {_SHORT.repr(several)}: give one of them")
    return one or several


def image_names(value, field: str) -> list[str]:
    """The file names in a field: a text, an object that has the name as path or url, or a list of such."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [name for item in value for name in image_names(item, field)]
    if isinstance(value, dict) and not value.get("bytes"):
        names = {name for key in NAMES_OF_IMAGE for name in image_names(value.get(key), field)}
        if len(names) == 1:
            return list(names)
    if value is None:
        return []
    raise InputError(f"{field} is {_SHORT.repr(value)}, must be the name of an image file, or a list of names")


def read_message(message: dict, kind: str, others: list[tuple]) -> tuple[str, list[tuple], list[str]]:
    """(role, parts, images) of a message. A part is ("text", text) or ("image", name); the name is None for the next
    image of the list images, or a number for the image that has this index there.

    kind: the name of the list of messages. others: gets the names and values of all other fields.
    """
    for name, other in (("role", "from"), ("content", "value")):
        if message.get(name) is not None and message.get(other) is not None and message[name] != message[other]:
            raise InputError(f"a message has {name} and {other} with different values: remove one of them")
    role, content = (
        message.get(name) if message.get(name) is not None else message.get(other)
        for name, other in (("role", "from"), ("content", "value"))
    )
    others += [
        (f"{kind}[].{key}", value)
        for key, value in message.items()
        if key not in ("role", "from", "content", "value", "image", "images")
        and not (key == "train" and value is False and role in ("assistant", "gpt"))
    ]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InputError(f"content is {_SHORT.repr(content)}, must be a text or a list of parts")
    parts = [part for value in content for part in _read_part(value, kind, others)]
    return ROLES.get(role, role) if isinstance(role, str) else role, parts, images_of(message)


def _read_part(part: dict, kind: str, others: list[tuple]) -> list[tuple]:
    fields = {key: value for key, value in part.items() if not is_empty(value) or key == "text"}
    type = fields.get("type") or next((name for name in ("image", "image_url", "text") if name in fields), None)
    used = {"type", "text"} if type in TEXT_PARTS else {"type", "index", *NAMES_OF_IMAGE}
    others += [(f"{kind}[].content[].{key}", value) for key, value in fields.items() if key not in used]
    if type in TEXT_PARTS and isinstance(fields.get("text"), str):
        return [("text", fields["text"])]
    if type in IMAGE_PARTS and not fields.keys() & CONTENT_OF_IMAGE:
        named = {key: value for key, value in fields.items() if key in NAMES_OF_IMAGE}
        if named:
            return [("image", name) for name in image_names(named, f"{kind}[].content[]")]
        index = fields.get("index")
        if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
            raise InputError(f"the index of an image is {_SHORT.repr(index)}, must be a number of the list images")
        return [("image", index)]
    raise InputError(f"a part of a message is {_SHORT.repr(part)}, must be a text, or an image by the name of its file")


def _places(parts: list[tuple], literal: bool) -> tuple[list[str | int | None], bool]:
    """The images of a message, as in its parts, and whether one of them comes after some text."""
    places, some_text, late = [], False, False
    for what, value in parts:
        pieces = [value] if literal or what == "image" else IMAGE_PLACE.split(value)
        numbers, pieces = pieces[1::2], pieces[::2]
        found = [value] if what == "image" else [number and int(number) - 1 for number in numbers]
        if what == "image":
            late |= some_text
        else:
            for i, piece in enumerate(pieces):
                late |= some_text and i > 0
                some_text |= bool(piece.strip())
        places += found
    return places, late


def _named_once(messages: list[tuple], images: list[str]) -> list[str]:
    """The images of the example that its messages do not name themselves. Some exports name all images in both places.

    Raises InputError if the two name different images, and no message has a place for those of the example.
    """
    named = [name for _, parts, own in messages for name in [v for what, v in parts if what == "image"] + own]
    names = [name for name in named if isinstance(name, str)]
    if not images or not names:
        return images
    if names == images:
        return []
    has_places = len(names) < len(named) or any(
        IMAGE_PLACE.search(value) for _, parts, own in messages if not own for what, value in parts if what == "text"
    )
    if not has_places:
        raise InputError(
            f"the messages name the images {_SHORT.repr(names)}, but the example {_SHORT.repr(images)}: name each once"
        )
    return images


def _fill(places: list[str | int | None], queue: deque[str], total: int) -> list[str]:
    """The names of a message's images. Places without a name take the next of `queue`, of `total` images."""
    needed = sum(not isinstance(place, str) for place in places)
    if needed > len(queue):
        raise InputError(f"a message has a place for {needed} images, but {len(queue)} are left")
    names = []
    for place in places:
        if isinstance(place, int) and place != total - len(queue):
            raise InputError(
                f"a place is for image {place + 1} of the list, but image {total - len(queue) + 1} is the next one: "
                "list the images in the order in which they appear, each as often as it appears"
            )
        names.append(place if isinstance(place, str) else queue.popleft())
    return names
