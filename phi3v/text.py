"""Text that comes from outside, made safe to print."""

import functools
import re
import unicodedata

# Unicode's Default_Ignorable_Code_Point that are not of the category Cf: nothing is drawn for them.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_VISIBLE_FORMAT = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2]")  # signs over Arabic and Syriac numbers
_EMOJI = "\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff"
_JOINED = f"\u0600-\u0dff\u0f00-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefc{_EMOJI}"  # scripts with joined letters
# Invisible characters that ordinary text needs, in the only places where it needs them.
_ORDINARY = re.compile(
    f"(?<=[{_JOINED}\ufe0f])[\u200c\u200d](?=[{_JOINED}])"  # a Persian or Hindi word, a family of emoji
    f"|(?<=[{_EMOJI}])[\ufe0e\ufe0f]|(?<=[0-9#*])\ufe0f(?=\u20e3)"  # emoji in colour, keycaps
    "|(?<=[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\U000e0100-\U000e01ef]"  # forms of a Japanese character
    "|(?<=\U0001f3f4)[\U000e0030-\U000e007a]{3,6}\U000e007f"  # flags of England, Scotland, Wales
)
COLOURS = re.compile("\x1b\\[[0-9;]*m")  # what libraries put around their own messages


def printable(text: str, keep: str = "") -> str:
    """The text with every character that a terminal may obey, and every one that can't be seen, written as an escape
    (\\x1b, \\u202e, \\u200b). File names, ids and column names can hold codes that clear the screen, change what was
    printed, or make two names look alike. Ordinary text of any language and emoji stay as they are.

    keep: characters that stay as they are, such as the line breaks of a message that has several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    ordinary = {i for found in _ORDINARY.finditer(text) for i in range(*found.span())}
    return "".join(c if c in keep or i in ordinary or _is_seen(c) else _escape(c) for i, c in enumerate(text))


@functools.lru_cache(maxsize=4096)
def _is_seen(c: str) -> bool:
    category = unicodedata.category(c)
    if category == "Cf":
        return bool(_VISIBLE_FORMAT.match(c))
    if category == "Cn":  # emoji that are newer than this Python
        return "\U0001f000" <= c <= "\U0001faff"
    return category not in ("Cc", "Cs", "Co", "Zl", "Zp") and not _INVISIBLE.match(c)


def markdown_text(text) -> str:
    """The text as Markdown that shows it as it is, in a paragraph, a list or a table: no link, no picture, no HTML."""
    return re.sub(r"[&<>`*~|\[\]\\!]", lambda match: f"&#{ord(match[0])};", printable(str(text)))


def markdown_code(text) -> str:
    """The text as a code span of Markdown, between more backticks than it holds in a row."""
    text = printable(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or text != text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _escape(c: str) -> str:
    return ascii(c)[1:-1]
