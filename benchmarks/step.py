"""Training step of Phi-3.5-vision against the stock text model, as ratios in one run.

    python benchmarks/step.py [--repetitions 7] [--checkpointing]

One CPU thread, fp32, forward and backward of a 51M-parameter model (CLIP 256 wide, 6 layers; decoder 512 wide, 4
layers, vocabulary 32064), one image with 32 supervised tokens a step. Every time is CPU seconds, and is divided by
the step of transformers' own `Phi3ForCausalLM` with the same decoder on 512 tokens (511 supervised). The cases take
turns, and medians are shown. FLOPs are counted by torch's FlopCounterMode, attention as if it were not causal.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config, Phi3ForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM  # noqa: E402

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
    n_image = (h * w + 1) * 144 + 1 + (h + 1) * 12
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = Phi3VForCausalLM(Phi3VConfig(**DECODER, vision_config=VISION)).train()
    stock = Phi3ForCausalLM(Phi3Config(**DECODER)).train()
    if args.checkpointing:
        for model in (ours, stock):
            model.activation_checkpointing_enable({"use_reentrant": False})
    text = text_batch()
    cases = {
        "stock text-512": (stock, text),
        "text-512": (ours, text),
        "1x2 crops": (ours, image_batch(1, 2)),
        "2x2 crops": (ours, image_batch(2, 2)),
        "3x4 crops": (ours, image_batch(3, 4)),
    }
    seconds = {name: [] for name in cases}
    for repetition in range(args.repetitions + 1):
        for name, (model, batch) in cases.items():
            start = time.process_time()
            step(model, batch)
            if repetition:  # the first warms up
                seconds[name].append(time.process_time() - start)
    counted = {name: flops(model, batch) for name, (model, batch) in cases.items()}
    base = statistics.median(seconds["stock text-512"])
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"torch {torch.__version__}, 1 thread, {parameters:,} parameters, {args.repetitions} repetitions")
    print(f"{'case':16}{'tokens':>8}{'CPU s':>9}{'min':>8}{'max':>8}{'ratio':>8}{'FLOP ratio':>12}{'GFLOP/s':>9}")
    for name, (_, batch) in cases.items():
        times = seconds[name]
        median = statistics.median(times)
        print(
            f"{name:16}{batch['input_ids'].shape[1]:>8}{median:>9.3f}{min(times):>8.3f}{max(times):>8.3f}"
            f"{median / base:>8.2f}{counted[name] / counted['stock text-512']:>12.2f}"
            f"{counted[name] / median / 1e9:>9.1f}"
        )


if __name__ == "__main__":
    main()
