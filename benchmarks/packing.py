"""Training on packed examples against padded micro-batches.

    python benchmarks/packing.py [--repetitions 3]

One CPU thread, fp32, the model of 51M parameters in benchmarks/common.py, on two kinds of data of random pixels and
words. "documents": a page of 3x4 crops with four questions. The padded micro-batch has four questions about four
pages; the packed one has the four questions about one page, which is read once. "ragged": conversations with one to
three images of different shapes at up to 16 crops, four conversations a micro-batch. The seconds are CPU seconds of
forward and backward of all micro-batches.
"""

import argparse
import random
import statistics
from functools import partial

import torch
from common import (
    IMAGE_PROCESSOR,
    cpu_seconds,
    make_example,
    make_model,
    pack_examples,
    pad_examples,
    parse_repetitions,
    train_step,
)


def question_about(sizes: list[tuple[int, int]], key: int, rng: random.Random, tiles: torch.Tensor | None = None):
    """An example with a question of some 40 tokens about images of these (width, height), and an answer of 3 to 12."""
    question, answer = rng.randint(30, 50), rng.randint(3, 12)
    grids = [IMAGE_PROCESSOR.crop_grid(*size) for size in sizes]
    return make_example(grids, key, text_tokens=question + answer, supervised=answer, tiles=tiles)


def train_steps(model, batches: list[dict]):
    for batch in batches:
        train_step(model, batch)


def main():
    args = parse_repetitions(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 3)
    rng = random.Random(0)
    model = make_model()

    document = (1344, 1008)  # 3x4 crops
    documents = [[question_about([document], k, rng)] for k in range(4)]
    for k, questions in enumerate(documents):
        questions += [question_about([document], k, rng, questions[0]["tiles"]) for _ in range(3)]
    shapes = [(640, 480), (1700, 2200), (336, 336), (500, 1500), (2000, 600), (800, 800)]
    ragged = [question_about(rng.sample(shapes, rng.randint(1, 3)), k, rng) for k in range(8)]
    cases = {
        "documents": ([[questions[0] for questions in documents]], [documents[0]]),
        "ragged": ([ragged[:4], ragged[4:]], [ragged[:4], ragged[4:]]),
    }
    print(f"torch {torch.__version__}, 1 thread, {args.repetitions} repetitions, medians")
    for name, (plain, ours) in cases.items():
        plain, ours = [pad_examples(examples) for examples in plain], [pack_examples(examples) for examples in ours]
        n = 4 * len(plain)
        times = {"padded": [], "packed": []}
        for _ in range(args.repetitions):
            times["padded"].append(cpu_seconds(partial(train_steps, model, plain)))
            times["packed"].append(cpu_seconds(partial(train_steps, model, ours)))
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
