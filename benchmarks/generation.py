"""Greedy generation at batch 8 against one prompt at a time, in one run.

    python benchmarks/generation.py [--new_tokens 128] [--threads 1]

On a CPU, fp32, the 51M-parameter model of benchmarks/step.py with random weights; eight prompts, each with an
image of 1x2 crops and text of its own length; every answer has the same number of new tokens. Seconds are CPU
seconds of one thread.
"""

import argparse
import sys
import time
from pathlib import Path

import step as base
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VConfig, Phi3VForCausalLM  # noqa: E402


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="with more than one, seconds are wall-clock time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**base.DECODER, vision_config=base.VISION)).eval()
    prompts = []
    for n in range(8):
        batch = base.image_batch(1, 2)
        batch.pop("labels")
        batch["input_ids"] = batch["input_ids"][:, : len(batch["input_ids"][0]) - 3 * n]
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        prompts.append(batch)
    length = max(p["input_ids"].shape[1] for p in prompts)
    together = {key: torch.cat([p[key] for p in prompts]) for key in ("pixel_values", "image_sizes")}
    for key, value in (("input_ids", 0), ("attention_mask", 0)):
        rows = [torch.nn.functional.pad(p[key], (length - p[key].shape[1], 0), value=value) for p in prompts]
        together[key] = torch.cat(rows)

    def generate(batch):
        n = batch["input_ids"].shape[1]
        options = {"do_sample": False, "min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
        return model.generate(**batch, **options, pad_token_id=0)[:, n:]

    generate(prompts[0])  # warms up
    start = clock()
    for batch in (*prompts, together):
        model(**batch, logits_to_keep=1)
        if batch is prompts[-1]:
            reading = clock() - start
    reading_together = clock() - start - reading
    start = clock()
    alone = torch.cat([generate(prompt) for prompt in prompts])
    middle = clock()
    batched = generate(together)
    end = clock()
    n = alone.numel()
    weights = [m.weight for m in [*model.model.layers.modules(), model.lm_head] if isinstance(m, torch.nn.Linear)]
    products = {}
    for rows in (1, 8):
        inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]
        begun = clock()
        for _ in range(20):
            for x, weight in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, weight)
        products[rows] = clock() - begun
    print(
        f"torch {torch.__version__}, {args.threads} thread(s): alone {n / (middle - start):.1f} tokens/s, batch 8 "
        f"{n / (end - middle):.1f}: {(middle - start) / (end - middle):.2f} times; without reading the "
        f"prompts {(middle - start - reading) / (end - middle - reading_together):.2f} times; outputs "
        f"{'identical' if torch.equal(alone, batched) else 'DIFFER'}; a token's matrix products alone, 8 "
        f"rows against 8 times one: {8 * products[1] / products[8]:.2f} times"
    )


if __name__ == "__main__":
    main()
