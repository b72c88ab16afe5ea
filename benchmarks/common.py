"""What several benchmarks share: a model small enough for one CPU thread, random examples for it, and a clock."""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor
from phi3v.model.image_processing_phi3v import num_image_tokens
from phi3v.model.packing import IGNORE_INDEX, pack

DECODER = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 32064,
}
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}
IMAGE_PROCESSOR = Phi3VImageProcessor(num_crops=16)
CROP = IMAGE_PROCESSOR.image_size  # pixels along one side of a crop


def parse_repetitions(parser: argparse.ArgumentParser, repetitions: int) -> argparse.Namespace:
    """Adds --repetitions to the flags and reads them, then makes torch repeatable: one CPU thread and a fixed seed."""
    parser.add_argument("--repetitions", type=int, default=repetitions, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return args


def make_model() -> Phi3VForCausalLM:
    """A model of 51M parameters with random weights in fp32, in training mode."""
    return Phi3VForCausalLM(Phi3VConfig(**DECODER, vision_config=VISION)).train()


def make_example(
    grids: list[tuple[int, int]],
    images_key=None,
    *,
    text_tokens: int = 43,
    supervised: int = 32,
    tiles: torch.Tensor | None = None,
) -> dict:
    """One example as `ConversationDataset` encodes it, with random words and pixels.

    grids: (down, across) sub-crops of each image.
    images_key: equal for examples of the same images.
    supervised: how many of the `text_tokens` at the end are the answer.
    tiles: (n_tiles, S, S, 3) uint8, the images; random by default.
    """
    per_side = IMAGE_PROCESSOR.crop_tokens_per_side
    images = [torch.full((num_image_tokens(h, w, per_side),), -1 - k) for k, (h, w) in enumerate(grids)]
    ids = torch.cat([*images, torch.randint(3, 32000, (text_tokens,))])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[-supervised:] = ids[-supervised:]
    if tiles is None:
        tiles = torch.randint(0, 256, (sum(h * w for h, w in grids), CROP, CROP, 3), dtype=torch.uint8)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": list(grids), "images_key": images_key}


def pack_examples(examples: list[dict]) -> dict:
    """The micro-batch of these examples without padding, as training makes it."""
    statistics = {"mean": tuple(IMAGE_PROCESSOR.image_mean), "std": tuple(IMAGE_PROCESSOR.image_std)}
    batch = pack(examples, original_length=4096, share_images=True, **statistics)
    grids = batch["packing"].grids
    if not grids:
        return batch | {"tiles": None}
    return batch | {"image_sizes": torch.tensor(grids) * CROP}


def pad_examples(examples: list[dict], side: str = "right") -> dict:
    """The micro-batch of these examples with padding and fp32 crops, as most fine-tuning code makes it."""
    length = max(len(example["input_ids"]) for example in examples)

    def rows(name: str, fill: int) -> torch.Tensor:
        values = [torch.ones_like(e["input_ids"]) if name == "attention_mask" else e[name] for e in examples]
        missing = [length - len(row) for row in values]
        padding = [(n, 0) if side == "left" else (0, n) for n in missing]
        return torch.stack([F.pad(row, pad, value=fill) for row, pad in zip(values, padding, strict=True)])

    grids = [grid for example in examples for grid in example["grids"]]
    return {
        "input_ids": rows("input_ids", 0),
        "attention_mask": rows("attention_mask", 0),
        "labels": rows("labels", IGNORE_INDEX),
        "pixel_values": IMAGE_PROCESSOR.crops_of_tiles(torch.cat([e["tiles"] for e in examples]), grids),
        "image_sizes": torch.tensor(grids) * CROP,
    }


def train_step(model, batch: dict):
    """Forward and backward."""
    model.zero_grad()
    model(**batch).loss.backward()


def cpu_seconds(work: Callable) -> float:
    """The CPU seconds that `work()` takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start
