"""Resuming bit for bit, being killed and told to stop, and everything that can be wrong with a checkpoint."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, ROOT, environment
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import checkpoints
from phi3v.training.checkpoints import PREEMPTED, damage, find_checkpoint

COMMON = ["--model_name_or_path", str(CHECKPOINT), "--num_crops", "2", "--no-tqdm", "--dataloader_num_workers", "0"]
COMMON += ["--max_new_tokens", "2", "--max_eval_samples", "2", "--no_eval_before", "--batch_size", "4"]
COMMON += ["--learning_rate", "1e-3", "--num_train_epochs", "2", "--save_steps", "2", "--logging_steps", "1"]
# 24 examples: 6 steps an epoch. Checkpoint 8 stands in the middle of the second.
MODES = {
    "full": ["--deepspeed", "none", "--batch_size_per_gpu", "2"],
    "full, by tokens": ["--deepspeed", "none", "--max_tokens_per_gpu", "700"],
    "frozen, no sharing": ["--deepspeed", "none", "--freeze_vision_model", "--no_share_images"],
    "lora": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1", "--train_separators"],
    "qlora": ["--use_lora", "--use_qlora", "--lora_rank", "4", "--batch_size_per_gpu", "4"],
}


def run(data, out, *flags):
    return script.main(["--data_dir", str(data), "--output_dir", str(out), *COMMON, *map(str, flags)])


def digest(out) -> str:
    files = [path for path in sorted(out.glob("*.safetensors"))]
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def finished(toy_data, tmp_path_factory):
    """A whole run of each mode, made when it is first asked for."""
    made = {}

    def get(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("finished") / "out"
            run(toy_data, made[mode], *MODES[mode])
        return made[mode]

    return get


def cut_back(source, target, step):
    """The output folder as it was when checkpoint `step` was the newest."""
    shutil.copytree(source, target)
    (target / "finished.json").unlink()
    for path in target.glob("*.safetensors"):
        path.unlink()
    for path in target.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_bit_exact(mode, toy_data, tmp_path, finished, capfd):
    out = tmp_path / "out"
    cut_back(finished(mode), out, 8)
    trainer = run(toy_data, out, *MODES[mode], "--resume_from_checkpoint", "auto")
    assert f"resuming from {out}/checkpoint-8" in capfd.readouterr().out
    assert digest(out) == digest(finished(mode))
    losses = json.loads((finished(mode) / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    now = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert now == [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]


def test_a_finished_run_is_left_as_it_is(toy_data, finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished("full").rglob("*")}
    assert run(toy_data, finished("full"), *MODES["full"], "--resume_from_checkpoint", "auto") is None
    assert "finished run" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished("full").rglob("*")} == before


def test_nothing_to_resume_from_is_said(toy_data, tmp_path, capfd):
    run(toy_data, tmp_path, *MODES["full"], "--resume_from_checkpoint", "auto", "--max_steps", "1")
    assert f"no whole checkpoint in {tmp_path}: training starts at step 0" in capfd.readouterr().out


DAMAGES = {
    "no manifest": (lambda c: (c / "complete.json").unlink(), "has no complete.json"),
    "empty manifest": (lambda c: (c / "complete.json").write_text(""), "complete.json can't be read"),
    "manifest of another form": (lambda c: (c / "complete.json").write_text('{"files": 3}'), "can't be read"),
    "manifest that is a list": (lambda c: (c / "complete.json").write_text("[1]"), "can't be read"),
    "weights missing": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights cut off": (lambda c: os.truncate(c / "model.safetensors", 1000), "model.safetensors has 1,000 bytes"),
    "optimizer cut off": (lambda c: os.truncate(c / "optimizer.pt", 10), "optimizer.pt has 10 bytes"),
    "optimizer missing": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "random state missing": (lambda c: (c / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "state emptied": (lambda c: os.truncate(c / "trainer_state.json", 0), "trainer_state.json has 0 bytes"),
    "of another step": (lambda c: c.rename(c.with_name("checkpoint-99")), "trainer_state.json is of step 12"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoints_are_left_aside(kind, finished, tmp_path):
    out = tmp_path / "out"
    cut_back(finished("full"), out, 12)
    spoil, message = DAMAGES[kind]
    spoil(out / "checkpoint-12")
    found, messages = find_checkpoint("auto", out)
    assert found == out / "checkpoint-10" and "warning: " in messages[0] and message in messages[0]
    bad = out / ("checkpoint-99" if kind == "of another step" else "checkpoint-12")
    with pytest.raises(InputError, match="is no whole checkpoint"):
        find_checkpoint(str(bad), out)


def test_what_is_being_written_is_no_checkpoint(finished, tmp_path):
    out = tmp_path / "out"
    cut_back(finished("full"), out, 4)
    shutil.copytree(out / "checkpoint-4", out / "unfinished" / "checkpoint-6")
    (out / "checkpoint-x").mkdir()
    (out / "checkpoint-7").write_text("no folder")
    assert find_checkpoint("auto", out)[0] == out / "checkpoint-4"


CHANGES = [
    (["--learning_rate", "2e-3"], "learning_rate: 0.001 then, 0.002 now", False),
    (["--seed", "7"], "seed: 42 then, 7 now", True),
    (["--batch_size", "8"], "batch_size: 4 then, 8 now", True),
    (["--max_train_samples", "20"], "data: ", True),
    (["--num_crops", "1"], "num_crops: 2 then, 1 now", True),
    (["--freeze_vision_model"], "freeze_vision_model: false then, true now", False),
    (["--bf16"], "bf16: false then, true now", False),
    (["--deepspeed", str(ROOT / "ds_config" / "zero2.json")], "deepspeed: null then", False),
    (["--use_lora", "--lora_rank", "4"], "use_lora: false then, true now", False),
]


@pytest.mark.parametrize(("flags", "message", "can_go_on"), CHANGES)
def test_other_settings_are_refused(flags, message, can_go_on, toy_data, finished, tmp_path):
    out = tmp_path / "out"
    cut_back(finished("full"), out, 8)
    resume = [*MODES["full"], "--resume_from_checkpoint", "auto", *flags]
    with pytest.raises(InputError) as error:
        run(toy_data, out, *resume)
    assert message in str(error.value)
    assert ("--resume_anyway" in str(error.value)) == can_go_on
    if "--seed" in flags:
        run(toy_data, out, *resume, "--resume_anyway")
        assert digest(out) != digest(finished("full"))
    if not can_go_on:
        with pytest.raises(InputError, match="to go on from it, "):
            run(toy_data, out, *resume, "--resume_anyway")


def test_a_base_that_has_changed_under_its_name_is_noticed(toy_data, finished, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(CHECKPOINT, base)
    assert checkpoints.model_fingerprint(str(base)) == checkpoints.model_fingerprint(str(CHECKPOINT))
    assert checkpoints.model_fingerprint("someone/model") is None
    flags = [*MODES["full"], "--model_name_or_path", str(base)]
    run(toy_data, tmp_path / "out", *flags, "--max_steps", "4")
    (tmp_path / "out" / "finished.json").unlink()
    weights = {name: tensor * 1.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="model: .* then, .* now\n.*--resume_anyway"):
        run(toy_data, tmp_path / "out", *flags, "--max_steps", "4", "--resume_from_checkpoint", "auto")


def test_settings_that_only_watch_may_change(toy_data, finished, tmp_path):
    out = tmp_path / "out"
    cut_back(finished("full"), out, 8)
    flags = ["--save_steps", "3", "--save_total_limit", "2", "--logging_steps", "4", "--max_eval_samples", "3"]
    run(toy_data, out, *MODES["full"], "--resume_from_checkpoint", "auto", *flags)
    assert digest(out) == digest(finished("full"))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FILES = st.dictionaries(st.sampled_from(["a.pt", "..", "/", "trainer_state.json"]) | st.text(max_size=5), JSON)
MANIFESTS = st.fixed_dictionaries({"files": FILES | JSON, "settings": JSON}) | JSON
CONTENTS = st.binary(max_size=60) | MANIFESTS.map(lambda v: json.dumps(v).encode())
STATES = st.binary(max_size=40) | st.fixed_dictionaries({"global_step": JSON}).map(lambda v: json.dumps(v).encode())


@settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    CONTENTS, STATES, st.sampled_from(["checkpoint-3", "checkpoint-03", "checkpoint-٣", "checkpoint-", "checkpoint--1"])
)
def test_random_checkpoints(tmp_path_factory, manifest, state, name):
    """Whatever stands in the two files that are looked at: a checkpoint is taken, or left aside with a reason."""
    out = tmp_path_factory.mktemp("random")
    (out / name).mkdir()
    (out / name / "complete.json").write_bytes(manifest)
    (out / name / "trainer_state.json").write_bytes(state)
    found, messages = find_checkpoint("auto", out)
    assert (found is None) == (damage(out / name) is not None or not name[11:].isdecimal()) and messages
    shutil.rmtree(out)


def test_deep_json_is_left_aside(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "complete.json").write_text("[" * 100_000)
    assert find_checkpoint("auto", tmp_path)[0] is None


def test_what_deepspeed_loads_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"ds_version": Evil()}, tmp_path / "states.pt")
    checkpoints.refuse_pickles()
    with pytest.raises(Exception, match="mkdir"):
        TorchCheckpointEngine().load(str(tmp_path / "states.pt"))
    assert not (tmp_path / "ran").exists()


def test_only_whole_earlier_checkpoints_are_deleted(finished, tmp_path):
    """A damaged later one, and one of a training that went another way, must not push out the one just written."""
    out = tmp_path / "out"
    cut_back(finished("full"), out, 12)
    os.truncate(out / "checkpoint-12" / "model.safetensors", 5)
    os.truncate(out / "checkpoint-2" / "model.safetensors", 5)
    shutil.copytree(out / "checkpoint-6", out / "unfinished" / "checkpoint-6")
    checkpoints.publish(out / "unfinished" / "checkpoint-6", {}, keep=1)
    left = {path.name for path in out.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-6", "checkpoint-8", "checkpoint-10", "checkpoint-12"}
    assert damage(out / "checkpoint-6") is None and not (out / "unfinished").exists()


def test_going_another_way_sets_later_checkpoints_aside(toy_data, finished, tmp_path):
    out = tmp_path / "out"
    cut_back(finished("full"), out, 10)
    flags = ["--resume_from_checkpoint", out / "checkpoint-4", "--max_steps", "6", "--save_total_limit", "1"]
    run(toy_data, out, *MODES["full"], *flags, "--resume_anyway")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6"}
    assert {path.name for path in out.glob("abandoned-*")} == {f"abandoned-checkpoint-{n}" for n in (6, 8, 10)}


def test_a_signal_that_comes_twice_is_one(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        preemption, left = checkpoints.Preemption(), []
        monkeypatch.setattr(checkpoints.os, "_exit", left.append)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.requested() and not left
        preemption.first -= checkpoints.REPEATS
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [128 + signal.SIGTERM]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


# ---- processes


def start(program, *flags, **variables):
    command = [sys.executable, *program, ROOT / "finetune_hf_trainer_ucf101.py", *COMMON, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def wait_for_checkpoint(process, out):
    end = time.monotonic() + 120
    while not any(out.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.005)


def test_a_signal_ends_a_run_with_a_checkpoint(toy_data, tmp_path, finished):
    out = tmp_path / "out"
    flags = ["--data_dir", toy_data, "--output_dir", out, *MODES["full"]]
    process = start([], *flags, HF_TOKEN="hf_secret", WANDB_API_KEY="wandb_secret")
    wait_for_checkpoint(process, out)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == PREEMPTED, output[-3000:]
    step = int(re.search(r"stopped by a signal at step (\d+), with a checkpoint", output)[1])
    assert step < 12 and damage(out / f"checkpoint-{step}") is None and not (out / "finished.json").exists()
    for path in out.rglob("*"):
        assert path.is_dir() or b"_secret" not in path.read_bytes()
    assert "_secret" not in output
    run(toy_data, out, *MODES["full"], "--resume_from_checkpoint", "auto")
    assert digest(out) == digest(finished("full"))


def test_torchrun_goes_on_after_a_rank_was_killed(toy_data, tmp_path):
    """ZeRO-2 on two ranks, of which one is killed; torchrun's restart takes the newest checkpoint by itself."""
    flags = ["--data_dir", toy_data, "--batch_size_per_gpu", "1", "--save_total_limit", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    process = start(TWO_RANKS, *flags, "--output_dir", whole)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    process = start([*TWO_RANKS, "--max-restarts=1"], *flags, "--output_dir", out)
    wait_for_checkpoint(process, out)
    (victim,) = [pid for pid, environment in descendants(process.pid) if "LOCAL_RANK=1" in environment]
    os.kill(victim, signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert "resuming from" in output and digest(out) == digest(whole)
    curves = []
    for folder in (whole, out):
        history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        curves.append([(entry["step"], entry["loss"]) for entry in history if "loss" in entry])
    assert curves[0] == curves[1] and [step for step, _ in curves[1]] == list(range(1, 13))
    assert len(list(out.glob("checkpoint-*"))) == 2 and not (out / "unfinished").exists()


def descendants(parent: int) -> list[tuple[int, list[str]]]:
    """Training processes below a torchrun, and their environments."""
    import psutil

    found = []
    for child in psutil.Process(parent).children():
        found.append((child.pid, [f"{k}={v}" for k, v in child.environ().items()]))
    return found


# ---- numbers, disks, data


def test_more_steps_than_epochs_by_tokens(toy_data, tmp_path):
    flags = ["--deepspeed", "none", "--max_tokens_per_gpu", "300", "--max_steps", "40", "--save_steps", "100"]
    assert run(toy_data, tmp_path, *flags).state.global_step == 40


def test_a_loss_that_is_no_number_stops(toy_data, tmp_path):
    with pytest.raises(InputError, match=r"no finite number in the last \d+ micro-batches up to step \d+.*1e\+20"):
        run(toy_data, tmp_path, *MODES["full"], "--learning_rate", "1e20", "--lr_scheduler_type", "constant",
            "--warmup_steps", "0", "--max_grad_norm", "0", "--optim", "sgd")  # fmt: skip
    for path in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


def test_a_full_disk(tmp_path, monkeypatch):
    """/dev/full fails as a full disk does."""
    folder = tmp_path / "unfinished" / "checkpoint-3"
    folder.mkdir(parents=True)
    for write in (
        lambda: open("/dev/full", "wb").write(b"x" * 10**6),
        lambda: torch.save(torch.ones(10**6), "/dev/full"),
    ):
        with pytest.raises(InputError, match="disk is full.*--resume_from_checkpoint auto"):
            with checkpoints.naming_full_disk(folder):
                write()
    assert not folder.exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="disk is full"):
        with checkpoints.naming_full_disk(Path("unfinished/checkpoint-3")):
            torch.save(torch.ones(10**6), "/dev/full")
    with pytest.raises(RuntimeError, match="something else"), checkpoints.naming_full_disk(folder):
        raise RuntimeError("something else")


def test_no_room_for_checkpoints_is_said_at_the_start(toy_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="has 0.0 GiB of room, and needs about"):
        run(toy_data, tmp_path, *MODES["full"])


@pytest.fixture
def spoilt(toy_data, tmp_path):
    """The toy data with one image cut off in its pixels, and one that is none."""
    folder = tmp_path / "spoilt"
    shutil.copytree(toy_data, folder)
    images = sorted((folder / "images" / "train").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:-30])
    images[5].write_bytes(b"no image")
    return folder, images[0].name, images[5].name


def test_bad_images_stop_or_are_left_out(spoilt, tmp_path, capfd):
    folder, first, second = spoilt
    with pytest.raises(InputError, match=re.escape(second)):
        run(folder, tmp_path / "a", *MODES["full"])
    run(folder, tmp_path / "b", *MODES["full"], "--on_bad_example", "skip")
    output = capfd.readouterr().out
    assert "2 examples were left out" in output and first in output and second in output


def test_data_are_checked(spoilt, tmp_path, capfd, toy_data):
    folder, first, second = spoilt
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "a", "--check_data")
    assert first in str(error.value) and second in str(error.value)
    assert run(toy_data, tmp_path / "a", "--check_data") is None
    assert "training data: 24 examples" in capfd.readouterr().out and not (tmp_path / "a").exists()


def test_too_long_examples(toy_data, tmp_path):
    with pytest.raises(InputError, match=r"example train-\d+ has \d+ tokens, more than --max_length 60: shorten it"):
        run(toy_data, tmp_path / "a", *MODES["full"], "--max_length", "60")
    with pytest.raises(InputError, match="an image would be cut|nothing would be left of its answer"):
        run(toy_data, tmp_path / "a", *MODES["full"], "--max_length", "20", "--truncate")


def test_pickled_weights_are_not_loaded(toy_data, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        run(toy_data, tmp_path / "a", *MODES["full"], "--model_name_or_path", folder)
