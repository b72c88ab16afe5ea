"""Only formats that people train on are opened, and a small file does not take minutes."""

import io
import os
import sys
import time
import types

import bad_files
import pytest
from PIL import Image

from phi3v import image_files
from phi3v.data.check import ANIMATED, examine_image
from phi3v.data.images import image_size, read_image
from phi3v.errors import InputError
from phi3v.image_files import FORMATS, open_image_file
from phi3v.model import chat
from phi3v.report.page import _thumbnail


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program in the place of Ghostscript, and the file that it makes when it is started."""
    program, started = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\nsleep 15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return started


def test_postscript_is_not_run(ghostscript, tmp_path, processor):
    path = tmp_path / "cat.jpg"
    path.write_bytes(bad_files.EPS)
    for image in (path, str(path), {"bytes": bad_files.EPS, "path": "cat.jpg"}, {"bytes": None, "path": str(path)}):
        message = "cat.jpg can't be read as an image .in none of the formats that are read: JPEG, PNG, WebP, BMP, TIFF"
        with pytest.raises(InputError, match=message):
            read_image(image)
        with pytest.raises(InputError, match=message):
            image_size(image)
        assert "in none of the formats" in examine_image(image, processor.image_processor)[2]
        assert _thumbnail(image, 9) is None
    with pytest.raises(InputError, match="no file with an image"):
        chat.open_image(path)
    assert not ghostscript.exists()


# Formats in which PIL writes and reads, and which are not on the list.
@pytest.mark.parametrize(
    "format", ["EPS", "ICNS", "ICO", "PCX", "TGA", "SGI", "IM", "DDS", "MSP", "SPIDER", "JPEG2000"]
)
def test_other_formats_are_refused(format):
    Image.init()
    buffer = io.BytesIO()
    image = Image.new({"MSP": "1", "SPIDER": "F"}.get(format, "RGB"), (32, 32))
    image.save(buffer, format)
    with pytest.raises(InputError, match="in none of the formats that are read"):
        read_image({"bytes": buffer.getvalue(), "path": "a.png"})


def test_every_format_of_the_list_is_read(tmp_path):
    for format in (*FORMATS, "MPO"):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 24), (0, 200, 0)).save(buffer, format)
        (tmp_path / "a.jpg").write_bytes(buffer.getvalue())  # whatever the ending says
        for image in ({"bytes": buffer.getvalue(), "path": None}, tmp_path / "a.jpg"):
            assert image_size(image) == read_image(image).size == (32, 24)
            assert _thumbnail(image, 16)["width"] == 16
        assert chat.open_image(tmp_path / "a.jpg").size == (32, 24)


def test_heic_is_read_where_its_plugin_is_installed(monkeypatch):
    def register():
        Image.register_open("HEIF", lambda file, name: Image.new("RGB", (5, 5)), lambda prefix: prefix[4:8] == b"ftyp")

    heic = b"\0\0\0\x18ftypheic" + bytes(12)
    with pytest.raises(ValueError, match="AVIF, PPM$"):
        open_image_file(io.BytesIO(heic))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(image_files, "formats", image_files.formats.__wrapped__)
    assert open_image_file(io.BytesIO(heic), header_only=True).size == (5, 5)
    with pytest.raises(ValueError, match="AVIF, PPM, HEIC"):
        open_image_file(io.BytesIO(b"text"))


@pytest.mark.parametrize("name", bad_files.SLOW_IMAGES)
def test_images_that_would_take_minutes_are_refused(name, processor):
    make, message = bad_files.SLOW_IMAGES[name]
    image, start = {"bytes": make(), "path": name}, time.process_time()
    with pytest.raises(InputError, match=message) as error:
        read_image(image)
    assert name in str(error.value) and _thumbnail(image, 9) is None
    assert message in examine_image(image, processor.image_processor)[2]
    assert time.process_time() - start < 10  # far less than the minutes that it would take, on any machine


@pytest.mark.parametrize("name", bad_files.LARGE_IMAGES)
def test_images_of_many_parts_are_read_in_time(name, processor):
    image, start = {"bytes": bad_files.LARGE_IMAGES[name](), "path": name}, time.process_time()
    tokens, kinds, problem = examine_image(image, processor.image_processor)
    assert tokens and not problem and kinds == ([ANIMATED] if name in ("pages.tif", "frames.gif") else [])
    assert _thumbnail(image, 9) and time.process_time() - start < 10


def test_pages_are_not_counted(monkeypatch, processor):
    """Counting the pages of a TIFF takes quadratic time."""
    seeks, seek = [], Image.Image.seek
    for format in ("TIFF", "GIF"):
        plugin = sys.modules[f"PIL.{format.title()}ImagePlugin"]
        seek = getattr(plugin, f"{format.title()}ImageFile")._seek
        monkeypatch.setattr(
            getattr(plugin, f"{format.title()}ImageFile"),
            "_seek",
            lambda self, *args, seek=seek: seeks.append(args) or seek(self, *args),
        )
    for content in (bad_files.tiff_of_pages(50), bad_files.gif_of_frames(50)):
        assert examine_image({"bytes": content, "path": None}, processor.image_processor)[1] == [ANIMATED]
    assert 1 < len(seeks) < 10


def test_pictures_behind_the_first_one_are_no_scans_of_it():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG", progressive=True)
    # Phones put a film behind a photo, and thumbnails into its head.
    content = buffer.getvalue() + b"\xff\xda" * 10_000
    assert image_files._scans(content) == image_files._scans(buffer.getvalue() + b"\xff\xda" * 200) < 20
    assert read_image({"bytes": content, "path": None}).size == (64, 64)
    assert image_files._scans(bad_files.jpeg_of_scans(300, 64)) == 301
