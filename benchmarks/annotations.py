"""Time and memory that it takes to read and check a file of conversations.

    python benchmarks/annotations.py [--lines 100000] [--images 8] [--repetitions 3]

The file is like those of convert_ucf101.py: each line is a video, with its frames in one of 101 folders. The frames are
empty files, since the reader never opens them. Each repetition runs in a process of its own, which imports the package
first. The seconds are those of the reader alone; the memory is how much the peak of the process grows. For comparison,
the same lines are also read with json.loads alone, and with json.loads and a stat of each file. In the last case every
line has an error.
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
from phi3v.data.annotations import read_conversations
from phi3v.errors import InputError

case, path, images = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if case.startswith("read_conversations"):
    try:
        examples = read_conversations(path, images)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=8, help="images per line (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {args.lines:,} lines of {args.images} images")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.lines, args.images)
        print(
            f"the file has {Path(folder, 'good.jsonl').stat().st_size / 2**20:.0f} MiB; load {os.getloadavg()[0]:.2f}"
        )
        print(f"{'case':36}{'s':>8}{'min':>8}{'max':>8}{'MiB':>8}")
        for case in (
            "json.loads",
            "json.loads and a stat an image",
            "read_conversations",
            "read_conversations, all bad",
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
