"""A training step with a frozen vision model: crops that go through the tower against features read from a disk.

    python benchmarks/feature_cache.py [--folder DIR] [--repetitions 7]

One CPU thread, fp32, the model of 51M parameters in benchmarks/common.py. A step is forward and backward of one
example. The plain step gets the crops as a DataLoader's worker sends them; the other one reads features from a file in
DIR, and the operating system is asked to drop the file from memory before each reading.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common import (
    IMAGE_PROCESSOR,
    cpu_seconds,
    make_example,
    make_model,
    pack_examples,
    parse_repetitions,
    train_step,
)

from phi3v.training.feature_files import reading_seconds, write_features


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="a folder on the disk to measure; default: a temporary one")
    args = parse_repetitions(parser, 7)
    model = make_model()
    vision = model.model.vision_embed_tokens.requires_grad_(False)
    print("| crops | plain step, s | with features, s | | tower alone, ms | reading, ms | MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for grid in ((3, 4), (2, 2), (1, 2)):
        plain = pack_examples([make_example([grid])])
        packing = plain["packing"]
        with torch.no_grad():
            crops = IMAGE_PROCESSOR.crops_of_tiles(plain["tiles"], [grid])
            features = vision(crops)[:-2].clone()
        cached = plain | {"tiles": None, "features": features, "packing": replace(packing, encoded=True)}
        losses = [model(**batch).loss.item() for batch in (plain, cached)]
        assert abs(losses[0] - losses[1]) < 1e-5 * losses[0], losses
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.no_grad():
            path = Path(folder) / "image.safetensors"
            write_features(path, features, grid)
            reading = statistics.median(reading_seconds(path) for _ in range(args.repetitions))
            size = path.stat().st_size / 1e6
            tower = statistics.median(cpu_seconds(partial(vision, crops)) for _ in range(args.repetitions))
        times = {"plain": [], "cached": []}
        for _ in range(args.repetitions):
            times["plain"].append(cpu_seconds(partial(train_step, model, plain)))
            times["cached"].append(cpu_seconds(partial(train_step, model, cached)))
        live, read = statistics.median(times["plain"]), statistics.median(times["cached"]) + reading
        print(
            f"| {grid[0]}x{grid[1]} | {live:.3f} | {read:.3f} | {live / read:.2f} times | {1e3 * tower:.0f} | "
            f"{1e3 * reading:.1f} | {size:.1f} |"
        )


if __name__ == "__main__":
    main()
