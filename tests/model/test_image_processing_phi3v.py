"""Pixels and token counts of images are those of the official processor."""

import hashlib
import json
import re

import golden_inputs
import numpy as np
import pytest
from helpers import GOLDEN
from PIL import Image

from phi3v import Phi3VImageProcessor

OFFICIAL = json.loads((GOLDEN / "processor.json").read_text())


def parse(name):
    return map(int, re.match(r"(\d+)x(\d+)_c(\d+)", name).groups())


@pytest.mark.parametrize("name", OFFICIAL["sizes"])
def test_pixels(name):
    width, height, num_crops = parse(name)
    ours = Phi3VImageProcessor(num_crops=num_crops)(golden_inputs.pil_image(width, height), return_tensors="pt")
    expected = OFFICIAL["sizes"][name]
    assert hashlib.sha256(ours["pixel_values"].numpy().tobytes()).hexdigest() == expected["sha256"]
    assert ours["image_sizes"].tolist() == expected["image_sizes"]
    assert ours["num_img_tokens"].tolist() == expected["num_img_tokens"]


@pytest.mark.parametrize("mode", OFFICIAL["modes"])
def test_image_modes(mode):
    ours = Phi3VImageProcessor(num_crops=4)(golden_inputs.pil_image(500, 333, mode), return_tensors="pt")
    assert hashlib.sha256(ours["pixel_values"].numpy().tobytes()).hexdigest() == OFFICIAL["modes"][mode]["sha256"]


def test_numpy_equals_pil():
    image = golden_inputs.pil_image(64, 48)
    processor = Phi3VImageProcessor(num_crops=1)
    assert (processor.crops(image) == processor.crops(np.asarray(image))).all()


def test_token_table():
    for name, expected in OFFICIAL["token_table"].items():
        width, height, num_crops = parse(name)
        processor = Phi3VImageProcessor(num_crops=num_crops)
        tokens = processor.calc_num_image_tokens_from_image_size(width, height)
        assert [*processor.crop_grid(width, height), tokens] == expected


@pytest.mark.parametrize("size", [(10000, 1), (1, 10000), (0, 5)])
def test_images_that_are_too_thin_or_empty_are_refused(size):
    with pytest.raises(ValueError, match="too thin|is empty"):
        Phi3VImageProcessor(num_crops=4)(Image.new("RGB", size))
