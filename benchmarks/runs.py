"""Whole runs of a script on the demo's data: plain settings against ours, and one process against two.

    make demo TASK=docvqa; python benchmarks/runs.py

The plain settings are the defaults of the published recipe: one example at a time, in training and evaluation, with
activation checkpointing of all layers, and a page is read again for every question. Every run trains on the same 512
questions, in fp32 without DeepSpeed, and evaluates on 200. The seconds are wall-clock time of the training loop and of
the evaluation after it, without imports and loading. On a machine with GPUs, this program measures runs on the GPUs.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    *("--model_name_or_path", "demo/base_checkpoint", "--data_dir", "output/demo/data/docvqa", "--num_crops", "3"),
    *("--max_train_samples", "512", "--batch_size", "16", "--fp32", "--deepspeed", "none", "--no_eval_before"),
    *("--logging_steps", "8"),
]
PLAIN = "--batch_size_per_gpu 1 --per_device_eval_batch_size 1 --activation_checkpointing true --no_share_images"
OURS = "--max_tokens_per_gpu auto"
RUNS = {
    "plain, 1 process": (1, PLAIN),
    "ours, 1 process": (1, OURS),
    "plain, 2 processes": (2, PLAIN),
    "ours, 2 processes": (2, OURS),
}


def run(processes: int, flags: str) -> tuple[float, float, float]:
    """Returns (seconds of training, seconds of evaluation, GiB of the process that took most memory)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["finetune_hf_trainer_docvqa.py", *COMMON, *flags.split(), "--output_dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        text, trained, evaluated = "", None, None
        for line in child.stdout:
            text += line
            if "'train_runtime'" in line:
                trained = time.perf_counter()
            if "eval_after.json" in line:
                evaluated = time.perf_counter() - trained
        if child.wait():
            sys.exit(text[-3000:])
    seconds = float(re.search(r"'train_runtime': '([\d.e+]+)'", text)[1])
    return seconds, evaluated, max(map(float, re.findall(r"'peak_memory_gib': '([\d.]+)'", text)))


def main():
    print(f"{'run':22}{'training s':>12}{'questions/s':>13}{'speed-up':>10}{'evaluation s':>14}{'GiB':>7}")
    first = None
    for name, (processes, flags) in RUNS.items():
        seconds, evaluation, memory = run(processes, flags)
        first = first or seconds
        print(
            f"{name:22}{seconds:>12.1f}{512 / seconds:>13.1f}{first / seconds:>10.2f}{evaluation:>14.1f}{memory:>7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
