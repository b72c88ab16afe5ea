"""Opens files with images: in the formats that people train on, and none that takes long to decode for its size."""

import contextlib
import io
import re
from functools import cache
from typing import BinaryIO

from PIL import Image, JpegImagePlugin

# PIL knows more formats. Some of them start other programs, as EPS does, and few people look at their decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")  # JPEG includes MPO, of several pictures
_NAMES = "JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, PPM"

# Limits for files that are small and take minutes. At each limit, decoding takes some seconds.
MOST_SEGMENTS = 100_000  # before the pixels of a JPEG, with filler bytes between them; PIL reads each in Python
MOST_EXIF_SEGMENTS = 100  # of a JPEG; one is usual, and PIL joins them in quadratic time
MOST_SCANNED_PIXELS = 2 * 10**10  # the scans of a JPEG times its pixels; progressive photos have about 10 scans
MOST_RUN_LENGTH_PIXELS = 10**7  # of a BMP with run lengths, which PIL decodes in Python
MOST_COMMENTS = 1000  # of a PPM whose pixels are text; PIL removes them in quadratic time

_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # a marker that has a segment behind it, or ends the picture


@cache
def formats() -> tuple[str, ...]:
    """The names of the formats that are read, as PIL has them: also HEIC, if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)  # old versions of PIL lack AVIF


def open_image_file(file: BinaryIO, header_only: bool = False) -> Image.Image:
    """The image in a file, of which only the header was read. It reads the rest from `file` when it is loaded.

    header_only: the image will not be loaded, so what matters only then is not checked.
    Raises ValueError with the reason for another format and for an image beyond a limit above, or what PIL raises.
    """
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    if is_jpeg:
        _check_head(file)
    try:
        image = Image.open(file, formats=formats())
    except Image.UnidentifiedImageError:
        if not file.seek(0, io.SEEK_END):
            raise ValueError("the file is empty") from None
        also = ", HEIC" if "HEIF" in formats() else ""
        raise ValueError(f"in none of the formats that are read: {_NAMES}{also}") from None
    if not header_only:
        _check_work(image, file)
    return image


def _check_head(file: BinaryIO):
    """Walks through the head of a JPEG as PIL does."""
    exif_segments, steps = 0, 0
    while byte := file.read(1):
        steps += 1
        if byte != b"\xff":
            continue
        while (marker := file.read(1)) == b"\xff" and steps <= MOST_SEGMENTS:
            steps += 1
        if steps > MOST_SEGMENTS:
            raise ValueError(f"it has more than {MOST_SEGMENTS:,} segments and filler bytes: save it as a usual JPEG")
        if not marker or marker == b"\xda":  # the pixels begin
            break
        has_segment = JpegImagePlugin.MARKER.get(0xFF00 | marker[0], (0, 0, None))[2]
        if not has_segment:
            continue
        head = file.read(8)
        exif_segments += marker == b"\xe1" and head[2:] == b"Exif\0\0"
        if exif_segments > MOST_EXIF_SEGMENTS:
            raise ValueError(f"it has more than {MOST_EXIF_SEGMENTS} segments of EXIF data: save it without them")
        file.seek(int.from_bytes(head[:2], "big") - len(head), io.SEEK_CUR)
    file.seek(0)


def _check_work(image: Image.Image, file: BinaryIO):
    """Raises ValueError for an image that would take minutes to decode."""
    pixels, decoder = image.width * image.height, image.tile[0][0] if image.tile else ""
    if image.format in ("JPEG", "MPO"):
        scans = _scans(_content(file))
        if scans * pixels > MOST_SCANNED_PIXELS:
            raise ValueError(f"it has {scans:,} scans, which take minutes to decode: save it as a usual JPEG")
    elif decoder == "bmp_rle" and pixels > MOST_RUN_LENGTH_PIXELS:
        raise ValueError("it is a large BMP with run lengths, which take minutes to decode: save it as PNG")
    elif decoder == "ppm_plain" and _content(file).count(b"#") > MOST_COMMENTS:
        raise ValueError(f"it has more than {MOST_COMMENTS} comments: save it as PNG")


def _content(file: BinaryIO) -> bytes:
    at = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(at)
    return content


def _scans(content: bytes) -> int:
    """How many scans the first picture of a JPEG has, at most."""
    if (most := content.count(b"\xff\xda")) < 100:
        return most  # thumbnails and further pictures are counted too
    scans, at = 0, 2
    while found := _JPEG_SEGMENT.search(content, at):
        at, marker = found.end(), found[0][1]
        if marker == 0xD9:  # the end of the picture
            break
        scans += marker == 0xDA
        at += int.from_bytes(content[at : at + 2], "big")
    return scans
