"""A checkpoint whose files hold something else than a run writes is not resumed from, and one line says why."""

import json
import os
import shutil

import pytest
import torch
from bad_folders import CONTENTS, SETTINGS, STATES, change_json, update_manifest
from helpers import RESUMABLE_MODES, copy_up_to_checkpoint, train_resumable
from safetensors.torch import load_file, save_file

from phi3v.errors import InputError
from phi3v.training.checkpoints import damage, find_checkpoint, refuse_pickles
from phi3v.training.resuming import check_states, problem_of_state


@pytest.fixture
def checkpoint(finished_run, tmp_path):
    copy_up_to_checkpoint(finished_run("full"), tmp_path / "out", 12)
    refuse_pickles()
    return tmp_path / "out" / "checkpoint-12"


@pytest.mark.parametrize("name", STATES)
def test_an_odd_state_is_damage(name, checkpoint):
    changes, said = STATES[name]
    change_json(checkpoint / "trainer_state.json", **changes)
    update_manifest(checkpoint)
    assert damage(checkpoint).startswith("its trainer_state.json ") and said in damage(checkpoint)
    found, messages = find_checkpoint("auto", checkpoint.parent)
    assert found.name == "checkpoint-10" and said in messages[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_odd_settings_are_damage(name, checkpoint):
    changes, said = SETTINGS[name]
    manifest = json.loads((checkpoint / "complete.json").read_text())
    changed = changes if isinstance(changes, list) else manifest["settings"] | changes
    change_json(checkpoint / "complete.json", settings=changed)
    assert damage(checkpoint).startswith("its complete.json ") and said in damage(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("with_pipe", [False, True])
def test_a_file_that_the_manifest_does_not_list_is_missed(name, with_pipe, checkpoint):
    (checkpoint / name).unlink()
    if with_pipe:
        os.mkfifo(checkpoint / name)
    update_manifest(checkpoint)
    assert damage(checkpoint) == f"its {name} is missing"


def test_pipes_are_not_waited_for(checkpoint):
    os.mkfifo(checkpoint / "adapter_config.json")
    assert damage(checkpoint) == "its adapter_config.json is not a regular file"
    (checkpoint / "complete.json").unlink()
    os.mkfifo(checkpoint / "complete.json")
    assert "its complete.json can't be read" in damage(checkpoint)
    (checkpoint.parent / "checkpoint-10" / "trainer_state.json").unlink()
    os.mkfifo(checkpoint.parent / "checkpoint-10" / "trainer_state.json")
    assert "trainer_state.json is missing" in damage(checkpoint.parent / "checkpoint-10")


@pytest.mark.parametrize("name", CONTENTS)
def test_other_contents_are_named(name, checkpoint):
    check_states(checkpoint, fp16=False)
    for content in CONTENTS[name]:
        torch.save(content, checkpoint / name)
        with pytest.raises(InputError, match=rf"{name} (does not hold what its name says|can't be resumed from)"):
            check_states(checkpoint, fp16=False)
    (checkpoint / name).write_bytes(b"\x80" * 1000)
    with pytest.raises(InputError, match=f"{name} is damaged: give another checkpoint"):
        check_states(checkpoint, fp16=False)


def test_a_state_of_loss_scaling_needs_fp16(checkpoint):
    torch.save({"scale": 1.0}, checkpoint / "scaler.pt")
    with pytest.raises(InputError, match="holds scaler.pt, which only a run with --fp16 has"):
        check_states(checkpoint, fp16=False)
    check_states(checkpoint, fp16=True)


def test_the_folder_of_deepspeed_is_that_of_the_step(checkpoint):
    (checkpoint / "latest").write_text("../checkpoint-10/global_step10")
    with pytest.raises(InputError, match="latest must name the folder global_step12"):
        check_states(checkpoint, fp16=False)
    (checkpoint / "latest").write_text("global_step12")
    check_states(checkpoint, fp16=False)
    (checkpoint / "global_step12").mkdir()
    (checkpoint / "global_step12" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="mp_rank_00_model_states.pt is damaged"):
        check_states(checkpoint, fp16=False)


def other_names(checkpoint):
    save_file({"x": torch.zeros(1)}, checkpoint / "model.safetensors", {"format": "pt"})


def other_shapes(checkpoint):
    weights = {name: tensor[:1].clone() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def other_groups(checkpoint):
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.pt")


def other_schedule(checkpoint):
    torch.save({"last_epoch": "x", "base_lrs": ["a"]}, checkpoint / "scheduler.pt")


@pytest.mark.parametrize(
    "change, said",
    [
        (other_names, "checkpoint-12 lacks the weights .* it holds weights that the model does not have, x"),
        (other_shapes, "checkpoint-12 holds .* of shape .*, must be "),
        (other_groups, "checkpoint-12 can't be resumed from .*parameter groups"),
        (other_schedule, "checkpoint-12 can't be resumed from"),
    ],
)
def test_what_does_not_fit_the_model_is_named(change, said, checkpoint, toy_data):
    change(checkpoint)
    update_manifest(checkpoint)
    flags = [*RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto", "--max_steps", "13", "--resume_anyway"]
    with pytest.raises(InputError, match=said) as error:
        train_resumable(toy_data, checkpoint.parent, *flags)
    assert "\n" not in str(error.value)


def test_an_adapter_of_other_names_is_not_resumed_from(finished_run, toy_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished_run("lora"), out)
    (out / "finished.json").unlink()
    weights = load_file(out / "checkpoint-12" / "adapter_model.safetensors")
    save_file({"x" + name: tensor for name, tensor in weights.items()}, out / "checkpoint-12/adapter_model.safetensors")
    update_manifest(out / "checkpoint-12")
    flags = [*RESUMABLE_MODES["lora"], "--resume_from_checkpoint", "auto", "--max_steps", "13", "--resume_anyway"]
    with pytest.raises(InputError, match="checkpoint-12/.* names of an adapter's weights start with"):
        train_resumable(toy_data, out, *flags)


def test_the_states_of_runs_pass(finished_run):
    for mode in ("full", "lora"):
        for folder in finished_run(mode).glob("checkpoint-*"):
            assert damage(folder) is None
            check_states(folder, fp16=False)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert problem_of_state(state, state["global_step"]) is None
    assert problem_of_state(state | {"log_history": [{"step": 1, "loss": float("nan")}]}, state["global_step"]) is None
