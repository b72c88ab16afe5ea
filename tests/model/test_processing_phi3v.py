"""Prompts are tokenized as by the official processor, and anything else raises a ValueError."""

import json
import os

import golden_inputs
import pytest
from bad_inputs import RANDOM_IMAGES, RANDOM_TEXTS
from helpers import GOLDEN, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v import Phi3VProcessor

OFFICIAL = json.loads((GOLDEN / "processor.json").read_text())
# The real tokenizer is not part of the repository; its checks run where PHI3V_SNAPSHOT names a copy.
SNAPSHOT = os.environ.get("PHI3V_SNAPSHOT")

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


@fuzz(150)
@given(st.lists(RANDOM_IMAGES.filter(lambda image: image.mode != "La"), max_size=2), RANDOM_TEXTS)
def test_random_prompts(processor, images, text):
    """Whatever a caller gives the processor, it returns a batch or raises the ValueError that it documents."""
    try:
        batch = processor(text, images, return_tensors="pt")
    except ValueError:
        return
    assert batch["input_ids"].shape[0] == 1 and ("pixel_values" in batch) == bool(images)
