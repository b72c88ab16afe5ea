"""A training step of Phi-3.5-vision against one of the stock text model, as ratios.

    python benchmarks/step.py [--repetitions 7] [--checkpointing]
    python benchmarks/step.py --peak 3 4        # the peak resident memory of steps on an image of 3x4 crops

One CPU thread, fp32, forward and backward of the model of 51M parameters in benchmarks/common.py, on one image and 32
supervised tokens a step. Every time is in CPU seconds, and is divided by the time of transformers' own
`Phi3ForCausalLM` with the same decoder on 512 tokens (511 supervised). The cases take turns, and medians are shown.
torch's FlopCounterMode counts the FLOPs of the same work, but as if attention were not causal and as if the last layer
computed all tokens. The rate of a matrix product is measured in between.
"""

import argparse
import resource
import statistics
from functools import partial

import torch
from common import (
    DECODER,
    cpu_seconds,
    make_example,
    make_model,
    pack_examples,
    pad_examples,
    parse_repetitions,
    train_step,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config, Phi3ForCausalLM


def flops(model, batch) -> int:
    # The counter sees the matrix products of the plain attention, but not those inside the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model, batch)
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpointing", action="store_true", help="use activation checkpointing in both models")
    parser.add_argument("--peak", type=int, nargs=2, help="crops down and across: measure memory, and nothing else")
    args = parse_repetitions(parser, 7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = make_model()
    if args.peak:
        for _ in range(3):
            train_step(ours, pack_examples([make_example([tuple(args.peak)])]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak resident memory {peak / 2**20:.2f} GiB, {before / 2**20:.2f} GiB before the model was made")
        return
    stock = Phi3ForCausalLM(Phi3Config(**DECODER)).train()
    if args.checkpointing:
        for model in (ours, stock):
            model.activation_checkpointing_enable({"use_reentrant": False})
    text = make_example([], text_tokens=512, supervised=511)
    stock_batch = {"input_ids": text["input_ids"][None], "labels": text["input_ids"][None]}
    images = {f"{h}x{w} crops": make_example([(h, w)]) for h, w in ((1, 2), (2, 2), (3, 4))}
    cases = {"stock text-512": (stock, stock_batch), "text-512": (ours, pack_examples([text]))}
    cases |= {name: (ours, pack_examples([example])) for name, example in images.items()}
    seconds = {name: [] for name in cases}
    rates, square = [], torch.randn(2048, 2048)
    for repetition in range(args.repetitions + 1):
        for name, (model, batch) in cases.items():
            elapsed = cpu_seconds(partial(train_step, model, batch))
            if repetition:  # the first one warms up
                seconds[name].append(elapsed)
        rates.append(2 * 2048**3 / cpu_seconds(partial(torch.matmul, square, square)) / 1e9)
    unpacked = {name: pad_examples([example]) for name, example in images.items()}
    counted = {name: flops(model, unpacked.get(name, stock_batch)) for name, (model, _) in cases.items()}
    stock_seconds = statistics.median(seconds["stock text-512"])
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
            f"{median / stock_seconds:>8.2f}{counted[name] / counted['stock text-512']:>12.2f}"
            f"{counted[name] / median / 1e9:>9.1f}{counted[name] / median / 1e9 / statistics.median(rates):>10.0%}"
        )


if __name__ == "__main__":
    main()
