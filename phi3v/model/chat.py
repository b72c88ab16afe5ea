"""The chat format: its tokens, and how messages with images, as transformers' chat templates and pipelines have them,
become texts with image tags, and images."""

import base64
import binascii
import io
import os
import re
import urllib.request
from itertools import groupby

from PIL import Image

from ..errors import InputError
from ..image_files import open_image_file
from ..inside import open_file

# The chat format's special tokens.
ASSISTANT = "<|assistant|>"
ROLE_TOKENS = ("<|user|>", ASSISTANT, "<|system|>")
END_OF_CONVERSATION = "<|endoftext|>"
END_TOKENS = ("<|end|>", END_OF_CONVERSATION)  # the first ends a turn
OTHER_TOKENS = ("<s>", "</s>", "<unk>", "<|image|>")
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")

# The template in the Hub's tokenizer_config.json, and another that renders the same.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)
SAME_CHAT_TEMPLATE = (
    "{%- for turn in messages -%}{{ '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
IMAGE_KEYS = ("image", "url", "path", "base64")
SECONDS = 60  # to wait for an address


def render(messages: list[dict], add_generation_prompt: bool = False) -> str:
    """What CHAT_TEMPLATE makes of messages with a text as `content`. A folder's own template is never run: a stranger's
    could take for ever."""
    text = "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)
    return text + ("<|assistant|>\n" if add_generation_prompt and messages[-1]["role"] != "assistant" else "")


def flatten(messages: list[dict], image_tag) -> tuple[list[dict], list]:
    """Messages whose contents are texts, and the images that the tags in them stand for.

    A content is a text, or a list of {"type": "text", "text"}, {"type": "image"} with the image under "image", "url",
    "path" or "base64", and {"type": "image_url", "image_url": {"url"}}. An image that is only a place has none of
    these keys; the caller gives such images himself. Images are numbered over all messages. The text of a message is
    what `join_pieces` makes of its parts, as in training.

    image_tag: returns the tag of an image, by its number.
    Raises ValueError for content of another kind.
    """
    flat, images, number = [], [], 0
    for message in messages:
        content = message.get("content")
        if content is None or isinstance(content, str):
            flat.append({**message, "content": content or ""})
            continue
        pieces = []  # (is an image, text or tag)
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind == "text":
                pieces.append((False, part["text"]))
            elif kind in ("image", "image_url"):
                number += 1
                pieces.append((True, image_tag(number)))
                images += _image_of(part)
            else:
                raise ValueError(f"a message has a part of type {kind!r:.80}, must be text, image or image_url")
        flat.append({**message, "content": join_pieces(pieces)})
    return flat, images


def join_pieces(pieces: list[tuple[bool, str]]) -> str:
    """One text of texts and tags of images, each given as (is a tag, text).

    Neighbouring tags stand together, and texts in lines of their own. If all tags come first, a line break stands
    between them and the text. Between another tag and a text it stands only where the text has no white space itself,
    so that "Image-1: ", tag, " is" is one sentence.
    """
    groups = [
        (is_tag, ("" if is_tag else "\n").join(text for _, text in group))
        for is_tag, group in groupby(pieces, key=lambda piece: piece[0])
    ]
    tags_come_first = [is_tag for is_tag, _ in groups] == [True, False]
    joined = ""
    for i, (is_tag, text) in enumerate(groups):
        at_seam = joined[-1:] if is_tag else text[:1]  # of the text beside the tag
        if i and (tags_come_first or not at_seam.isspace()):
            joined += "\n"
        joined += text
    return joined


def _image_of(part: dict) -> list:
    """The image of a part in a list, which is empty if the part is only a place for an image."""
    if part["type"] == "image_url":
        address = part.get("image_url")
        return [open_image(address.get("url") if isinstance(address, dict) else address)]
    return [open_image(part[key]) for key in IMAGE_KEYS if part.get(key) is not None][:1]


def open_image(source) -> Image.Image:
    """An image, with its pixels as stored, from a file's name, an http(s) address, or base64. Others are returned.

    transformers' own `load_image` would turn it by EXIF, and clip 16-bit grey. Raises InputError if it can't be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    name = os.fspath(source)
    try:
        if name.startswith(("http://", "https://")):
            with urllib.request.urlopen(name, timeout=SECONDS) as response:
                content = response.read()
        elif os.path.exists(name := name.removeprefix("file://")):
            with open_file(name) as file:
                content = file.read()
        else:
            encoded = name.partition(",")[2] if name.startswith("data:") else name
            content = base64.b64decode("".join(encoded.split()), validate=True)
        return open_image_file(io.BytesIO(content))
    except (binascii.Error, ValueError):
        reason = "no file with an image, no http(s) address of one and no base64 of one"
    except OSError as e:  # of the network, and of files that must not be read
        reason = " ".join(str(e).split())
    raise InputError(f"{name if len(name) <= 300 else f'{name[:80]}…'} can't be read as an image ({reason})")
