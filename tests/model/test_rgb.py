"""Every mode of PIL becomes RGB by one rule, and EXIF's orientation counts only on request."""

import numpy as np
import pytest
from PIL import Image

from phi3v.errors import InputError
from phi3v.model.rgb import exif_orientation, to_rgb, upright_size


def test_16_bit_grey_keeps_its_scale():
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    for made in (Image.fromarray(grey), Image.fromarray(grey.astype(">u2")), Image.fromarray(grey.astype(np.int32))):
        rgb = to_rgb(made)
        assert rgb.mode == "RGB" and np.asarray(rgb)[0].tolist() == [[v] * 3 for v in expected]


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


@pytest.mark.parametrize("pixels", [np.ones((9, 9), np.float32), np.full((9, 9), 70000, np.int32)])
def test_an_error_names_the_file(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image, pytest.raises(InputError) as error:
        to_rgb(image)
    assert str(error.value).startswith(f"{tmp_path}/a.tif, of mode") and "\n" not in str(error.value)


def lying(mode="RGB", orientation=6):
    """An image of 40 x 20 pixels in memory, with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.arange(800, dtype=np.uint16).reshape(20, 40) * 80)
    image = image if mode == "I;16" else to_rgb(image).convert(mode)
    image.info["exif"] = exif.tobytes()
    return image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "CMYK", "1", "I;16"])
def test_any_mode_is_turned_once(mode):
    image = lying(mode)
    stored, turned = to_rgb(image), to_rgb(image, exif_rotate=True)
    assert stored.size == (40, 20) and upright_size(image) == turned.size == (20, 40)
    assert np.array_equal(np.rot90(stored, -1), turned)
    assert np.array_equal(to_rgb(turned, exif_rotate=True), turned)


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_an_orientation_that_is_none(orientation):
    image = lying(orientation=orientation)
    assert exif_orientation(image) == 1 and upright_size(image) == to_rgb(image, exif_rotate=True).size == (40, 20)


def test_damaged_exif_turns_nothing():
    image = lying()
    image.info["exif"] = b"Exif\0\0II*\0" + bytes(range(256))
    assert exif_orientation(image) == 1 and to_rgb(image, exif_rotate=True).size == (40, 20)
