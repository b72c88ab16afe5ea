"""Files of strangers that are no annotations: images that are slow or not images, tables, and cached features."""

import io
import os
import struct
import zlib
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

# ---- Images that PIL would open with another program, or that take minutes to decode

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 50 50
%%EndComments
(PWNED) print showpage
%%EOF
"""


def tiff_of_pages(n: int) -> bytes:
    """A TIFF of one pixel with n pages, all of which are the same."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start, size = 12, len(page) + 4
    pages = b"".join(page + struct.pack("<I", start + size * (i + 1) if i < n - 1 else 0) for i in range(n))
    return b"II*\0" + struct.pack("<I", start) + b"\x80\0\0\0" + pages


def jpeg_of_scans(n: int, side: int) -> bytes:
    """A progressive JPEG with n scans more than it needs, each of which says in a few bytes that nothing changes."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    blocks = (-(-side // 8)) ** 2
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    head += segment(0xC4, b"\0\1" + b"\0" * 15 + b"\0") + segment(0xC4, b"\x10\1" + b"\0" * 15 + b"\xe0")
    first = segment(0xDA, b"\1\1\0\0\0\1") + b"\0" * (blocks // 8 + 1)
    bits = ("0" + "1" * 14) * (blocks // 32767 + 1)  # "the next 32,767 blocks are empty"
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + head + first + (segment(0xDA, b"\1\1\0\1\x3f\1") + empty) * n + b"\xff\xd9"


def jpeg_of_exif(n: int, before: bytes = b"") -> bytes:
    """A JPEG with n segments of EXIF data. before: bytes before each of them that readers skip."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "jpeg")
    segment = before + b"\xff\xe1\0\x0cExif\0\0II*\0"
    return buffer.getvalue()[:2] + segment * n + buffer.getvalue()[2:]


def bmp_of_run_lengths(width: int, height: int) -> bytes:
    """A BMP that says after one pixel of each row that the rest of the row is empty."""
    rows = b"\1\0\0\0" * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + header + b"\0" * 1024 + rows


def ppm_of_comments(n: int) -> bytes:
    return b"P3\n8 8\n255\n" + b"#\n" * n + b"0 " * 192


def png_with(name: bytes, body: bytes, n: int = 1) -> bytes:
    """A PNG with n chunks of this name before its pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return buffer.getvalue()[:33] + chunk * n + buffer.getvalue()[33:]


def gif_of_frames(n: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * n + b";"


# name: (a function that makes the content, what the message holds). All of them must be refused within a second.
SLOW_IMAGES = {
    "scans.jpg": (lambda: jpeg_of_scans(2000, 10_000), "it has 2,001 scans, which take minutes to decode"),
    "exif.jpg": (lambda: jpeg_of_exif(300_000), "more than 100 segments of EXIF data"),
    "exif_behind_noise.jpg": (lambda: jpeg_of_exif(100_000, b"\xff\xff\x01"), "more than 100 segments of EXIF data"),
    "exif_behind_a_marker.jpg": (lambda: jpeg_of_exif(100_000, b"\xff\xf0"), "more than 100 segments of EXIF data"),
    "filler.jpg": (lambda: jpeg_of_exif(1, b"\xff" * 10_000_000), "more than 100,000 segments and filler bytes"),
    "zeros.jpg": (
        lambda: jpeg_of_exif(1, b"\xff\xfe\0\2" + b"\0" * 10_000_000),
        "more than 100,000 segments and filler bytes",
    ),
    "segments.jpg": (lambda: jpeg_of_exif(1, b"\xff\xfe\0\2" * 1_000_000), "more than 100,000 segments and filler"),
    "run_lengths.bmp": (lambda: bmp_of_run_lengths(13_000, 13_000), "a large BMP with run lengths"),
    "comments.ppm": (lambda: ppm_of_comments(1_000_000), "more than 1000 comments"),
    "colours.png": (lambda: png_with(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 10**8)), "too large"),
}
# All of these must be read within a second.
LARGE_IMAGES = {
    "pages.tif": lambda: tiff_of_pages(20_000),
    "frames.gif": lambda: gif_of_frames(50_000),
    "texts.png": lambda: png_with(b"tEXt", b"a\0b", 50_000),
    "exif.jpg": lambda: jpeg_of_exif(100),
    "comments.jpg": lambda: jpeg_of_exif(1, (b"\xff\xfe\xff\xff" + b"a" * 65_533) * 1000 + b"\xff" * 1000),
    "scans.jpg": lambda: jpeg_of_scans(200, 1000),
}


# ---- Files of the cache of vision features, for an image with 1 x 2 sub-crops, 4 rows a crop and 3 numbers a row


def features(rows: int = 12, width: int = 3, grid=(1, 2), dtype=torch.float32, fill=0.0, **more):
    content = {"features": torch.full((rows, width), fill, dtype=dtype), "grid": torch.tensor(grid)} | more
    return lambda path: save_file(content, path)


def _sparse(path: Path):
    path.touch()
    os.truncate(path, 2**36)


# name: (a function that makes the file, the reason in the message)
BAD_FEATURES = {
    "missing": (lambda path: None, "the file does not exist"),
    "empty": (Path.touch, "Error while deserializing header"),
    "noise": (lambda path: path.write_bytes(b"damaged" * 99), "Error while deserializing header"),
    "cut": (lambda path: (features()(path), os.truncate(path, path.stat().st_size - 5)), "Error while deserializing"),
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "huge": (_sparse, "the file is too large"),
    "more rows": (features(rows=16), "it holds features [16, 3] of F32, not [12, 3] of F32"),
    "fewer rows": (features(rows=4), "it holds features [4, 3] of F32"),
    "other width": (features(width=4), "it holds features [12, 4] of F32"),
    "whole numbers": (features(dtype=torch.int64, fill=0), "it holds features [12, 3] of I64"),
    "other dtype": (features(dtype=torch.float64), "it holds features [12, 3] of F64"),
    "other grid": (features(grid=(2, 1)), "it is of an image that does not have 1 x 2 sub-crops"),
    "huge grid": (features(grid=(10**9, 10**9)), "it is of an image that does not have 1 x 2 sub-crops"),
    "fractions": (features(grid=(1.0, 2.0)), "it is of an image that does not have 1 x 2 sub-crops"),
    "three sides": (features(grid=(1, 2, 1)), "it is of an image that does not have 1 x 2 sub-crops"),
    "no grid": (lambda path: save_file({"features": torch.zeros(12, 3)}, path), "it holds 'features', not"),
    "other names": (features(extra=torch.zeros(1)), "it holds 'extra, features, grid', not"),
    "NaN": (features(fill=float("nan")), "some of its numbers are NaN or infinite"),
    "infinite": (features(fill=-float("inf")), "some of its numbers are NaN or infinite"),
}
