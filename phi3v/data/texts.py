"""Which texts can stand in a conversation."""

import re
import reprlib

from ..errors import InputError
from ..model.chat import END_TOKENS, IMAGE_TAG, OTHER_TOKENS, ROLE_TOKENS

SURROGATE = re.compile("[\ud800-\udfff]")
_RESERVED = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS + END_TOKENS + OTHER_TOKENS)) + r"|<\|placeholder\d+\|>|" + IMAGE_TAG.pattern
)
_SHORT = reprlib.Repr()  # shortens values of any length and depth for messages
_SHORT.maxstring = _SHORT.maxother = 80


def text_problem(text) -> str | None:
    """What is wrong with a text of a conversation, worded to follow the text's name; None if nothing is."""
    if not isinstance(text, str) or not text.strip():
        return f"is {_SHORT.repr(text)}, must be a text that is not empty"
    if not text.isascii() and SURROGATE.search(text):
        return f"is {_SHORT.repr(text)}, which is not valid Unicode: it holds half of a surrogate pair"
    if "\0" in text:
        return f"is {_SHORT.repr(text)}, which holds a NUL character: remove it"
    if "<" in text and (found := _RESERVED.search(text)):
        return (
            f"holds {_SHORT.repr(found[0])}, which the chat format reserves: remove it (list images in the field "
            "images; their tags come before the user's text, or where it has <image>)"
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
