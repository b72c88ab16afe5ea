"""Kills trainings with SIGKILL at random moments, resumes them, and compares the final weights bit for bit.

    python benchmarks/kills.py [--modes full lora qlora] [--moments 8]
    python benchmarks/kills.py --signals          # SIGTERM to rank 1, at four kinds of moments

Two ranks on the CPU, the demo's checkpoint and videos (`make demo` makes them). Every run is killed after its first
checkpoint is there: at even moments one rank, at odd ones all of them; at every fourth while another is being written.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MODES = {
    "full": [],
    "lora": ["--use_lora", "--lora_rank", "8"],
    "qlora": ["--use_lora", "--use_qlora", "--lora_rank", "8"],
}


def command(data: Path, out: Path, mode: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = "--num_crops 1 --max_train_samples 48 --num_train_epochs 4 --batch_size 4 --max_tokens_per_gpu 340"
    flags += " --save_steps 3 --no_eval_before"
    flags += " --save_total_limit 3 --logging_steps 5 --no_tqdm --learning_rate 1e-3 --max_new_tokens 2"
    flags += " --max_eval_samples 2 --dataloader_num_workers 1 --resume_from_checkpoint auto"
    script = [str(ROOT / "finetune_hf_trainer_ucf101.py"), "--data_dir", str(data), "--output_dir", str(out)]
    return [*launch, *script, "--model_name_or_path", str(ROOT / "demo/base_checkpoint"), *flags.split(), *MODES[mode]]


def start(data: Path, out: Path, mode: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = open(out.with_suffix(".log"), "a")
    return subprocess.Popen(command(data, out, mode), stdout=log, stderr=log, env=environment)


def weights(out: Path) -> str:
    (path,) = [*out.glob("model.safetensors"), *out.glob("adapter_model.safetensors")]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ranks(run: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, rank 0 first."""
    found = [p for p in psutil.Process(run.pid).children() if "finetune" in " ".join(p.cmdline())]
    return sorted(found, key=lambda p: p.environ().get("RANK", "9"))


def wait_for(condition, run: subprocess.Popen, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def kill(run: subprocess.Popen, out: Path, number: int, rng: random.Random) -> str:
    """Kills one rank or all, and waits until nothing of the run is left; returns when it was."""
    wait_for(lambda: any(out.glob("checkpoint-*")), run)
    saving = number % 4 == 3
    if saving:
        had = len(list(out.glob("checkpoint-*")))
        wait_for(lambda: any((out / "unfinished").glob("checkpoint-*/*")) and had, run)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 1.5))
    everything = psutil.Process(run.pid).children(recursive=True)
    own = ranks(run)
    victims = own if number % 2 else [own[rng.randrange(len(own))]]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    steps = sorted(int(p.name[11:]) for p in out.glob("checkpoint-*"))
    unfinished = [p.name for p in (out / "unfinished").glob("*")]
    assert run.wait(90) != 0
    _, alive = psutil.wait_procs(everything, timeout=60)
    assert not alive, f"left behind: {alive}"
    which = "all ranks" if len(victims) == len(own) > 1 else "one rank"
    state = f"checkpoints {steps}" + (f", {unfinished[0]} being written" if unfinished else "")
    return f"{which:10} {state}; all gone after {time.monotonic() - killed:.1f} s"


def after(out: Path, word: str):
    return lambda: word in out.with_suffix(".log").read_text()


def signals(data: Path, folder: Path):
    """SIGTERM to rank 1 while data are read, in a step, while a checkpoint is written, and in the last evaluation."""
    reference = folder / "reference"
    assert start(data, reference, "full").wait() == 0
    moments = {
        "loading data": lambda out: after(out, "training starts at step 0"),
        "in a step": lambda out: lambda: any(out.glob("checkpoint-6")),
        "saving": lambda out: lambda: any((out / "unfinished").glob("checkpoint-*/*")),
        "evaluating": lambda out: after(out, "train_runtime"),
    }
    for name, moment in moments.items():
        out = folder / name.replace(" ", "-")
        run = start(data, out, "full")
        wait_for(moment(out), run)
        own = ranks(run)
        own[1].send_signal(signal.SIGTERM)
        told = time.monotonic()
        _, alive = psutil.wait_procs(own, timeout=60)
        seconds = time.monotonic() - told
        run.wait(60)
        log = out.with_suffix(".log").read_text()
        ended = [line.split("(")[0].strip() for line in log.splitlines() if "exitcode" in line] or ["exitcode 0"]
        steps = sorted(int(p.name[11:]) for p in out.glob("checkpoint-*"))
        status = start(data, out, "full").wait()
        same = not status and weights(out) == weights(reference)
        print(
            f"SIGTERM {name:14} both ranks gone after {seconds:.1f} s, {ended[-1]}, "
            f"checkpoints {steps}; resumed: {'equal' if same else 'DIFFERENT'}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--moments", type=int, default=8)
    parser.add_argument("--data_dir", type=Path, default=ROOT / "output/demo/data/ucf101")
    parser.add_argument("--signals", action="store_true")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.signals:
            return signals(args.data_dir, Path(folder))
        for mode in args.modes:
            rng = random.Random(mode)
            reference = Path(folder) / mode
            assert start(args.data_dir, reference, mode).wait() == 0, reference.with_suffix(".log").read_text()[-2000:]
            for number in range(args.moments):
                out = Path(folder) / f"{mode}-{number}"
                when = kill(start(args.data_dir, out, mode), out, number, rng)
                status = start(args.data_dir, out, mode).wait()
                same = status == 0 and weights(out) == weights(reference)
                failed += not same
                resumed = [line for line in out.with_suffix(".log").read_text().splitlines() if "resuming" in line]
                at = resumed[-1].rpartition("-")[2] if resumed else "nothing"
                print(f"{mode:6} {number} {when}; resumed at {at}: {'equal' if same else 'DIFFERENT'}", flush=True)
                if status:
                    print(out.with_suffix(".log").read_text()[-2000:])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
