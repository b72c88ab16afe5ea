"""A training step with frozen vision, with crops that go through the tower against features read from a disk.

    python benchmarks/feature_cache.py [--folder DIR] [--repetitions 7]

One CPU thread, fp32, the 51M-parameter model of benchmarks/step.py. A step is forward and backward of one example; the
plain one gets its crops as a worker sends them, the other one reads a file from DIR, which is told to leave memory
before each reading.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import step as base
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM  # noqa: E402
from phi3v.model.image_processing_phi3v import crops_of_tiles  # noqa: E402
from phi3v.training.feature_cache import reading_seconds, write_features  # noqa: E402


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="on the disk to measure; default: a temporary one")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**base.DECODER, vision_config=base.VISION)).train()
    vision = model.model.vision_embed_tokens.requires_grad_(False)
    print("| crops | plain step, s | with features, s | | tower alone, ms | reading, ms | MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for grid in ((3, 4), (2, 2), (1, 2)):
        plain = base.packed(base.image_batch(*grid))
        packing = plain["packing"]
        with torch.no_grad():
            crops = crops_of_tiles(plain["tiles"], [grid], packing.mean, packing.std)
            features = vision(crops)[:-2].clone()
        cached = plain | {"tiles": None, "features": features, "packing": replace(packing, encoded=True)}
        losses = [model(**batch).loss.item() for batch in (plain, cached)]
        assert abs(losses[0] - losses[1]) < 1e-5 * losses[0], losses
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.no_grad():
            path = Path(folder) / "image.safetensors"
            write_features(path, features, grid)
            reading = statistics.median(reading_seconds(path) for _ in range(args.repetitions))
            size = path.stat().st_size / 1e6
            tower = statistics.median(seconds(partial(vision, crops)) for _ in range(args.repetitions))
        times = {"plain": [], "cached": []}
        for _ in range(args.repetitions):
            times["plain"].append(seconds(partial(base.step, model, plain)))
            times["cached"].append(seconds(partial(base.step, model, cached)))
        live, read = statistics.median(times["plain"]), statistics.median(times["cached"]) + reading
        print(
            f"| {grid[0]}x{grid[1]} | {live:.3f} | {read:.3f} | {live / read:.2f} times | {1e3 * tower:.0f} | "
            f"{1e3 * reading:.1f} | {size:.1f} |"
        )


if __name__ == "__main__":
    main()
