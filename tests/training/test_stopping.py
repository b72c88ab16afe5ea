"""A signal stops a training with a checkpoint, and a killed training resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import RESUMABLE, RESUMABLE_MODES, ROOT, digest_of_weights, environment, train_resumable
from two_ranks import LAUNCH_TWO_RANKS

from phi3v.training import stopping
from phi3v.training.checkpoints import damage
from phi3v.training.stopping import PREEMPTED


def test_two_signals_within_seconds_count_as_one(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        preemption, left = stopping.Preemption(), []
        monkeypatch.setattr(stopping.os, "_exit", left.append)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested() and not left
        preemption.last_signal -= stopping.SAME_SIGNAL
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [128 + signal.SIGTERM]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


def start(program, *flags, **variables):
    command = [sys.executable, *program, ROOT / "finetune_hf_trainer_ucf101.py", *RESUMABLE, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_checkpoint(process, out):
    end = time.monotonic() + 900
    while not any(out.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint(toy_data, tmp_path, finished_run):
    out = tmp_path / "out"
    flags = ["--data_dir", toy_data, "--output_dir", out, *RESUMABLE_MODES["full"]]
    process = start([], *flags, HF_TOKEN="hf_secret", WANDB_API_KEY="wandb_secret")
    wait_for_checkpoint(process, out)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == PREEMPTED, output[-3000:]
    step = int(re.search(r"stopped by a signal at step (\d+), with a checkpoint", output)[1])
    assert step < 12 and damage(out / f"checkpoint-{step}") is None and not (out / "finished.json").exists()
    for path in out.rglob("*"):
        assert path.is_dir() or b"_secret" not in path.read_bytes()
    assert "_secret" not in output
    train_resumable(toy_data, out, *RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto")
    assert digest_of_weights(out) == digest_of_weights(finished_run("full"))


@pytest.mark.slow
def test_torchrun_restarts_and_the_training_resumes_after_a_rank_was_killed(ranks, toy_data, tmp_path):
    """Kills one of two ranks under ZeRO-2. After torchrun's restart the training resumes from the newest checkpoint."""
    flags = ["--data_dir", toy_data, "--batch_size_per_gpu", "1", "--save_total_limit", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    ranks.train(*RESUMABLE, *flags, "--output_dir", whole)
    process = start([*LAUNCH_TWO_RANKS, "--max-restarts=1"], *flags, "--output_dir", out)
    wait_for_checkpoint(process, out)
    (victim,) = [pid for pid, environment in descendants(process.pid) if "LOCAL_RANK=1" in environment]
    os.kill(victim, signal.SIGKILL)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]
    assert "resuming from" in output and digest_of_weights(out) == digest_of_weights(whole)
    curves = []
    for folder in (whole, out):
        history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        curves.append([(entry["step"], entry["loss"]) for entry in history if "loss" in entry])
    assert curves[0] == curves[1] and [step for step, _ in curves[1]] == list(range(1, 13))
    assert len(list(out.glob("checkpoint-*"))) == 2 and not (out / "unfinished").exists()


def descendants(parent: int) -> list[tuple[int, list[str]]]:
    """The training processes that a torchrun has started, with their environments."""
    import psutil

    found = []
    for child in psutil.Process(parent).children():
        found.append((child.pid, [f"{k}={v}" for k, v in child.environ().items()]))
    return found
