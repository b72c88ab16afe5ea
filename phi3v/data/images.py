"""Opening images so that whatever is wrong with one becomes an InputError with its name; their conversion to RGB."""

import io
import os

import numpy as np
from PIL import Image

from ..errors import InputError


def image_name(image) -> str:
    """How messages call an image."""
    if isinstance(image, dict):
        return image.get("path") or "an image of the table"
    return str(image) if isinstance(image, (str, os.PathLike)) else "an image"


def open_image(image, name: str | None = None, header_only: bool = False) -> Image.Image:
    """The image, decoded unless `header_only`, in the mode that it has; of an animation the first frame.

    image: a path, `{"bytes", "path"}` with either of them as `datasets` has it, or a PIL image (which is copied).
    name: what messages call it, by default its path.
    Raises InputError for what is missing, no regular file, no image, damaged, or so large that PIL refuses it.
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
            raise ValueError("there is none")
        if not isinstance(image, io.BytesIO):
            if not os.path.exists(image):
                raise ValueError("the file does not exist")
            if not os.path.isfile(image):  # reading a pipe or a device would not end
                raise ValueError("no regular file")
        opened = Image.open(image)
        if not header_only:
            opened.load()
    except Exception as e:  # PIL's readers raise nearly everything, also struct.error, zlib.error and AttributeError
        reason = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, Image.UnidentifiedImageError):
            reason = "the file is empty" if _is_empty(image) else "in no format that PIL knows"
        raise InputError(f"{name} can't be read as an image ({reason}): replace it or take its example out") from None
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
    """Three channels of 8 bits, pixels equal to the official processor's except for 16-bit grey.

    As there, transparency is dropped, so that the colours stored under it show, CMYK is converted without a colour
    profile, and nothing is rotated by EXIF. Of 16-bit grey PIL, and with it the official processor, would clip all
    above 255 to white; here the upper 8 bits are taken, as PIL itself takes them of 16-bit colour.
    Raises InputError for modes that PIL can't convert, and for grey values that are floating point or go beyond 16
    bits: what is white there is unknown.
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
    """`open_image` and `to_rgb` of an image as they take it; InputError where either fails."""
    with open_image(image, name) as opened:
        return to_rgb(opened, name or image_name(image))
