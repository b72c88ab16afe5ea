"""How the time and the memory of a training step grow with crops, images and examples of a micro-batch.

    python benchmarks/growth.py [--repetitions 3]

One CPU thread, fp32, the model of 51M parameters in benchmarks/common.py. The seconds are CPU seconds of forward and
backward, as the median. FLOPs (with causal attention) and the memory that is kept for the backward pass are not
measured but computed, by the functions behind --estimate.
"""

import argparse
import statistics
from functools import partial

from common import cpu_seconds, make_example, make_model, pack_examples, parse_repetitions, train_step

from phi3v.training.costs import Costs
from phi3v.training.workload import workload_of_packing

# What grows: each micro-batch is a list of examples, each example a list of its images' grids of sub-crops.
SERIES = {
    "crops of an image": [[[(1, 1)]], [[(1, 2)]], [[(2, 2)]], [[(2, 4)]], [[(3, 4)]], [[(4, 4)]]],
    "images of an example, 1x1 each": [[[(1, 1)] * n] for n in (1, 2, 4, 8)],
    "examples of a micro-batch, 1x2 each": [[[(1, 2)]] * n for n in (1, 2, 4, 8, 16)],
}


def main():
    args = parse_repetitions(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 3)
    model = make_model()
    costs = Costs(model, stream_bytes=4, compute_bytes=4)
    for name, micro_batches in SERIES.items():
        print(f"{name:38}{'tokens':>8}{'CPU s':>8}{'ratio':>7}{'FLOPs':>7}{'GFLOP/s':>9}{'kept GiB':>10}")
        first = None
        for examples in micro_batches:
            batch = pack_examples([make_example(grids, images_key=i) for i, grids in enumerate(examples)])
            times = [cpu_seconds(partial(train_step, model, batch)) for _ in range(args.repetitions + 1)]
            workload = workload_of_packing(batch["packing"])
            seconds, flops = statistics.median(times[1:]), costs.flops(workload)  # the first step warms up
            first = first or (seconds, flops)
            h, w = examples[0][0]
            label = {"crops": h * w, "images": len(examples[0])}.get(name.split()[0], len(examples))
            print(
                f"{label:>38}{workload.tokens:>8}{seconds:>8.2f}{seconds / first[0]:>7.2f}{flops / first[1]:>7.2f}"
                f"{flops / seconds / 1e9:>9.0f}{costs.activation_bytes(workload) / 2**30:>10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
