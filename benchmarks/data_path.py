"""From an image to the tower's input: uint8 tiles that are normalised later, against padded fp32 crops.

    python benchmarks/data_path.py [--repetitions 9]

One CPU thread. The plain way resizes, pads, normalises and cuts the image in the worker, and sends the official layout
of 1 + num_crops crops in fp32. Our way sends uint8 tiles; the global crop and the normalisation are computed
afterwards, in training on the GPU, here on the CPU. The times are CPU milliseconds per image, as medians; the bytes are
those that a worker sends.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from phi3v import Phi3VImageProcessor


def straightforward(processor: Phi3VImageProcessor, image: Image.Image) -> torch.Tensor:
    """The crops (1 + num_crops, 3, S, S) in fp32, computed step by step as the paper describes it."""
    size, (h, w) = processor.image_size, processor.crop_grid(*image.size)
    width, height = processor.resized_size(*image.size)
    upright = image.width < image.height
    if upright:
        image, width, height = image.transpose(Image.Transpose.TRANSPOSE), height, width
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    rows = (w if upright else h) * size
    top = (rows - height) // 2
    pixels = F.pad(pixels, (0, 0, top, rows - height - top), value=1.0)
    if upright:
        pixels = pixels.transpose(1, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    pixels = ((pixels - mean) / std)[None]
    overview = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    tiles = pixels.reshape(1, 3, h, size, w, size).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, size, size)
    crops = torch.cat([overview, tiles])
    return torch.cat([crops, torch.zeros(1 + processor.num_crops - len(crops), 3, size, size)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = Phi3VImageProcessor(num_crops=16)
    rng = np.random.default_rng(0)
    print(f"torch {torch.__version__}, 1 thread, {args.repetitions} repetitions, medians")
    for width, height in ((1700, 2200), (640, 480)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        grid = [processor.crop_grid(*image.size)]

        def device(tiles, grid=grid):
            return processor.crops_of_tiles(tiles, grid)

        times = {"plain": [], "tiles": [], "normalise": []}
        for _ in range(args.repetitions):
            start = time.process_time()
            plain = straightforward(processor, image)
            times["plain"].append(time.process_time() - start)
            start = time.process_time()
            tiles = processor.tiles(image)
            times["tiles"].append(time.process_time() - start)
            start = time.process_time()
            ours = device(tiles)
            times["normalise"].append(time.process_time() - start)
        a, b, c = (1000 * statistics.median(t) for t in times.values())
        difference = (ours - plain[: len(ours)]).abs().max().item()
        print(
            f"{width}x{height}: plain {a:.1f} ms, {plain.nbytes / 1e6:.1f} MB; worker {b:.1f} ms ({b / a:.2f}), "
            f"{tiles.nbytes / 1e6:.2f} MB ({tiles.nbytes / plain.nbytes:.2f}); with normalising ({c:.1f} ms) "
            f"{(b + c) / a:.2f}; pixels differ by at most {difference:.1e}"
        )


if __name__ == "__main__":
    main()
