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
from phi3v.data.images import as_seen, image_size, open_image, read_image, save_upright
from phi3v.errors import InputError
from phi3v.model.rgb import to_rgb


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
    with pytest.raises(InputError, match="not a regular file"), open_image(tmp_path / "pipe"):
        pass


def test_a_lazy_image_that_is_damaged():
    image = Image.open(io.BytesIO(bad_inputs.IMAGES["cut.png"][0]))
    with pytest.raises(InputError, match="can't be read as an image"):
        read_image(image)


def test_16_bit_colour_has_the_scale_of_16_bit_grey():
    grey = [0, 255, 256, 32768, 65535]
    data = b"\0" + b"".join(value.to_bytes(2, "big") * 3 for value in grey)
    colour = Image.open(io.BytesIO(bad_inputs.png(5, 1, data, depth=16)))
    assert np.asarray(read_image(colour))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


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


def photo(folder, orientation, format="jpeg", size=(40, 24)):
    """A file that is white in the corner that stands upper left, once the photo is upright; and its path."""
    upright = Image.new("RGB", size)
    upright.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse of the turn, as PIL counts
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{orientation}.{format}"
    (upright if stored is None else upright.transpose(stored)).save(path, exif=exif)
    return path, upright


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
def test_photos_are_turned_only_on_request(orientation, format, tmp_path):
    path, upright = photo(tmp_path, orientation, format)
    stored = upright.size[::-1] if orientation >= 5 and format != "tiff" else upright.size  # PIL turns TIFF anyway
    assert image_size(path) == read_image(path).size == stored
    assert image_size(path, exif_rotate=True) == upright.size
    for image in (path, {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        turned = read_image(image, exif_rotate=True)
        assert turned.size == upright.size
        assert np.abs(np.asarray(turned).astype(int) - np.asarray(upright)).mean() < 9  # both are compressed
        assert np.array_equal(to_rgb(turned, exif_rotate=True), turned)  # not turned once more
    assert image_size(Image.open(path), exif_rotate=True) == upright.size
    assert as_seen(path, False) == path and as_seen(path, True).size == upright.size


def test_only_photos_that_lie_are_written_upright(tmp_path):
    for orientation in (1, 6):
        path, upright = photo(tmp_path, orientation)
        copy = tmp_path / f"copy{orientation}.jpeg"
        assert save_upright(path, copy) == copy.exists() == (orientation == 6)
    for exif_rotate in (False, True):  # it is upright for every reader
        written = np.asarray(read_image(copy, exif_rotate=exif_rotate)).astype(int)
        assert np.abs(written - np.asarray(upright)).mean() < 9
    assert as_seen(tmp_path / "nowhere.png", True) == tmp_path / "nowhere.png"
