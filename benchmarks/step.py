"""Training step of Phi-3.5-vision against the stock text model, as ratios in one run.

    python benchmarks/step.py [--repetitions 7] [--checkpointing]
    python benchmarks/step.py --peak 3 4        # peak resident memory of one case's steps, in a process of its own

One CPU thread, fp32, forward and backward of a 51M-parameter model (CLIP 256 wide, 6 layers; decoder 512 wide, 4
layers, vocabulary 32064), one image with 32 supervised tokens a step. Every time is CPU seconds, and is divided by
the step of transformers' own `Phi3ForCausalLM` with the same decoder on 512 tokens (511 supervised). The cases take
turns, and medians are shown. FLOPs are counted by torch's FlopCounterMode over the same work, but with attention as if
it were not causal and for all tokens of the last layer; the rate of a matrix product is measured in between.
"""

import argparse
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config, Phi3ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM  # noqa: E402
from phi3v.model.image_processing_phi3v import num_image_tokens  # noqa: E402
from phi3v.model.packing import pack  # noqa: E402

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
TEXT_TOKENS, SUPERVISED = 43, 32


def image_batch(h: int, w: int) -> dict:
    """One image of h x w sub-crops, some text, and an answer."""
    n_image = num_image_tokens(h, w, 12)
    ids = torch.cat([torch.full((n_image,), -1), torch.randint(3, 32000, (TEXT_TOKENS,))])[None]
    labels = torch.full_like(ids, -100)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(h * w + 1, 3, 336, 336),
        "image_sizes": torch.tensor([[h * 336, w * 336]]),
    }


def text_batch() -> dict:
    ids = torch.randint(3, 32000, (1, 512))
    return {"input_ids": ids, "labels": ids.clone()}


def packed(batch: dict) -> dict:
    """The same as training has it."""
    example = {
        "input_ids": batch["input_ids"][0],
        "labels": batch["labels"][0].clone(),
        "tiles": torch.zeros(0, 336, 336, 3, dtype=torch.uint8),
        "grids": [],
        "images_key": None,
    }
    example["labels"][0] = -100  # nothing stands before it that could predict it
    row = pack([example], original_length=4096, share_images=True)
    if "pixel_values" in batch:
        h, w = (batch["image_sizes"][0] // 336).tolist()
        row.update(tiles=torch.randint(0, 256, (h * w, 336, 336, 3), dtype=torch.uint8), image_index=torch.tensor([0]))
        row.update(image_sizes=batch["image_sizes"])
        row["packing"] = replace(row["packing"], grids=((h, w),), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    else:
        row["tiles"] = None
    return row


def step(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()


def flops(model, batch) -> int:
    # The counter knows the math attention's matmuls, but not the fused CPU kernel's.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, batch)
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing, in both models")
    parser.add_argument("--peak", type=int, nargs=2, help="crops down and across: measure memory, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = Phi3VForCausalLM(Phi3VConfig(**DECODER, vision_config=VISION)).train()
    if args.peak:
        for _ in range(3):
            step(ours, packed(image_batch(*args.peak)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak resident memory {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} before there was a model")
        return
    stock = Phi3ForCausalLM(Phi3Config(**DECODER)).train()
    if args.checkpointing:
        for model in (ours, stock):
            model.activation_checkpointing_enable({"use_reentrant": False})
    text = text_batch()
    cases = {
        "stock text-512": (stock, text),
        "text-512": (ours, packed(text)),
        "1x2 crops": (ours, packed(image_batch(1, 2))),
        "2x2 crops": (ours, packed(image_batch(2, 2))),
        "3x4 crops": (ours, packed(image_batch(3, 4))),
    }
    seconds = {name: [] for name in cases}
    rates, square = [], torch.randn(2048, 2048)
    for repetition in range(args.repetitions + 1):
        for name, (model, batch) in cases.items():
            start = time.process_time()
            step(model, batch)
            if repetition:  # the first warms up
                seconds[name].append(time.process_time() - start)
        start = time.process_time()
        square @ square
        rates.append(2 * 2048**3 / (time.process_time() - start) / 1e9)
    plain = {"1x2 crops": image_batch(1, 2), "2x2 crops": image_batch(2, 2), "3x4 crops": image_batch(3, 4)}
    counted = {name: flops(model, plain.get(name, text)) for name, (model, _) in cases.items()}
    base = statistics.median(seconds["stock text-512"])
    parameters = sum(p.numel() for p in ours.parameters())
    print(
        f"torch {torch.__version__}, 1 thread, {parameters:,} parameters, {args.repetitions} repetitions; "
        f"a matrix product of 2048 runs at {statistics.median(rates):.0f} GFLOP/s"
    )
    heads = f"{'case':16}{'tokens':>8}{'CPU s':>9}{'min':>8}{'max':>8}{'ratio':>8}{'FLOP ratio':>12}"
    print(f"{heads}{'GFLOP/s':>9}{'of matmul':>11}")
    for name, (_, batch) in cases.items():
        times = seconds[name]
        median = statistics.median(times)
        print(
            f"{name:16}{batch['input_ids'].shape[1]:>8}{median:>9.3f}{min(times):>8.3f}{max(times):>8.3f}"
            f"{median / base:>8.2f}{counted[name] / counted['stock text-512']:>12.2f}"
            f"{counted[name] / median / 1e9:>9.1f}{counted[name] / median / 1e9 / statistics.median(rates):>10.0%}"
        )


if __name__ == "__main__":
    main()
