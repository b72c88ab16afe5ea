"""Bad images are refused with the reason, and unusual ones are converted."""

import io
import os

import bad_inputs
import numpy as np
import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from phi3v.data import check as data_check
from phi3v.data.check import check_images
from phi3v.data.conversations import encode_conversation
from phi3v.data.images import open_image, read_image, to_rgb
from phi3v.errors import InputError


def conversation(*images, id="1", user="Which?"):
    return {"id": id, "conversations": [{"images": list(images), "user": user, "assistant": "yes"}]}


@pytest.mark.parametrize("name", bad_inputs.IMAGES)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_bad_images_are_named(name, as_bytes, processor, tmp_path):
    content, message = bad_inputs.IMAGES[name]
    path = tmp_path / name
    path.write_bytes(content)
    image = {"bytes": content, "path": name} if as_bytes else str(path)
    with pytest.raises(InputError) as error:
        encode_conversation(processor, conversation(image)["conversations"])
    assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    # The check before a training says the same.
    summary = check_images([conversation(image)], processor, 0, disable_tqdm=True)
    assert summary.problems.lines == [f"data, example 1: {error.value}"] and summary.bad_examples == ["1"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "an image can't be read as an image (the image is missing)"),
        ({"bytes": None, "path": None}, "an image of the table can't be read as an image (the image is missing)"),
        ({"bytes": b"", "path": "a.png"}, "a.png can't be read as an image (the file is empty)"),
        ({"path": "nowhere.png"}, "nowhere.png can't be read as an image (the file does not exist)"),
        ("nowhere.png", "nowhere.png can't be read as an image (the file does not exist)"),
        ("/", "/ can't be read as an image (not a regular file)"),
        (os.devnull, f"{os.devnull} can't be read as an image (not a regular file)"),
        ("a\0.png", "can't be read as an image (the file does not exist)"),
        (7, "an image can't be read as an image ("),
        (Image.new("La", (9, 9)), "an image, of mode La, can't be converted to RGB (conversion from La"),
        (Image.new("F", (9, 9)), "an image, of mode F, can't be converted to RGB (floating-point"),
        (Image.new("RGB", (0, 9)), "an image: image of 0 x 9 pixels is empty"),
    ],
)
def test_anything_that_is_not_an_image_is_refused(image, message, processor):
    with pytest.raises(InputError) as error:
        encode_conversation(processor, conversation(image)["conversations"])
    assert message in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        open_image(tmp_path / "pipe")


def test_a_lazy_image_that_is_damaged():
    image = Image.open(io.BytesIO(bad_inputs.IMAGES["cut.png"][0]))
    with pytest.raises(InputError, match="can't be read as an image"):
        read_image(image)


def test_16_bit_grey_keeps_its_scale():
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    for made in (Image.fromarray(grey), Image.fromarray(grey.astype(">u2")), Image.fromarray(grey.astype(np.int32))):
        rgb = to_rgb(made)
        assert rgb.mode == "RGB" and np.asarray(rgb)[0].tolist() == [[v] * 3 for v in expected]
    # As PIL reads 16-bit colour.
    data = b"\0" + b"".join(int(v).to_bytes(2, "big") * 3 for v in grey[0])
    colour = Image.open(io.BytesIO(bad_inputs.png(5, 1, data, depth=16)))
    assert np.asarray(read_image(colour))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_other_modes_are_converted_as_by_the_official_processor(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "PA":
        image = image.convert("LA").convert("PA")
    else:
        image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "RGBa") else image.convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_an_rgb_image_is_copied():
    image = Image.new("RGB", (9, 9))
    rgb = read_image(image)
    rgb.putpixel((0, 0), (255, 0, 0))
    assert image.getpixel((0, 0)) == (0, 0, 0)


@fuzz(150)
@given(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "ppm", "webp"]), st.data())
def test_damaged_files(processor, format, data):
    """Files with changed or missing bytes give an image or an InputError, whatever PIL does with them."""
    content = bytearray(bad_inputs.encoded(format, 12, 9))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image({"bytes": content, "path": f"a.{format}"}).mode == "RGB"
    except InputError as e:
        assert f"a.{format}" in str(e) and "\n" not in str(e)
    tokens, _, problem = data_check.examine_image({"bytes": content, "path": None}, processor.image_processor)
    assert (tokens > 0) == (problem is None)


def test_truncated_images_stay_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
