"""Images between pieces of text: the places `<image>` in what a user says, in the order of the turn's images.

If all places stand at the beginning of a text, they say what a text without places says: the images' tags come first,
together, then a line break and the text. Otherwise the tag of each image replaces its place, and nothing else changes.
"""

import re
import reprlib
from collections.abc import Iterable

from .unsupported import tag_problem

PLACE = "<image>"
_PLACE = re.compile(r"(?<!\\)<image>")
_AT_THE_BEGINNING = re.compile(r"\A\s*(?:<image>\s*)+")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def places_problem(text: str, n_images: int) -> str | None:
    """What is wrong with the places in a user's text, or with other tags in it, worded to follow the text's name; None
    if nothing is. n_images: of the turn; without images, `<image>` is a tag like others."""
    places = len(_PLACE.findall(text)) if n_images else 0
    if not places:
        return tag_problem(text)
    if places != n_images:
        return (
            f"is {_SHORT.repr(text)}, with {places} of the places <image> for {n_images} images: write as many as "
            "there are images, in their order, or none, which puts all images before the text; with --literal_tags "
            "<image> is text"
        )
    beside = _PLACE.sub("\n", text)
    return tag_problem(beside) if beside.strip() else f"is {_SHORT.repr(text)}, which holds no text beside its places"


def put_in_place(turn: dict):
    """Marks a turn whose images stand inside or behind its text with `"places": True`, and removes places at the
    beginning of the text of any other turn. `places_problem` must have found nothing."""
    if turn["images"] and _PLACE.search(turn["user"]):
        if _PLACE.search(text := _AT_THE_BEGINNING.sub("", turn["user"], count=1)):
            turn["places"] = True
        else:
            turn["user"] = text


def text_with_tags(turn: dict, tags: Iterable[str]) -> str:
    """A user's text with the tags of the turn's images: at its places if `put_in_place` has found some, else before
    it."""
    if turn.get("places"):
        own = iter(tags)
        return _PLACE.sub(lambda _: next(own), turn["user"])
    before = "".join(tags)
    return f"{before}\n{turn['user']}" if before else turn["user"]
