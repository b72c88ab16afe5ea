"""Examples are joined to a padded batch."""

import pytest
import torch
from PIL import Image

from phi3v.data.collate import Collator
from phi3v.data.conversations import encode_conversation


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_on_one_side_and_joins_crops(side, processor, toy_examples):
    encoded = [encode_conversation(processor, example["conversations"]) for example in toy_examples[:5]]
    batch = Collator(processor, side)(encoded)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(len(e["input_ids"]) for e in encoded))
    for row, example in enumerate(encoded):
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], example["input_ids"])
        assert torch.equal(batch["labels"][row][real], example["labels"])
        assert (batch["labels"][row][~real] == -100).all()
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right")
    images = [image for e in toy_examples[:5] for turn in e["conversations"] for image in turn["images"]]
    crops = torch.cat([processor.image_processor.crops(Image.open(image)) for image in images])
    torch.testing.assert_close(batch["pixel_values"], crops, rtol=0, atol=1e-6)
