"""A signal stops a training with a checkpoint, and a killed training resumes."""

import os
import re
import signal

import pytest
from helpers import RESUMABLE_MODES, digest_of_weights, start_training, train_resumable, wait_for_checkpoint

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


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint(toy_data, tmp_path, finished_run):
    out = tmp_path / "out"
    flags = ["--data_dir", toy_data, "--output_dir", out, *RESUMABLE_MODES["full"]]
    process = start_training([], *flags, HF_TOKEN="hf_secret", WANDB_API_KEY="wandb_secret")
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
