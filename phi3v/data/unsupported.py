"""What conversations in other formats may hold and this model can't use: other media, tools, preferences, boxes.

Nothing of it may be dropped in silence, because the rest of the example would then teach something wrong.
"""

import re
import reprlib
from collections import Counter

# Names of fields, in lower case, and what to do about them.
_VIDEOS = "the model sees images only: make frames of videos with convert_ucf101.py, or remove the field"
_SOUNDS = "the model can't hear: remove the field, or the example"
_TOOLS = "tools can't be trained here: remove the field, or the example"
_PREFERENCES = "preferences can't be trained here: keep one answer, as the assistant's message"
_PLACES = "places in an image are not read: write them into the texts, or remove the field"
_FIELDS = [
    (re.compile(r"videos?(_(path|file|name|url)s?)?"), _VIDEOS),
    (re.compile(r"audios?(_(path|file|name|url)s?)?"), _SOUNDS),
    (re.compile(r"tools?|functions?|(tool|function)_calls?"), _TOOLS),
    (re.compile(r"(rejected|chosen)(_\w+)?"), _PREFERENCES),
    (re.compile(r"bbox(es)?|box(es)?|bounding_box(es)?|objects|masks?|segmentations?"), _PLACES),
]
# Places of media in the formats of other models: <video>, <ImageHere>, <image 1>, <|vision_start|>, <IMG_CONTEXT>,
# <start_of_image>, <im_start>, [IMG], … A tag of HTML that shows a medium has attributes, and is not one of them.
_MEDIA_TAG = re.compile(
    r"<\|?(?:\w{1,20}_)?(?:image|img|video|audio|speech|sound|vision)(?:[_-]?\w{0,30}| \d{1,3})\|?>|"
    r"<(?:im|vi)_(?:start|end|patch)>|\[IMG(?:_BREAK|_END)?\]",
    re.IGNORECASE,
)
_MEDIA_FILE = re.compile(
    r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|svg|pdf|"
    r"mp4|m4v|avi|mov|mkv|webm|wmv|flv|mpe?g|mts|3gp|ogv|wav|mp3|flac|ogg|m4a)$",
    re.IGNORECASE,
)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def is_empty(value) -> bool:
    """Whether a field holds nothing, as all fields do that a table lacks when it is saved as jsonl."""
    return value is None or isinstance(value, (str, list, dict)) and not value


def is_media_file(text: str) -> bool:
    """Whether a text looks like the name of a file with an image, a video or a sound."""
    return bool(_MEDIA_FILE.search(text.strip()))


def field_problem(name: str, value) -> str | None:
    """What is wrong with a field that this model can't use, worded to follow its name; None for any other field."""
    advice = next((advice for names, advice in _FIELDS if names.fullmatch(name.lower())), None)
    return f"is {_SHORT.repr(value)}, but {advice}" if advice and not is_empty(value) else None


def media_problem(name: str, value) -> str | None:
    """What is wrong with an unknown field of an example without images, if it seems to name a file of a medium."""
    texts = [value, *(value if isinstance(value, list) else value.values() if isinstance(value, dict) else ())]
    if any(isinstance(text, str) and is_media_file(text) for text in texts):
        return (
            f"is {_SHORT.repr(value)}, but no field of this name is read, and the example has no other image: rename it"
        )
    return None


def tag_problem(text: str) -> str | None:
    """What is wrong with a text that holds a place for a medium, worded to follow the text's name; None if nothing is.

    With --literal_tags, such tags are allowed as text.
    """
    if ("<" in text or "[" in text) and (found := _MEDIA_TAG.search(text)):  # looking for a character is much faster
        return (
            f"holds {_SHORT.repr(found[0])}, which stands for an image, a video or a sound in other formats, and would "
            "be read as text: list the images in their field and remove the tag, or give --literal_tags if it is text"
        )
    return None


class UnusedFields:
    """Counts fields that are not used, to name each once at the end."""

    def __init__(self):
        self.counts = Counter()

    def add(self, name: str, value):
        if not is_empty(value):
            self.counts[name] += 1

    def lines(self, source) -> list[str]:
        """A line that names the fields and how often each occurs; none if all fields were used."""
        if not self.counts:
            return []
        names = ", ".join(f"{name!s:.80} ({n:,} times)" for name, n in self.counts.most_common(10))
        more = f", and {len(self.counts) - 10:,} others" if len(self.counts) > 10 else ""
        line = f"note: {source}: fields that are not used: {names}{more}"
        return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)]
