"""Greedy generation at batch 8 against one prompt at a time.

    python benchmarks/generation.py [--new_tokens 128] [--threads 1]

On a CPU, in fp32, the model of 51M parameters in benchmarks/common.py with random weights. Each of the eight prompts
has an image of 1x2 crops and a text of its own length; every answer has the same number of new tokens. With one thread
the seconds are CPU seconds.
"""

import argparse
import time

import torch
from common import make_example, make_model, pad_examples


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="with more than one, seconds are wall-clock time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = make_model().eval()
    examples = [make_example([(1, 2)], text_tokens=43 - 3 * n, supervised=1) for n in range(8)]
    prompts = [pad_examples([example]) for example in examples]
    together = pad_examples(examples, side="left")
    for batch in (*prompts, together):
        del batch["labels"]

    def generate(batch):
        n = batch["input_ids"].shape[1]
        options = {"do_sample": False, "min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
        return model.generate(**batch, **options, pad_token_id=0)[:, n:]

    generate(prompts[0])  # a first call is slower than all later ones
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
