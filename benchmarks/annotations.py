"""Time and memory that it takes to read and check a file of conversations.

    python benchmarks/annotations.py [--lines 100000] [--images 8] [--repetitions 3]
    python benchmarks/annotations.py --lines 200000 --ranks 2 4 --before b0dc58a

The file is like those of convert_ucf101.py: each line is a video, with its frames in one of 101 folders. The frames are
empty files, since the reader never opens them. Each repetition runs in a process of its own, which imports the package
first. The seconds are those of the reader alone; the memory is how much the peak of the process grows. For comparison,
the same lines are also read with json.loads alone, and with json.loads and a stat of each file. In the last case every
line has an error.

With --ranks, torchrun starts so many ranks over gloo, which load the data as finetune_hf_trainer_ucf101.py does: all
lines but a fiftieth to train on, and that fiftieth, with images of its own, to evaluate on. --before is a commit whose
code does the same, for comparison. The seconds until the last rank has all data include the waiting for other ranks,
and the CPU seconds do not. The memory is by how much a rank's anonymous memory (RssAnon) has grown then.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASE = """
import json, os, resource, sys, time
from pathlib import Path
from phi3v.data.annotations import read_conversations, store_conversations
from phi3v.errors import InputError

case, path, images = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if "_conversations" in case:
    read = store_conversations if case.startswith("store") else read_conversations
    try:
        examples = read(Path(path), Path(images))
    except InputError as e:
        print(str(e).splitlines()[0], file=sys.stderr)
else:
    with open(path, encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    if "stat" in case:
        for example in examples:
            for turn in example["conversations"]:
                assert all(os.path.isfile(os.path.join(images, name)) for name in turn["images"])
seconds = time.perf_counter() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
RANK = """
import gc, json, os, sys, time
sys.path.insert(0, os.getcwd())
import torch.distributed as dist
import finetune_hf_trainer_ucf101 as script
from transformers import TrainingArguments
from phi3v.errors import BadExamples

def anonymous():
    gc.collect()
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024

folder, out = sys.argv[1:]
training_args = TrainingArguments(out, use_cpu=True, ddp_backend="gloo")
rank, bad = training_args.process_index, BadExamples()
args = script.RecipeArguments(data_dir=folder)
if dist.is_initialized():
    dist.barrier()
before, start, cpu = anonymous(), time.perf_counter(), time.process_time()
if hasattr(script, "load_once_per_node"):
    data = script.load_once_per_node(script.load_data, args, bad)
else:
    with script.first_of_node(training_args, "data"):
        data = script.load_data(args, bad)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
held = anonymous() - before
start = time.process_time()
for i in range(0, len(data[0]), 100):
    data[0][i]
access = (time.process_time() - start) / (len(data[0]) / 100)
with open(f"{out}/{rank}.json", "w") as file:
    json.dump({"seconds": seconds, "cpu": cpu, "held": held, "access": access, "first": data[0][0]["id"]}, file)
if dist.is_initialized():
    dist.barrier()
"""


def write_data(folder: Path, lines: int, images: int):
    names = [[f"train/Class{i % 101}/v_{i:06}.{k}.jpg" for k in range(images)] for i in range(lines)]
    for i in range(101):
        (folder / "images" / "train" / f"Class{i}").mkdir(parents=True)
    for own in names:
        for name in own:
            os.close(os.open(folder / "images" / name, os.O_CREAT))
    for file, answer in (("good.jsonl", "Class"), ("bad.jsonl", " ")):
        with open(folder / file, "w", encoding="utf-8") as out:
            for i, own in enumerate(names):
                turn = {
                    "images": own,
                    "user": f"Classify the video into one of: {'Class, ' * 101}",
                    "assistant": answer,
                }
                out.write(json.dumps({"id": f"train-{i:010}", "source": "ucf101", "conversations": [turn]}) + "\n")


def load_on_ranks(folder: Path, args: argparse.Namespace):
    """Prints a table: for each number of ranks and each code, what loading costs rank 0 and the most costly other."""
    lines = (folder / "good.jsonl").read_bytes().splitlines(keepends=True)
    held_out = max(1, len(lines) // 50)
    (folder / "ucf101_train.jsonl").write_bytes(b"".join(lines[:-held_out]))
    (folder / "ucf101_val.jsonl").write_bytes(b"".join(lines[-held_out:]))
    (folder / "rank.py").write_text(RANK)
    codes = {"now": ROOT}
    if args.before:
        codes = {f"before ({args.before})": folder / "before", "now": ROOT}
        (folder / "before").mkdir()
        archive = subprocess.run(["git", "archive", args.before], check=True, capture_output=True, cwd=ROOT).stdout
        subprocess.run(["tar", "-x", "-C", folder / "before"], input=archive, check=True)
    print(
        "| ranks | code | s until all have the data | CPU s, rank 0, others | MiB, rank 0, others | CPU µs an access |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks in args.ranks:
        for name, code in codes.items():
            found = [run_ranks(folder, ranks, code) for _ in range(args.repetitions)]
            first, others = ([run[i] for run in found] for i in (slice(1), slice(1, None)))

            def figure(key, runs):
                values = [max(rank[key] for rank in run) for run in runs if run]
                return statistics.median(values) if values else float("nan")

            print(
                f"| {ranks} | {name} | {figure('seconds', found):.1f} | {figure('cpu', first):.1f}, "
                f"{figure('cpu', others):.2f} | {figure('held', first):.0f}, {figure('held', others):.1f} | "
                f"{1e6 * figure('access', found):.0f} |",
                flush=True,
            )


def run_ranks(folder: Path, ranks: int, code: Path) -> list[dict]:
    """What the program RANK writes on each rank, with the code in a folder."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [*command, folder / "rank.py", folder, out], check=True, cwd=code, env=environment, capture_output=True
        )
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=8, help="images per line (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", help="load the data in so many ranks, and do nothing else")
    parser.add_argument("--before", help="with --ranks: a commit to compare with")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {args.lines:,} lines of {args.images} images")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.lines, args.images)
        if args.ranks:
            return load_on_ranks(Path(folder), args)
        print(
            f"the file has {Path(folder, 'good.jsonl').stat().st_size / 2**20:.0f} MiB; load {os.getloadavg()[0]:.2f}"
        )
        print(f"{'case':36}{'s':>8}{'min':>8}{'max':>8}{'MiB':>8}")
        for case in (
            "json.loads",
            "json.loads and a stat an image",
            "read_conversations",
            "read_conversations, all bad",
            "store_conversations",
        ):
            figures = []
            for _ in range(args.repetitions):
                file = Path(folder, "bad.jsonl" if "bad" in case else "good.jsonl")
                command = [sys.executable, "-c", CASE, case, file, Path(folder, "images")]
                run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                figures.append([float(figure) for figure in run.stdout.split()[-2:]])
            seconds, memory = zip(*figures, strict=True)
            print(
                f"{case:36}{statistics.median(seconds):>8.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}"
                f"{statistics.median(memory):>8.0f}"
            )


if __name__ == "__main__":
    main()
