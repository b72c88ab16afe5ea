"""Encoded conversations → micro-batches."""

import torch

from ..model.packing import IGNORE_INDEX, pack
from ..model.processing_phi3v import Phi3VProcessor


class PackingCollator:
    """Encoded conversations → a micro-batch in one row without padding, as `pack` describes it, with `problems`.

    original_length: the model's, above which an example takes the long rotary factors.
    """

    def __init__(self, processor: Phi3VProcessor, original_length: int, share_images: bool):
        self.image_processor = processor.image_processor
        self.original_length = original_length
        self.share_images = share_images

    def __call__(self, examples: list[dict]) -> dict:
        mean, std = (tuple(v) for v in (self.image_processor.image_mean, self.image_processor.image_std))
        batch = pack(examples, self.original_length, self.share_images, mean, std)
        grids = torch.tensor(batch["packing"].grids, dtype=torch.long).view(-1, 2)
        batch["image_sizes"] = grids * self.image_processor.image_size
        batch["problems"] = [example["problem"] for example in examples if "problem" in example]
        return batch


class Collator:
    """Encoded conversations → a padded micro-batch; crops of all examples in one tensor.

    padding_side: "left" to generate.
    normalise: False leaves the crops as uint8 tiles, with `grids`, for `crops_of_tiles` on the device.
    """

    def __init__(self, processor: Phi3VProcessor, padding_side: str, normalise: bool = True):
        self.processor = processor
        self.padding_side = padding_side
        self.normalise = normalise

    def __call__(self, examples: list[dict]) -> dict:
        batch = self.processor.pad([example["input_ids"].tolist() for example in examples], self.padding_side)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels[batch["attention_mask"].bool()] = torch.cat([example["labels"] for example in examples])
        tiles = torch.cat([example["tiles"] for example in examples])
        grids = [grid for example in examples for grid in example["grids"]]
        image_processor = self.processor.image_processor
        sizes = torch.tensor(grids, dtype=torch.long).view(-1, 2) * image_processor.image_size
        batch.update(labels=labels, image_sizes=sizes)
        if self.normalise:
            batch["pixel_values"] = image_processor.crops_of_tiles(tiles, grids)
        else:
            batch.update(tiles=tiles, grids=grids)
        return batch
