"""A signal stops a training with a checkpoint, and a killed training resumes."""

import html
import os
import re
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest
from helpers import RESUMABLE_MODES, digest_of_weights, start_training, train_resumable, wait_for_checkpoint
from transformers import TrainerControl
from two_ranks import LAUNCH_TWO_RANKS

from phi3v.signals import stop_signals
from phi3v.training import stopping
from phi3v.training.checkpoints import damage
from phi3v.training.stopping import PREEMPTED


def test_a_run_says_when_it_stops_and_how_to_go_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["script.py", "--data_dir", "my data", "--resume_from_checkpoint", "x", "--fp32"])
    monkeypatch.setattr(stopping, "newest_whole", lambda folder: None)
    control = TrainerControl()
    preemption = stopping.Preemption()
    preemption.on_train_begin(None, SimpleNamespace(compute_steps=lambda *_: None, max_steps=2), control)
    preemption.on_step_end(None, None, control)
    assert not control.should_training_stop and not preemption.stopped and preemption.ending is None
    os.kill(os.getpid(), signal.SIGINT)
    preemption.on_step_end(None, None, control)
    assert control.should_training_stop and control.should_save and preemption.stopped
    assert "SIGINT: stopping after this step, with a checkpoint; " in capfd.readouterr().err
    left = []
    preemption.on_leaving = lambda: left.append(preemption.ending)
    with pytest.raises(stopping.Interrupted) as status:
        preemption.check()
    assert left == [preemption.advice] and len(preemption.advice) == 1  # the report says how to go on
    command = "python script.py --data_dir 'my data' --fp32"
    assert status.value.code == PREEMPTED
    assert capfd.readouterr().out == f"resume with: {command} --resume_from_checkpoint auto\n"
    preemption.on_train_end(None, None, control)
    assert stop_signals.until == stopping.AFTER_SAVING
    preemption.model_saved(tmp_path, step=2)
    asked = f"--model_name_or_path {tmp_path} --evaluate_only"
    assert preemption.advice == [f"the trained model is saved; evaluate it with: {command} {asked}"]
    monkeypatch.setattr(stopping, "newest_whole", lambda folder: tmp_path / "checkpoint-2")
    preemption.model_saved(tmp_path, step=2)
    assert preemption.advice[0].endswith("--fp32 --resume_from_checkpoint auto")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_of_two_ranks_with_a_checkpoint(toy_data, tmp_path):
    """A terminal sends SIGINT to torchrun, to all ranks and to the processes that prepare images; torchrun sends it to
    the ranks again."""
    out = tmp_path / "out"
    flags = ["--data_dir", toy_data, "--output_dir", out, "--batch_size_per_gpu", 1, "--dataloader_num_workers", 1]
    process = start_training(LAUNCH_TWO_RANKS, *flags, "--num_train_epochs", "50", group=0)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=900)[0]
    assert output.count("SIGINT: stopping after this step, with a checkpoint") == 1, output[-5000:]
    assert "KeyboardInterrupt" not in output and output.count("Traceback") == 1  # torchrun's own
    step = int(re.search(r"stopped by a signal at step (\d+), with a checkpoint", output)[1])
    assert damage(out / f"checkpoint-{step}") is None and (out / "report.html").is_file()
    (command,) = re.findall("^resume with: (.*)$", output, re.MULTILINE)
    assert command.startswith("python -m torch.distributed.run --standalone --nproc_per_node=2 ")
    assert command.endswith("--num_train_epochs 50 --resume_from_checkpoint auto")
    page = html.unescape((out / "report.html").read_text())
    assert f"Stopped by a signal at step {step:,} of " in page and f"resume with: {command}" in page
    assert not any(str(out) in line for line in commands_of_processes())


def commands_of_processes() -> list[str]:
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


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
