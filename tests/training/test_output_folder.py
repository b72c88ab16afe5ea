"""An output folder holds the results of one run: what an earlier run left there is set aside or kept."""

import json
import shutil
from types import SimpleNamespace

import pytest
from bad_folders import change_json
from helpers import RESUMABLE_MODES, SHORT, arguments, copy_up_to_checkpoint, digest_of_weights, train_resumable

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import output_folder
from phi3v.training.folder_lock import unlock_folder


def test_a_finished_run_is_left_as_it_is(toy_data, finished_run, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished_run("full").rglob("*")}
    assert (
        train_resumable(toy_data, finished_run("full"), *RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto")
        is None
    )
    assert "finished run" in capfd.readouterr().out
    unlock_folder()
    assert {path: path.stat().st_mtime_ns for path in finished_run("full").rglob("*")} == before


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(toy_data, finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 10)
    flags = ["--resume_from_checkpoint", out / "checkpoint-4", "--max_steps", "6", "--save_total_limit", "1"]
    train_resumable(toy_data, out, *RESUMABLE_MODES["full"], *flags, "--resume_anyway")
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6"}
    assert {path.name for path in out.glob("abandoned-*")} == {f"abandoned-checkpoint-{n}" for n in (6, 8, 10)}


def test_a_checkpoint_that_was_set_aside_can_be_resumed_from(toy_data, finished_run, tmp_path, capfd):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 10)
    (out / "checkpoint-8").rename(out / "abandoned-checkpoint-8")
    flags = ["--resume_from_checkpoint", out / "abandoned-checkpoint-8", "--max_steps", "9"]
    trainer = train_resumable(toy_data, out, *RESUMABLE_MODES["full"], *flags, "--resume_anyway")
    assert trainer.state.global_step == 9 and "resuming from" in capfd.readouterr().out


def test_no_room_for_checkpoints_is_said_at_the_start(toy_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="has 0.0 GiB of room, and needs about"):
        train_resumable(toy_data, tmp_path, *RESUMABLE_MODES["full"])


@pytest.mark.parametrize(
    "flags, kept",
    [
        ({"save_total_limit": 10**9, "save_steps": 5}, 3),
        ({"save_total_limit": 10**9, "save_steps": 0.1}, 8),
        ({"save_total_limit": 2, "save_steps": 5}, 2),
        ({"save_total_limit": None, "save_steps": 5}, 1),
        ({"save_total_limit": 3, "save_steps": 500}, 1),
        ({"save_total_limit": 3, "save_strategy": "no"}, 0),
    ],
)
def test_room_is_needed_only_for_checkpoints_that_will_be(flags, kept):
    training_args = SimpleNamespace(**{"save_strategy": "steps", "save_steps": 500} | flags)
    assert output_folder.checkpoints_kept(training_args, 15) == kept


def test_a_finished_run_with_odd_settings_is_said(toy_data, finished_run, tmp_path):
    shutil.copytree(finished_run("full"), tmp_path / "out")
    change_json(tmp_path / "out" / "finished.json", data_commits="x")
    flags = [*RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto"]
    with pytest.raises(InputError, match='finished.json holds settings whose data_commits is "x": delete it'):
        train_resumable(toy_data, tmp_path / "out", *flags)


def test_results_of_an_earlier_run_are_set_aside(toy_data, tmp_path):
    flags = [*SHORT, "--no_eval_before"]
    script.main(arguments(toy_data, tmp_path, *flags, "--use_lora", "--train_separators"))
    best = tmp_path / "best"
    best.mkdir()
    (best / "evaluation.json").write_text('{"step": 1, "anls": 0.9, "num_examples": 6}')
    (tmp_path / "mine.txt").write_text("kept")
    script.main(arguments(toy_data, tmp_path, *flags, "--eval_steps", "1", "--keep_best"))
    names = {path.name for path in tmp_path.iterdir()}
    earlier = {path.name for path in (tmp_path / "earlier-1").iterdir()}
    assert {"adapter_model.safetensors", "separators.safetensors", "best", "README.md", "tokenizer.json"} <= earlier
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "separators.safetensors"}
    assert {"model.safetensors", "mine.txt"} <= names
    assert "accuracy" in json.loads((best / "evaluation.json").read_text())


def test_a_best_model_alone_is_set_aside_too(toy_data, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluation.json").write_text('{"step": 1, "anls": 0.9, "num_examples": 6}')
    script.main(arguments(toy_data, tmp_path, *SHORT, "--no_eval_before", "--eval_steps", "1", "--keep_best"))
    assert (tmp_path / "earlier-1" / "best" / "evaluation.json").is_file()
    assert "accuracy" in json.loads((tmp_path / "best" / "evaluation.json").read_text())


def test_a_checkpoint_of_another_folder_does_not_mix_results(toy_data, saved_run, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--save_steps", "1"]
    script.main(arguments(toy_data, tmp_path / "a", *flags))
    shutil.copytree(saved_run("lora"), tmp_path / "b")
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")]
    script.main(arguments(toy_data, tmp_path / "b", *flags, *resume))
    assert (tmp_path / "b" / "earlier-1" / "adapter_config.json").is_file()
    assert not (tmp_path / "b" / "adapter_config.json").exists() and (tmp_path / "b" / "model.safetensors").is_file()


def test_a_base_is_not_moved_away_by_its_own_training(toy_data, saved_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(saved_run("full"), folder)
    with pytest.raises(InputError, match="choose another --output_dir"):
        script.main(arguments(toy_data, folder, "--model_name_or_path", str(folder)))
    assert (folder / "model.safetensors").is_file() and not (folder / "earlier-1").exists()


def test_the_same_command_after_a_finished_run(toy_data, finished_run, tmp_path, capfd):
    """Its results are set aside with their checkpoints; a run that has not finished is not touched."""
    out = tmp_path / "out"
    shutil.copytree(finished_run("full"), out)
    left = {path.name for path in out.iterdir()}
    flags = [*RESUMABLE_MODES["full"], "--max_steps", "2"]
    train_resumable(toy_data, out, *flags)
    assert f"{out}: what an earlier run has left is in earlier-1 now" in capfd.readouterr().out
    train_resumable(toy_data, out, *flags, "--resume_from_checkpoint", "auto")
    assert "nothing left to do; without --resume_from_checkpoint, its results are" in capfd.readouterr().out
    assert {path.name for path in (out / "earlier-1").iterdir()} == left and "checkpoint-12" in left
    assert digest_of_weights(out / "earlier-1") == digest_of_weights(finished_run("full"))
    assert (out / "checkpoint-2").is_dir() and not (out / "checkpoint-12").exists()
    (out / "finished.json").unlink()
    with pytest.raises(InputError, match="holds checkpoints: resume with"):
        train_resumable(toy_data, out, *flags)
