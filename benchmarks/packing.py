"""Training on packed rows against padded micro-batches, as ratios in one run.

    python benchmarks/packing.py [--repetitions 3]

One CPU thread, fp32, the 51M-parameter model of benchmarks/step.py. Two kinds of data, random pixels and words:
documents, 3x4 crops with four questions each, one padded micro-batch of four questions about four documents against a
row of one document with its four questions; and ragged conversations with one to three images of mixed shapes at up to
16 crops, four a micro-batch. Seconds are CPU seconds of forward and backward, a micro-batch's mean over all of them.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import step as base
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor  # noqa: E402
from phi3v.model.image_processing_phi3v import num_image_tokens  # noqa: E402
from phi3v.model.packing import pack  # noqa: E402

IMAGES = Phi3VImageProcessor(num_crops=16)


def example(rng: random.Random, sizes: list[tuple[int, int]], key, tiles=None) -> dict:
    """A question of some 40 tokens about images of these sizes, and an answer of 3 to 12."""
    grids = [IMAGES.crop_grid(*size) for size in sizes]
    words = torch.randint(3, 32000, (rng.randint(30, 50) + (n := rng.randint(3, 12)),))
    ids = torch.cat([torch.full((num_image_tokens(h, w, 12),), -1 - k) for k, (h, w) in enumerate(grids)] + [words])
    labels = torch.full_like(ids, -100)
    labels[-n:] = ids[-n:]
    if tiles is None:
        tiles = torch.randint(0, 256, (sum(h * w for h, w in grids), 336, 336, 3), dtype=torch.uint8)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": grids, "images_key": key}


def packed(examples: list[dict]) -> dict:
    batch = pack(examples, 4096, share_images=True, mean=tuple(IMAGES.image_mean), std=tuple(IMAGES.image_std))
    return batch | {"image_sizes": torch.tensor(batch["packing"].grids) * 336}


def padded(examples: list[dict]) -> dict:
    length = max(len(e["input_ids"]) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, e in enumerate(examples):
        n = len(e["input_ids"])
        ids[row, :n], mask[row, :n], labels[row, :n] = e["input_ids"], 1, e["labels"]
    grids = [grid for e in examples for grid in e["grids"]]
    tiles = torch.cat([e["tiles"] for e in examples])
    crops = IMAGES.crops_of_tiles(tiles, grids)
    sizes = torch.tensor(grids) * 336
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": crops, "image_sizes": sizes}


def seconds(model, batches: list[dict]) -> float:
    start = time.process_time()
    for batch in batches:
        base.step(model, batch)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    model = Phi3VForCausalLM(Phi3VConfig(**base.DECODER, vision_config=base.VISION)).train()

    document = (1344, 1008)  # 3x4 crops
    documents = [[example(rng, [document], k)] for k in range(4)]
    for k, questions in enumerate(documents):
        questions += [example(rng, [document], k, questions[0]["tiles"]) for _ in range(3)]
    shapes = [(640, 480), (1700, 2200), (336, 336), (500, 1500), (2000, 600), (800, 800)]
    ragged = [example(rng, rng.sample(shapes, rng.randint(1, 3)), k) for k in range(8)]
    cases = {
        "documents": ([[questions[0] for questions in documents]], [documents[0]]),
        "ragged": ([ragged[:4], ragged[4:]], [ragged[:4], ragged[4:]]),
    }
    print(f"torch {torch.__version__}, 1 thread, {args.repetitions} repetitions, medians")
    for name, (plain, ours) in cases.items():
        plain, ours = [padded(examples) for examples in plain], [packed(examples) for examples in ours]
        n = 4 * len(plain)
        times = {"padded": [], "packed": []}
        for _ in range(args.repetitions):
            times["padded"].append(seconds(model, plain))
            times["packed"].append(seconds(model, ours))
        a, b = (statistics.median(t) for t in times.values())
        real = sum(int(batch["attention_mask"].sum()) for batch in plain)
        slots = sum(batch["input_ids"].numel() for batch in plain)
        rows = sum(batch["input_ids"].numel() for batch in ours)
        print(
            f"{name}: padded {n / a:.3f} examples/s ({1 - real / slots:.0%} of {slots} tokens padding), packed "
            f"{n / b:.3f} ({rows} tokens): {a / b:.2f} times"
        )


if __name__ == "__main__":
    main()
