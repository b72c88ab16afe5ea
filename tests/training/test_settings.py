"""A checkpoint can only be resumed with the settings that its run's result depends on."""

import shutil
from dataclasses import dataclass, field

import pytest
from helpers import (
    CHECKPOINT,
    RESUMABLE_MODES,
    ROOT,
    SHORT,
    arguments,
    copy_up_to_checkpoint,
    digest_of_weights,
    train_resumable,
)
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import settings

CHANGES = [
    (["--learning_rate", "2e-3"], "learning_rate: 0.001 then, 0.002 now", False),
    (["--seed", "7"], "seed: 42 then, 7 now", True),
    (["--batch_size", "8"], "batch_size: 4 then, 8 now", True),
    (["--max_train_samples", "20"], "data: ", True),
    (["--loss_on", "last"], 'loss_on: "all" then, "last" now', True),
    (["--num_crops", "1"], "num_crops: 2 then, 1 now", True),
    (["--exif_rotate"], "exif_rotate: null then, true now", True),
    (["--freeze_vision_model"], "freeze_vision_model: false then, true now", False),
    (["--bf16"], "bf16: false then, true now", False),
    (["--deepspeed", str(ROOT / "ds_config" / "zero2.json")], "deepspeed: null then", False),
    (["--use_lora", "--lora_rank", "4"], "use_lora: false then, true now", False),
]


@pytest.mark.parametrize(("flags", "message", "can_go_on"), CHANGES)
def test_other_settings_are_refused(flags, message, can_go_on, toy_data, finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 8)
    resume = [*RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto", *flags]
    with pytest.raises(InputError) as error:
        train_resumable(toy_data, out, *resume)
    assert message in str(error.value)
    assert ("--resume_anyway" in str(error.value)) == can_go_on
    if "--seed" in flags:
        train_resumable(toy_data, out, *resume, "--resume_anyway")
        assert digest_of_weights(out) != digest_of_weights(finished_run("full"))
    if not can_go_on:
        with pytest.raises(InputError, match="to resume from it, "):
            train_resumable(toy_data, out, *resume, "--resume_anyway")


def test_a_base_that_has_changed_under_its_name_is_noticed(toy_data, finished_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(CHECKPOINT, base)
    assert settings.model_fingerprint(str(base)) == settings.model_fingerprint(str(CHECKPOINT))
    assert settings.model_fingerprint("someone/model") is None
    flags = [*RESUMABLE_MODES["full"], "--model_name_or_path", str(base)]
    train_resumable(toy_data, tmp_path / "out", *flags, "--max_steps", "4")
    (tmp_path / "out" / "finished.json").unlink()
    weights = {name: tensor * 1.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="model: .* then, .* now\n.*--resume_anyway"):
        train_resumable(toy_data, tmp_path / "out", *flags, "--max_steps", "4", "--resume_from_checkpoint", "auto")


def test_nodes_that_read_different_commits_are_named(monkeypatch):
    monkeypatch.setattr(settings, "gather_object", lambda own: [*own, *own, {"a/b": "222", "c/d": "333"}])
    settings.check_commits_equal_on_all_ranks({})
    with pytest.raises(
        InputError, match="processes 0 and 2 read different commits .*: a/b: 111, 222; give --model_rev"
    ):
        settings.check_commits_equal_on_all_ranks({"a/b": "111", "c/d": "333"})


def test_settings_that_do_not_affect_the_result_may_differ(toy_data, finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 8)
    flags = ["--save_steps", "3", "--save_total_limit", "2", "--logging_steps", "4", "--max_eval_samples", "3"]
    train_resumable(toy_data, out, *RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto", *flags)
    assert digest_of_weights(out) == digest_of_weights(finished_run("full"))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_evaluation_may_be_added_to_a_run_that_resumes(toy_data, tmp_path):
    flags = arguments(toy_data, tmp_path, *SHORT, "--no_eval_before", "--save_steps", "1")
    script.main(flags)
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "finished.json").unlink()
    trainer = script.main([*flags, "--resume_from_checkpoint", "auto", "--eval_steps", "1", "--keep_best"])
    assert trainer.state.global_step == 2 and (tmp_path / "best" / "model.safetensors").is_file()


@dataclass
class FlagsOfLater:
    """A script's flags in a later version, which has two flags more."""

    learning_rate: float = 1e-3
    new_number: int = 3
    new_list: list = field(default_factory=lambda: ["a"])


class NoTrainerFlags:
    world_size = 1

    def to_dict(self):
        return {}


def test_a_flag_that_a_checkpoint_does_not_know_yet_had_its_default(tmp_path):
    stored = {"learning_rate": 1e-3, "world_size": 1}

    def check(args):
        now = settings.settings_of(args, NoTrainerFlags())
        stored_then = settings.with_defaults(stored, now, args, FlagsOfLater())
        settings.check_settings(stored_then, now, tmp_path, anyway=False)

    check(FlagsOfLater())
    with pytest.raises(InputError, match="new_number: 3 then, 4 now"):
        check(FlagsOfLater(new_number=4))
    with pytest.raises(InputError, match='new_list: \\["a"\\] then, \\["b"\\] now'):
        check(FlagsOfLater(new_list=["b"]))
