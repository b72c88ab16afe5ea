"""Pixels, token counts and prompts against the official processor's."""

import hashlib
import json
import os
import re
from pathlib import Path

import golden_inputs
import numpy as np
import pytest
from PIL import Image

from phi3v import Phi3VImageProcessor, Phi3VProcessor

OFFICIAL = json.loads((Path(__file__).parents[1] / "golden" / "processor.json").read_text())
SNAPSHOT = os.environ.get("PHI3V_SNAPSHOT")


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
def test_images_that_vanish(size):
    with pytest.raises(ValueError, match="too thin|is empty"):
        Phi3VImageProcessor(num_crops=4)(Image.new("RGB", size))


# The real tokenizer is not part of the repository; its checks run where PHI3V_SNAPSHOT names a copy.
if SNAPSHOT:

    @pytest.mark.parametrize("name", OFFICIAL["prompts"])
    def test_ids_of_prompts(name, tmp_path):
        case = OFFICIAL["prompts"][name]
        processor = Phi3VProcessor.from_pretrained(SNAPSHOT, num_crops=case["num_crops"])
        processor.save_pretrained(tmp_path)
        images = [golden_inputs.pil_image(*size) for size in case["images"]]
        expected = [i for i, n in case["input_ids_rle"] for _ in range(n)]
        for p in (processor, Phi3VProcessor.from_pretrained(tmp_path)):
            assert p(case["prompt"], images, return_tensors="pt")["input_ids"][0].tolist() == expected

    @pytest.mark.parametrize("prompt", ["no tag", "<|image_2|>", "<|image_0|>", "<|image_1|><|image_2|>"])
    def test_tags_that_do_not_match(prompt):
        with pytest.raises(ValueError, match="image tags do not match the 1 images"):
            Phi3VProcessor.from_pretrained(SNAPSHOT)(prompt, Image.new("RGB", (20, 20)))
