"""A run deletes, moves and overwrites only what a run has written, and what it does survives being killed."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_folders import BESIDE_A_RUN, IN_THE_WAY, OWN, put
from helpers import ROOT, SHORT, arguments, copy_up_to_checkpoint, train

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import checkpoints, output_folder, own_files
from phi3v.training.folder_lock import unlock_folder


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by its path; links and pipes have no content here."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_a_run_would_overwrite_is_refused_in_one_line(name, toy_data, tmp_path):
    make, flags, named = IN_THE_WAY[name]
    make(tmp_path / "out")
    before = content_of(tmp_path)
    resume = [] if "--evaluate_only" in flags or "--dry_run" in flags else ["--resume_from_checkpoint", "auto"]
    with pytest.raises(InputError) as error:
        script.main(arguments(toy_data, tmp_path / "out", *resume, *flags.split()))
    said = f"--output_dir {tmp_path / 'out'} holds "
    assert str(error.value).startswith(said) and named.split("/")[0] in str(error.value)
    assert "which no run of these scripts has written" in str(error.value) and "\n" not in str(error.value)
    unlock_folder()
    assert content_of(tmp_path) == before


def test_this_repository_is_no_output_folder(toy_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="--output_dir . holds README.md, which no run of these scripts has written"):
        script.main(arguments(toy_data, "."))


def test_other_files_in_the_output_folder_are_left_alone(toy_data, tmp_path):
    out = tmp_path / "out"
    linked = put(tmp_path / "linked.txt")
    for name in BESIDE_A_RUN:
        put(out / name)
    (out / "report.html.partial").unlink()
    (out / "report.html.partial").symlink_to(linked)
    before = content_of(out)
    flags = [*SHORT, "--no_eval_before", "--save_steps", "1", "--save_total_limit", "1", "--max_eval_samples", "2"]
    trainer = train(toy_data, out, *flags)
    assert trainer.args.save_total_limit == 1 and linked.read_text() == OWN
    assert {name: content for name, content in content_of(out).items() if name in before} == before
    assert [path.name for path in out.glob("checkpoint-*") if path.name != "checkpoint-notes"] == ["checkpoint-2"]


@pytest.mark.parametrize("flag", ["--estimate", "--check_data"])
def test_estimates_and_checks_of_data_write_nothing(flag, toy_data, tmp_path):
    put(tmp_path / "out" / "dry_run" / "thesis.txt")
    before = content_of(tmp_path)
    assert train(toy_data, tmp_path / "out", *SHORT, "--dry_run", flag) is None
    assert train(toy_data, tmp_path / "new", *SHORT, "--dry_run", flag) is None
    assert content_of(tmp_path) == before


def test_a_dry_run_clears_what_one_that_was_killed_has_left(tmp_path):
    left = tmp_path / "dry_run"
    own_files.claim(left)
    put(left / "model.safetensors")
    put(left / "checkpoint-1" / "config.json", '{"model_type": "phi3_v"}')
    assert own_files.is_own_folder(left)
    own_files.delete_own(left)
    assert not left.exists()


# ---- Folders that runs have written, also those of earlier versions


def test_a_run_knows_what_it_has_written(saved_run, finished_run):
    for folder in (saved_run("full"), saved_run("separators"), saved_run("whole vision"), finished_run("full")):
        assert own_files.has_record(folder) and own_files.strangers(folder) == []
        for path in folder.iterdir():
            known = own_files.is_checkpoint(path) if path.is_dir() else own_files.is_own_file(path, True)
            assert known, path
    assert own_files.is_own_file(finished_run("full") / "README.md", False)
    assert own_files.is_own_file(finished_run("full") / "report.html", False)
    assert own_files.is_own_file(finished_run("full") / "eval_after.json", False)
    assert not own_files.is_own_file(finished_run("full") / "model.safetensors", False)


def test_checkpoints_of_801afc1_are_known():
    for mode in ("full", "lora"):
        checkpoint = ROOT / "tests" / "golden" / "checkpoint_801afc1" / mode / "checkpoint-2"
        assert own_files.is_checkpoint(checkpoint) and own_files.strangers(checkpoint) == []


def test_what_version_801afc1_was_writing_when_it_was_killed_is_known(finished_run, tmp_path):
    for name in ("checkpoint-4", "best", "replaced-best"):
        shutil.copytree(finished_run("full") / "checkpoint-4", tmp_path / "unfinished" / name)
        (tmp_path / "unfinished" / name / "complete.json").unlink()
    checkpoints.clear_unfinished(tmp_path)
    assert not (tmp_path / "unfinished").exists()


def test_half_written_files_of_a_run_are_its_own(finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 2)
    put(out / "config.json", '{"model_ty')
    put(out / "model.safetensors", "half")
    names = {"README.md", "report.html", "config.json", "model.safetensors"}
    assert all(own_files.is_own_file(out / name, own_files.has_record(out)) for name in names)
    put(out / "config.json", '{"model_type": "llama"}')
    assert not own_files.is_own_file(out / "config.json", True)


# ---- What is set aside or deleted


def test_notes_in_a_checkpoint_keep_it(finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 6)
    notes = put(out / "checkpoint-2" / "notes.txt")
    (out / "checkpoint-4").rename(tmp_path / "elsewhere")
    (out / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    for step in (6, 8):
        shutil.copytree(finished_run("full") / f"checkpoint-{step}", out / "unfinished" / f"checkpoint-{step}")
        checkpoints.publish(out / "unfinished" / f"checkpoint-{step}", {}, keep=1)
    assert notes.read_text() == OWN and (tmp_path / "elsewhere" / "optimizer.pt").is_file()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-8"}
    said = capsys.readouterr().out
    assert said.count("checkpoint-2 is kept, because no run has written notes.txt") == 1


def test_a_folder_with_the_name_of_an_abandoned_checkpoint_stays(finished_run, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("full"), out, 8)
    users = put(out / "abandoned-checkpoint-6" / "thesis.txt")
    shutil.copytree(out / "checkpoint-2", out / "abandoned-checkpoint-8")  # of a run: it is replaced
    output_folder.set_aside_later(out, 4)
    assert users.read_text() == OWN and own_files.is_checkpoint(out / "abandoned-2-checkpoint-6")
    assert checkpoints.step_of(out / "abandoned-2-checkpoint-6") == 6
    state = json.loads((out / "abandoned-checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8 and not (out / "abandoned-2-checkpoint-8").exists()


def test_a_best_model_with_notes_of_the_user_is_not_deleted(toy_data, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--eval_steps", "1", "--keep_best", "--max_eval_samples", "2"]
    trainer = train(toy_data, tmp_path, *flags)
    notes = put(tmp_path / "best" / "notes.txt")
    trainer.save_if_best({"metric": "accuracy", "accuracy": 2.0, "num_examples": 2, "predictions": []})
    assert not notes.exists() and (tmp_path / "abandoned-best" / "notes.txt").read_text() == OWN
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text())["accuracy"] == 2.0


@pytest.mark.parametrize("content", ["[1]", "{}", '{"step": "x", "num_examples": 2}', "[" * 100_000])
def test_a_best_folder_with_another_evaluation_is_not_of_a_run(content, tmp_path):
    put(tmp_path / "best" / "evaluation.json", content)
    assert not own_files.is_best(tmp_path / "best")
    output_folder.set_aside_later(tmp_path, 0)
    output_folder.set_aside_results(tmp_path)
    assert (tmp_path / "best" / "evaluation.json").read_text() == content


# ---- Killed between two steps


class Killed(BaseException):
    pass


def killed_after(monkeypatch, number: int):
    """The process dies before its change of the file system number `number`, counted from 0."""
    count = 0

    def dying(change):
        def changed(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return change(*args, **kwargs)

        return changed

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir"), (Path, "touch"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


def publish_again(out: Path):
    checkpoints.publish(out / "unfinished" / "checkpoint-4", {}, keep=1)


def start_anew(out: Path):
    output_folder.set_aside_results(out)
    checkpoints.clear_unfinished(out)


@pytest.mark.parametrize("change", [publish_again, start_anew, lambda out: output_folder.set_aside_later(out, 2)])
def test_a_run_that_is_killed_between_two_steps_can_start_again(change, finished_run, tmp_path):
    number, done = 0, False
    args = SimpleNamespace(dry_run=False, evaluate_only=False, use_lora=False, keep_best=True)
    while not done:
        out = tmp_path / f"{number}"
        copy_up_to_checkpoint(finished_run("full"), out, 4)
        shutil.copy(finished_run("full") / "model.safetensors", out)
        shutil.copytree(out / "checkpoint-4", out / "unfinished" / "checkpoint-4")
        own_files.claim(out / "unfinished" / "checkpoint-4")
        put(out / "unfinished" / "thesis.txt")
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, number)
            try:
                change(out)
                done = True
            except Killed:
                pass
        output_folder.check_output(out, args, "none")
        checkpoints.clear_unfinished(out)
        assert [path.name for path in (out / "unfinished").iterdir()] == ["thesis.txt"]
        assert checkpoints.newest_whole(out)
        weights = [path for path in out.rglob("model.safetensors") if "checkpoint" not in str(path.parent.name)]
        assert len(weights) == 1
        shutil.rmtree(out)
        number += 1
    assert number > 1


def test_files_of_the_system_do_not_make_a_folder_foreign(tmp_path, monkeypatch):
    folder = tmp_path / "unfinished" / "checkpoint-5"
    for name in (own_files.MARK, ".nfs000000000a1b0001", ".DS_Store"):
        put(folder / name)
    assert own_files.is_own_folder(folder)
    unlink = Path.unlink

    def busy(path, **options):
        if path.name.startswith(".nfs"):
            raise OSError("Device or resource busy")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", busy)
    own_files.delete_own(folder)
    assert [path.name for path in folder.iterdir()] == [".nfs000000000a1b0001"]
