"""Makes micro-batches of encoded conversations: packed rows for training, padded rows for everything else."""

import torch

from ..model.packing import IGNORE_INDEX, pack
from ..model.processing_phi3v import Phi3VProcessor


class PackingCollator:
    """Encoded conversations → a micro-batch in one row without padding.

    The batch has what `pack` returns, the images' `image_sizes`, and `problems`: the errors of images that could not be
    read.
    original_length, share_images: as in `pack`. The sampler must get the same values, because it counts tokens by them.
    """

    def __init__(self, processor: Phi3VProcessor, original_length: int, share_images: bool):
        self.image_processor = processor.image_processor
        self.original_length = original_length
        self.share_images = share_images

    def __call__(self, examples: list[dict]) -> dict:
        mean, std = (tuple(values) for values in (self.image_processor.image_mean, self.image_processor.image_std))
        batch = pack(examples, self.original_length, self.share_images, mean, std)
        grids = torch.tensor(batch["packing"].grids, dtype=torch.long).view(-1, 2)
        batch["image_sizes"] = grids * self.image_processor.image_size
        batch["problems"] = [example["problem"] for example in examples if "problem" in example]
        return batch


class Collator:
    """Encoded conversations → a padded micro-batch, with the crops of all examples in one tensor `pixel_values`.

    padding_side: "left" or "right"; generation needs "left".
    normalise: False gives uint8 `tiles` and `grids` in place of `pixel_values`. They are smaller to send to a device,
        where `crops_of_tiles` makes crops of them.
    If images of an example could not be read, the batch also has `problems`, with None for the other examples.
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
        if any("problem" in example for example in examples):
            batch["problems"] = [example.get("problem") for example in examples]
        return batch
