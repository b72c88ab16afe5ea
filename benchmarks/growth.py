"""How the time and memory of a training step grow with crops, images and micro-batch.

    python benchmarks/growth.py [--repetitions 3]

One CPU thread, fp32, the 51M-parameter model of benchmarks/step.py. Seconds are CPU seconds of forward and backward,
the median; FLOPs and kept memory are computed (phi3v.measuring), with causal attention.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import step as base
import torch
from packing import packed

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM  # noqa: E402
from phi3v.model.image_processing_phi3v import num_image_tokens  # noqa: E402
from phi3v.training.measuring import Costs, load_of_packing  # noqa: E402

# What grows: micro-batches as the grids of sub-crops of each example's images.
SERIES = {
    "crops of an image": [[[(1, 1)]], [[(1, 2)]], [[(2, 2)]], [[(2, 4)]], [[(3, 4)]], [[(4, 4)]]],
    "images of an example, 1x1 each": [[[(1, 1)] * n] for n in (1, 2, 4, 8)],
    "examples of a micro-batch, 1x2 each": [[[(1, 2)]] * n for n in (1, 2, 4, 8, 16)],
}


def encoded(grids, number: int) -> dict:
    n = sum(num_image_tokens(h, w, 12) for h, w in grids)
    ids = torch.cat([torch.full((n,), -1), torch.randint(3, 32000, (43,))])
    labels = torch.full_like(ids, -100)
    labels[-32:] = ids[-32:]
    tiles = torch.randint(0, 256, (sum(h * w for h, w in grids), 336, 336, 3), dtype=torch.uint8)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": list(grids), "images_key": number}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**base.DECODER, vision_config=base.VISION)).train()
    costs = Costs(model, stream_bytes=4, compute_bytes=4)
    for name, micro_batches in SERIES.items():
        print(f"{name:38}{'tokens':>8}{'CPU s':>8}{'ratio':>7}{'FLOPs':>7}{'GFLOP/s':>9}{'kept GiB':>10}")
        first = None
        for examples in micro_batches:
            batch = packed([encoded(grids, i) for i, grids in enumerate(examples)])
            times = []
            for _ in range(args.repetitions + 1):
                start = time.process_time()
                base.step(model, batch)
                times.append(time.process_time() - start)
            load = load_of_packing(batch["packing"])
            seconds, flops = statistics.median(times[1:]), costs.flops(load)
            first = first or (seconds, flops)
            h, w = examples[0][0]
            label = {"crops": h * w, "images": len(examples[0])}.get(name.split()[0], len(examples))
            print(
                f"{label:>38}{load.tokens:>8}{seconds:>8.2f}{seconds / first[0]:>7.2f}{flops / first[1]:>7.2f}"
                f"{flops / seconds / 1e9:>9.0f}{costs.kept_bytes(load) / 2**30:>10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
