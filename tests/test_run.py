"""What a script does around its training: --check_data, --evaluate_only, --dry_run, folders of earlier runs."""

import json
import re
import shutil

import pytest
import torch
from helpers import RESUMABLE_MODES, SAVED_MODES, answers_of, arguments, train_resumable
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training.trainer import RecipeTrainer


@pytest.fixture
def spoilt(toy_data, tmp_path):
    """The toy data with one image whose last bytes are missing, and one file that is not an image."""
    folder = tmp_path / "spoilt"
    shutil.copytree(toy_data, folder)
    images = sorted((folder / "images" / "train").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:-30])
    images[5].write_bytes(b"no image")
    return folder, images[0].name, images[5].name


def test_bad_images_stop_or_are_left_out(spoilt, tmp_path, capfd):
    folder, first, second = spoilt
    with pytest.raises(InputError, match=re.escape(second)):
        train_resumable(folder, tmp_path / "a", *RESUMABLE_MODES["full"])
    train_resumable(folder, tmp_path / "b", *RESUMABLE_MODES["full"], "--on_bad_example", "skip")
    output = capfd.readouterr().out
    assert "2 examples were left out" in output and first in output and second in output


def test_examples_without_their_files_are_left_out_and_reported(toy_data, tmp_path, capfd):
    """Of training and evaluation, found when annotations are read, when training decodes, and when evaluating."""
    folder = tmp_path / "spoilt"
    shutil.copytree(toy_data, folder)
    lines = {split: (folder / f"ucf101_{split}.jsonl").read_text().splitlines() for split in ("train", "val")}
    missing, broken = (
        [json.loads(lines[split][i])["conversations"][0]["images"][0] for split in lines] for i in (1, 2)
    )
    for name in missing:
        (folder / "images" / name).unlink()
    for name in broken:
        (folder / "images" / name).write_bytes(b"no image")
    lines["train"][3] = "{"
    for split, own in lines.items():
        (folder / f"ucf101_{split}.jsonl").write_text("\n".join(own) + "\n")
    flags = [*RESUMABLE_MODES["full"], "--max_eval_samples", "4"]
    with pytest.raises(InputError, match=r"ucf101_train.jsonl: 2 problems\n.*ucf101_train.jsonl:2: .* does not exist"):
        train_resumable(folder, tmp_path / "a", *flags)
    assert train_resumable(folder, tmp_path / "a", *flags, "--on_bad_example", "skip", "--check_data") is None
    output = capfd.readouterr().out
    assert "3 examples were left out" in output and "a run leaves out the examples with problems" in output
    out = tmp_path / "b"
    train_resumable(folder, out, *flags, "--on_bad_example", "skip")
    output = capfd.readouterr().out
    assert "ucf101_train.jsonl: 2 of 24 examples are left out" in output and "5 examples were left out" in output
    page = (out / "report.html").read_text()
    assert "Examples left out" in page
    assert all(name in output and name in page for name in missing + broken)
    report = json.loads((out / "eval_after.json").read_text())
    assert report["num_examples"] == 3 and [row["id"] for row in report["predictions"]] == ["val-0", "val-3", "val-4"]
    assert report["accuracy"] == sum(row["score"] for row in report["predictions"]) / 3

    flags = ["--model_name_or_path", str(out), "--evaluate_only", "--on_bad_example", "skip", "--max_eval_samples", "4"]
    script.main(arguments(folder, tmp_path / "c", *flags))
    output = capfd.readouterr().out
    assert json.loads((tmp_path / "c" / "evaluation-val.json").read_text())["num_examples"] == 3
    assert (
        "4 examples were left out" in output
        and "Examples left out" in (tmp_path / "c" / "evaluation-val.html").read_text()
    )


def test_an_evaluation_of_nothing_is_an_error(toy_data, saved_run, tmp_path):
    folder = tmp_path / "spoilt"
    shutil.copytree(toy_data, folder)
    for path in (folder / "images" / "val").iterdir():
        path.write_bytes(b"no image")
    lines = (folder / "ucf101_val.jsonl").read_text().splitlines()
    (folder / "ucf101_val.jsonl").write_text("\n".join(line for line in lines if "val/" in line) + "\n")
    flags = ["--model_name_or_path", str(saved_run("full")), "--evaluate_only", "--on_bad_example", "skip"]
    with pytest.raises(InputError, match="no example of the evaluation can be read: example .*in none of the formats"):
        script.main(arguments(folder, tmp_path / "out", *flags))


def test_images_on_both_sides_are_named(toy_data, saved_run, tmp_path, capfd):
    flags = ["--model_name_or_path", str(saved_run("full")), "--evaluate_only"]
    script.main(arguments(toy_data, tmp_path / "a", *flags))
    assert "also trained on" not in capfd.readouterr().out
    script.main(arguments(toy_data, tmp_path / "b", *flags, "--eval_split", "train"))
    assert re.search(r"warning: \d+ of the \d+ images of the evaluation are also trained on", capfd.readouterr().out)


def test_data_are_checked(spoilt, tmp_path, capfd, toy_data):
    folder, first, second = spoilt
    with pytest.raises(InputError) as error:
        train_resumable(folder, tmp_path / "a", "--check_data")
    assert first in str(error.value) and second in str(error.value)
    assert train_resumable(toy_data, tmp_path / "a", "--check_data") is None
    assert "training data: 24 examples" in capfd.readouterr().out and not (tmp_path / "a").exists()


def test_too_long_examples(toy_data, tmp_path):
    with pytest.raises(InputError, match=r"example train-\d+ has \d+ tokens, more than --max_length 60: shorten it"):
        train_resumable(toy_data, tmp_path / "a", *RESUMABLE_MODES["full"], "--max_length", "60")
    with pytest.raises(InputError, match="an image would be cut|nothing would be left of its answer"):
        train_resumable(toy_data, tmp_path / "a", *RESUMABLE_MODES["full"], "--max_length", "20", "--truncate")


# --evaluate_only


@pytest.mark.parametrize("mode", SAVED_MODES)
def test_a_saved_folder_is_evaluated_as_at_the_end_of_its_run(toy_data, saved_run, tmp_path, mode):
    flags = [
        "--model_name_or_path",
        str(saved_run(mode)),
        "--evaluate_only",
        *(["--use_qlora"] if mode == "qlora" else []),
    ]
    assert script.main(arguments(toy_data, tmp_path, *flags)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation-val.html", "evaluation-val.json"]
    reports = [
        tmp_path / "evaluation-val.json",
        saved_run(mode) / "eval_after.json",
        saved_run(mode) / "eval_before.json",
    ]
    found, after, before = map(answers_of, reports)
    assert found == after and found["predictions"] != before["predictions"]
    page = (tmp_path / "evaluation-val.html").read_text()
    assert "Before" not in page.split("<h2>Examples</h2>")[1] and "<h2>Training</h2>" not in page


def test_another_split_is_evaluated(toy_data, saved_run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    lines = (data / "ucf101_val.jsonl").read_text().splitlines(keepends=True)
    (data / "ucf101_mine.jsonl").write_text("".join(lines[:2]))
    flags = ["--model_name_or_path", str(saved_run("full")), "--evaluate_only", "--eval_split", "mine"]
    script.main(arguments(data, tmp_path / "out", *flags))
    assert json.loads((tmp_path / "out" / "evaluation-mine.json").read_text())["num_examples"] == 2


def test_evaluations_lie_beside_the_model_and_never_over_another(toy_data, saved_run, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(saved_run("full"), model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    flags = arguments(toy_data, "", "--model_name_or_path", model, "--evaluate_only", "--max_eval_samples", 1)
    del flags[flags.index("--output_dir") : flags.index("--output_dir") + 2]
    (model / "evaluation-val.html").write_text("mine")
    for crops, warns in (("4", False), ("1", True)):
        script.main([*flags, "--num_crops", crops])
        assert ("was saved with --num_crops 4 and is asked with --num_crops 1" in capsys.readouterr().out) == warns
    new = {path.name for path in model.iterdir()} - before.keys()
    assert new == {"evaluation-val.html", *(f"evaluation-val-{n}.{kind}" for n in (2, 3) for kind in ("json", "html"))}
    assert (model / "evaluation-val.html").read_text() == "mine"
    assert all((model / name).read_bytes() == content for name, content in before.items())


def test_training_from_an_adapter_is_refused(toy_data, saved_run, tmp_path):
    with pytest.raises(InputError, match="holds an adapter: give its base .*merge_adapter"):
        script.main(arguments(toy_data, tmp_path, "--model_name_or_path", str(saved_run("lora"))))


# --dry_run


@pytest.mark.parametrize("flags", [[], ["--use_lora", "--train_separators"], ["--vision_training", "projector"]])
def test_a_dry_run_leaves_nothing_and_says_that_it_passed(toy_data, tmp_path, capsys, flags):
    script.main(arguments(toy_data, tmp_path, "--dry_run", *flags))
    assert "dry run passed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_fails_if_the_saved_model_gives_other_answers(toy_data, tmp_path, monkeypatch):
    save = RecipeTrainer.save_model

    def damaging(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        path = tmp_path / "dry_run" / "model.safetensors"
        save_file({name: torch.randn_like(x) for name, x in load_file(path).items()}, path, {"format": "pt"})

    monkeypatch.setattr(RecipeTrainer, "save_model", damaging)
    with pytest.raises(InputError, match="loaded again, gives other answers"):
        script.main(arguments(toy_data, tmp_path, "--dry_run"))
