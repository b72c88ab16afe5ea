"""Opens images and converts them to RGB. Whatever is wrong with an image becomes an InputError that names it."""

import io
import os

import numpy as np
from PIL import Image

from ..errors import InputError


def image_name(image) -> str:
    """The name of an image in messages."""
    if isinstance(image, dict):
        return image.get("name") or image.get("path") or "an image of the table"
    return str(image) if isinstance(image, (str, os.PathLike)) else "an image"


def open_image(image, name: str | None = None, header_only: bool = False) -> Image.Image:
    """The image in its own mode, decoded unless `header_only`; the first frame of an animation.

    image: a path; `{"bytes", "path"}`, one of which may be None, as `datasets` has undecoded images; or a PIL image,
        which is copied.
    name: its name in messages, by default its path.
    Raises InputError if it is missing, damaged, not a regular file, not an image, or so large that PIL refuses it.
    """
    name = name or image_name(image)
    try:
        if isinstance(image, Image.Image):
            return image.copy()
        if isinstance(image, dict):
            content, image = image.get("bytes"), image.get("path")
            if content is not None:
                image = io.BytesIO(content)
        if image is None:
            raise ValueError("the image is missing")
        if not isinstance(image, io.BytesIO):
            if not os.path.exists(image):
                raise ValueError("the file does not exist")
            if not os.path.isfile(image):  # reading a pipe or a device might never end
                raise ValueError("not a regular file")
        opened = Image.open(image)
        if not header_only:
            opened.load()
    except Exception as e:  # PIL raises nearly everything, also struct.error, zlib.error and AttributeError
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, Image.UnidentifiedImageError):
            reason = "the file is empty" if _is_empty(image) else "not in a format that PIL knows"
        raise InputError(f"{name} can't be read as an image ({reason}): replace it or remove its example") from None
    return opened


def image_size(image) -> tuple[int, int]:
    """(width, height) in pixels, from the image's header alone. Raises InputError as `open_image` does."""
    if isinstance(image, Image.Image):
        return image.size
    with open_image(image, header_only=True) as opened:
        return opened.size


def _is_empty(image) -> bool:
    return not (image.getbuffer().nbytes if isinstance(image, io.BytesIO) else os.path.getsize(image))


def to_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Three channels of 8 bits. Pixels equal those of the official processor, except for 16-bit grey.

    Like the official processor, this drops transparency, so that the colours stored under it show; it converts CMYK
    without a colour profile; and it does not rotate by EXIF. PIL, and thus the official processor, would clip 16-bit
    grey above 255 to white. This function takes the upper 8 bits, as PIL does for 16-bit colour.
    Raises InputError for modes that PIL can't convert, and for grey values that are floating point or need more than 16
    bits, because their value for white is unknown.
    """
    try:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: save it with 8 bits a channel")
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = np.asarray(image)
            if grey.size and (grey.min() < 0 or grey.max() > 65535):
                raise ValueError(f"its values go from {grey.min()} to {grey.max()}: save it with 8 bits a channel")
            return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except ValueError as e:
        raise InputError(f"{name}, of mode {image.mode}, can't be converted to RGB ({e})") from None


def read_image(image, name: str | None = None) -> Image.Image:
    """Opens an image as `open_image` does and converts it as `to_rgb` does. Raises InputError as they do."""
    with open_image(image, name) as opened:
        return to_rgb(opened, name or image_name(image))
