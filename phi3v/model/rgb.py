"""Converts an image of any of PIL's modes to RGB: one rule for training, evaluation, ask.py and the library."""

import numpy as np
from PIL import ExifTags, Image

from ..errors import InputError

# What stands an image upright, by the orientation that its EXIF data say (ExifTags.Base.Orientation).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, name: str | None = None, exif_rotate: bool = False) -> Image.Image:
    """Three channels of 8 bits. Pixels equal those of the official processor, except for 16-bit grey.

    Like the official processor, this drops transparency, so that the colours stored under it show; it converts CMYK
    without a colour profile; and it uses the pixels as stored, unless `exif_rotate` says to turn them upright as EXIF
    tells. PIL, and thus the official processor, would clip 16-bit grey above 255 to white. This function takes the
    upper 8 bits, as PIL does for 16-bit colour.

    name: the image's name in messages, by default the file from which PIL opened it.
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
            rgb = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        else:
            rgb = image.convert("RGB")
    except ValueError as e:
        name = name or getattr(image, "filename", None) or "an image"
        raise InputError(f"{name}, of mode {image.mode}, can't be converted to RGB ({e})") from None
    if exif_rotate and (orientation := exif_orientation(image)) != 1:
        rgb = rgb.transpose(TURNS[orientation])
        rgb.info = {}  # with the old EXIF data in it, the image would be turned once more when it is converted again
    return rgb


def exif_orientation(image: Image.Image) -> int:
    """The orientation in an image's EXIF data, 1 to 8; 1, which means upright, if there is none or no valid one."""
    if image.format == "TIFF":  # PIL itself turns these while it decodes them
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in TURNS else 1
    except Exception:  # damaged metadata: PIL raises nearly everything
        return 1


def upright_size(image: Image.Image, exif_rotate: bool = True) -> tuple[int, int]:
    """(width, height) of what `to_rgb` makes of an image, from its header alone."""
    is_lying = exif_rotate and exif_orientation(image) >= 5
    return image.size[::-1] if is_lying else image.size
