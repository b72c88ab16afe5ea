"""Resuming is bit-exact, and a damaged checkpoint or a full disk is noticed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from helpers import RESUMABLE_MODES, copy_up_to_checkpoint, digest_of_weights, train_resumable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3v.errors import InputError
from phi3v.training import checkpoints
from phi3v.training.checkpoints import damage, find_checkpoint


@pytest.mark.parametrize("mode", RESUMABLE_MODES)
def test_resuming_is_bit_exact(mode, toy_data, tmp_path, finished_run, capfd):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run(mode), out, 8)
    trainer = train_resumable(toy_data, out, *RESUMABLE_MODES[mode], "--resume_from_checkpoint", "auto")
    assert f"resuming from {out}/checkpoint-8" in capfd.readouterr().out
    assert digest_of_weights(out) == digest_of_weights(finished_run(mode))
    losses = json.loads((finished_run(mode) / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    now = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert now == [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]


def test_nothing_to_resume_from_is_said(toy_data, tmp_path, capfd):
    train_resumable(
        toy_data, tmp_path, *RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto", "--max_steps", "1"
    )
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
def test_damaged_checkpoints_are_not_used(kind, finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 12)
    spoil, message = DAMAGES[kind]
    spoil(out / "checkpoint-12")
    found, messages = find_checkpoint("auto", out)
    assert found == out / "checkpoint-10" and "warning: " in messages[0] and message in messages[0]
    bad = out / ("checkpoint-99" if kind == "of another step" else "checkpoint-12")
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        find_checkpoint(str(bad), out)


def test_a_checkpoint_that_is_still_being_written_is_not_used(finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 4)
    shutil.copytree(out / "checkpoint-4", out / "unfinished" / "checkpoint-6")
    (out / "checkpoint-x").mkdir()
    (out / "checkpoint-7").write_text("no folder")
    assert find_checkpoint("auto", out)[0] == out / "checkpoint-4"


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
    """With any content of complete.json and trainer_state.json, a checkpoint is used, or not used with a reason."""
    out = tmp_path_factory.mktemp("random")
    (out / name).mkdir()
    (out / name / "complete.json").write_bytes(manifest)
    (out / name / "trainer_state.json").write_bytes(state)
    found, messages = find_checkpoint("auto", out)
    assert (found is None) == (damage(out / name) is not None or not name[11:].isdecimal()) and messages
    shutil.rmtree(out)


def test_a_checkpoint_with_deeply_nested_json_is_not_used(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "complete.json").write_text("[" * 100_000)
    assert find_checkpoint("auto", tmp_path)[0] is None


def test_loading_under_deepspeed_runs_no_code_from_the_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"ds_version": Evil()}, tmp_path / "states.pt")
    checkpoints.refuse_pickles()
    with pytest.raises(Exception, match="mkdir"):
        TorchCheckpointEngine().load(str(tmp_path / "states.pt"))
    assert not (tmp_path / "ran").exists()


def test_only_whole_earlier_checkpoints_are_deleted(finished_run, tmp_path):
    """Later checkpoints, damaged or left by an earlier training, must not push out the one just written."""
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 12)
    os.truncate(out / "checkpoint-12" / "model.safetensors", 5)
    os.truncate(out / "checkpoint-2" / "model.safetensors", 5)
    shutil.copytree(out / "checkpoint-6", out / "unfinished" / "checkpoint-6")
    checkpoints.publish(out / "unfinished" / "checkpoint-6", {}, keep=1)
    left = {path.name for path in out.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-6", "checkpoint-8", "checkpoint-10", "checkpoint-12"}
    assert damage(out / "checkpoint-6") is None and not (out / "unfinished").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    """Writing to /dev/full fails like writing to a full disk."""
    folder = tmp_path / "unfinished" / "checkpoint-3"
    folder.mkdir(parents=True)
    for write in (
        lambda: open("/dev/full", "wb").write(b"x" * 10**6),
        lambda: torch.save(torch.ones(10**6), "/dev/full"),
    ):
        with pytest.raises(InputError, match="disk is full.*--resume_from_checkpoint auto"):
            with checkpoints.disk_full_as_input_error(folder):
                write()
    assert not folder.exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="disk is full"):
        with checkpoints.disk_full_as_input_error(Path("unfinished/checkpoint-3")):
            torch.save(torch.ones(10**6), "/dev/full")
    with pytest.raises(RuntimeError, match="something else"), checkpoints.disk_full_as_input_error(folder):
        raise RuntimeError("something else")
