"""Opens images and converts them to RGB. Whatever is wrong with an image becomes an InputError that names it."""

import contextlib
import functools
import io
import os
import stat
import zlib
from collections.abc import Iterator

from PIL import Image

from ..errors import InputError
from ..image_files import open_image_file
from ..inside import open_file
from ..model.rgb import TURNS, exif_orientation, to_rgb, upright_size

State = tuple[int, ...] | None


def image_name(image) -> str:
    """The name of an image in messages."""
    if isinstance(image, dict):
        return image.get("name") or image.get("path") or "an image of the table"
    return str(image) if isinstance(image, (str, os.PathLike)) else "an image"


@contextlib.contextmanager
def open_image(image, name: str | None = None, header_only: bool = False) -> Iterator[Image.Image]:
    """For a `with` block: the image in its own mode, decoded unless `header_only`; the first frame of an animation.

    image: a path, of which `open_file` opens the file; `{"bytes", "path"}`, one of which may be None, as `datasets` has
        undecoded images; or a PIL image, which is copied.
    name: its name in messages, by default its path.
    Raises InputError if it is missing, damaged, not a regular file, outside of the folder that it must lie in, not in
    one of the formats that are read, or so large that PIL refuses it.
    """
    name = name or image_name(image)
    with contextlib.ExitStack() as stack:
        try:
            opened = image.copy() if isinstance(image, Image.Image) else None
            if opened is None:
                opened = open_image_file(stack.enter_context(_file_of(image)), header_only)
                if not header_only:
                    opened.load()
        except Exception as e:  # PIL raises nearly everything, also struct.error, zlib.error and AttributeError
            reason = " ".join(str(e).split()) or type(e).__name__
            raise InputError(f"{name} can't be read as an image ({reason}): replace it or remove its example") from None
        yield opened


def _file_of(image) -> io.BufferedIOBase:
    """The file of an image that is a path or `{"bytes", "path"}`. Raises ValueError, TypeError or OSError."""
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is not None:
        return io.BytesIO(content)
    path = image.get("path") if isinstance(image, dict) else image
    if path is None:
        raise ValueError("the image is missing")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"it is of type {type(path).__name__}")
    return open_file(path)


def read_bytes(image) -> bytes:
    """The content of an image's file. Raises InputError if it can't be read."""
    try:
        with _file_of(image) as file:
            return file.read()
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{image_name(image)} can't be read ({' '.join(str(e).split())})") from None


def state_of_image(image) -> State:
    """What says that an image's file, or its content in memory, is still the same, without reading the file: its size
    and its times, or a checksum. None for an image that is neither, such as a PIL image or a missing file."""
    if isinstance(image, dict) and image.get("bytes") is not None:
        return len(image["bytes"]), zlib.crc32(image["bytes"])
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, (str, os.PathLike)):
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else None


def image_size(image, exif_rotate: bool = False, state: State = None) -> tuple[int, int]:
    """(width, height) in pixels, from the image's header alone. Raises InputError as `open_image` does.

    exif_rotate: of the image turned upright, as `to_rgb` does it.
    state: of the image, as `state_of_image` has just returned it; then a file's size that was read before is returned.
    """
    if isinstance(image, Image.Image):
        return upright_size(image, exif_rotate)
    if state is not None and isinstance(image, (str, os.PathLike)):
        return _size_in_file(image, getattr(image, "folders", None), state, exif_rotate)
    with open_image(image, header_only=True) as opened:
        return upright_size(opened, exif_rotate)


@functools.lru_cache(maxsize=2**16)  # about 25 MB
def _size_in_file(path, folders, state: State, exif_rotate: bool) -> tuple[int, int]:
    return image_size(path, exif_rotate)


def read_image(image, name: str | None = None, exif_rotate: bool = False) -> Image.Image:
    """Opens an image as `open_image` does and converts it as `to_rgb` does. Raises InputError as they do."""
    with open_image(image, name) as opened:
        return to_rgb(opened, name or image_name(image), exif_rotate)


def as_seen(image, exif_rotate: bool):
    """The image as the model sees it, to be shown to a user: turned upright if `exif_rotate`; else as it was given.

    An image that can't be read is returned as it is, for the caller to handle.
    """
    try:
        return read_image(image, exif_rotate=True) if exif_rotate else image
    except InputError:
        return image


def save_upright(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Writes an upright copy of an image that EXIF says to turn, without EXIF data, in the format of its file.

    Returns False, and writes nothing, if the image is upright already. Raises InputError if it can't be read.
    """
    with open_image(source, header_only=True) as header:
        if exif_orientation(header) == 1:
            return False
    with open_image(source) as image:
        turned = image.transpose(TURNS[exif_orientation(image)])
        options = {"icc_profile": image.info["icc_profile"]} if image.info.get("icc_profile") else {}
        format = "JPEG" if image.format == "MPO" else image.format  # an MPO is a JPEG with more pictures behind it
        options |= {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(format, {})
    turned.info = {}
    turned.save(target, format, **{"quality": 95, **options})
    return True
