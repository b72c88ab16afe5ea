"""Where the time of a start goes: CPU seconds of programs that a user waits for, and of the phases up to a first step.

    python benchmarks/start.py                                     # of this checkout
    python benchmarks/start.py --compare OTHER_CHECKOUT            # and of another one, in turns, for before and after

It prints CPU seconds, which other programs on the machine change little, as medians of --repeats runs. It uses small
data that it draws itself, and the demo's checkpoint, in one process.
"""

import argparse
import csv
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import av
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "finetune_hf_trainer_ucf101.py"
ROWS = 80
# Runs a training until its first step is done, and prints the CPU seconds of this process after each phase.
UNTIL_THE_FIRST_STEP = """
import os, sys, time
import finetune_hf_trainer_ucf101 as script
from transformers.trainer_callback import CallbackHandler

def passed(phase):
    print(f"PHASE {time.process_time():.3f} {phase}", flush=True)

def step_ended(*args, **kwargs):
    passed("first step")
    os._exit(0)

passed("imports")
try:
    from phi3v import phases
    phases.ended = passed
except ImportError:  # a checkout of before
    pass
CallbackHandler.on_step_end = step_ended
script.main(sys.argv[1:])
"""


def draw(folder: Path):
    """Images, a table of ROWS questions about them, and ROWS short videos."""
    (folder / "photos").mkdir()
    with open(folder / "questions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for i in range(ROWS):
            Image.new("RGB", (64, 48), (i, 100, 200 - i)).save(folder / "photos" / f"{i}.png")
            table.writerow([f"{i}.png", "Which colour is it?", f"colour {i}"])
    (folder / "videos" / "train" / "Run").mkdir(parents=True)
    for i in range(ROWS):
        with av.open(str(folder / "videos" / "train" / "Run" / f"{i}.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height = 64, 48
            for k in range(9):
                image = Image.new("RGB", (64, 48), (i, 20 * k, 200 - i))
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())


def run(checkout: Path, command: list[str], status: int = 0) -> tuple[float, subprocess.CompletedProcess]:
    """CPU seconds of a program and of the processes that it starts, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status, done.stderr[-2000:]
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def seconds_of_imports(stderr: str) -> Counter:
    """Seconds that a program has spent in the modules of each package, from what `python -X importtime` prints."""
    seconds = Counter()
    for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)", stderr, re.MULTILINE):
        package = name.split(".")[0]
        if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed")):
            package = ".".join(name.split(".")[:2])
        seconds[package] += int(own) / 1e6
    return seconds


def measure(checkout: Path, data: Path, out: Path) -> dict[str, float]:
    """One value for each row of the table."""
    found = {}
    found["for comparison: import TrainingArguments"] = run(
        checkout, ["-c", "from transformers import TrainingArguments"]
    )[0]
    found["--help"] = run(checkout, [SCRIPT, "--help"])[0]
    found["an unknown flag (--lr)"] = run(checkout, [SCRIPT, "--data_dir", "x", "--lr", "1"], status=2)[0]
    converter = ["tools/convert_conversations.py", "--source", data / "questions.csv", "--images_dir", data / "photos"]
    found[f"convert_conversations.py, {ROWS} rows"] = run(checkout, [*converter, "--out_dir", out / "converted"])[0]
    converter = ["convert_ucf101.py", "--source", data / "videos", "--out_dir", out / "converted_videos"]
    found[f"convert_ucf101.py, {ROWS} videos"] = run(checkout, converter)[0]
    flags = ["--data_dir", out / "converted", "--model_name_or_path", ROOT / "demo" / "base_checkpoint"]
    flags += ["--output_dir", out / "run", "--num_crops", "1", "--no_eval_before", "--dataloader_num_workers", "0"]
    all_seconds, done = run(checkout, ["-c", UNTIL_THE_FIRST_STEP, *map(str, flags)])
    before = 0.0
    for after, phase in re.findall(r"^PHASE ([\d.]+) (.*)$", done.stdout, re.MULTILINE):
        found[f"  {phase}"] = found.get(f"  {phase}", 0) + float(after) - before
        before = float(after)
    found["a training up to its first step"] = all_seconds
    stderr = run(checkout, ["-X", "importtime", "-c", f"import {Path(SCRIPT).stem}"])[1].stderr
    for package, seconds in seconds_of_imports(stderr).items():
        found[f"    imports of {package}, wall seconds"] = seconds
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, help="another checkout of this repository")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    checkouts = [path.resolve() for path in (args.compare, ROOT) if path]
    found = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for number in range(args.repeats):
            for checkout in checkouts:
                out = Path(folder, f"{checkouts.index(checkout)}-{number}")
                out.mkdir()
                found[checkout].append(measure(checkout, Path(folder), out))
    # A dash is what a checkout does not have. Small packages are left out.
    rows = dict.fromkeys(name for runs in reversed(found.values()) for values in runs for name in values)
    print(f"| CPU seconds, median of {args.repeats} | {' | '.join(['before', 'after'][-len(checkouts) :])} |")
    print("| --- " * (len(checkouts) + 1) + "|")
    for name in rows:
        measured = [[values[name] for values in found[checkout] if name in values] for checkout in checkouts]
        medians = [statistics.median(values) if values else None for values in measured]
        if "imports of" not in name or max(median or 0 for median in medians) > 0.1:
            print(f"| {name} | {' | '.join('–' if median is None else f'{median:.2f}' for median in medians)} |")


if __name__ == "__main__":
    main()
