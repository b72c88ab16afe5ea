"""What a run leaves can be evaluated, loaded as its card says, and followed in a tracker; and what it says before."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import COMMON, torchrun
from transformers.integrations import integration_utils

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, command_line
from phi3v.data.conversations import Size
from phi3v.errors import InputError
from phi3v.report import summary
from phi3v.training import trackers
from phi3v.training.evaluation import Evaluation
from phi3v.training.trainer import RecipeTrainer

SHORT = "--max_steps 2 --batch_size 4 --learning_rate 1e-3 --deepspeed none".split()
FAR = "--max_steps 12 --batch_size 4 --learning_rate 5e-3 --warmup_steps 0 --deepspeed none".split()  # from the base
MODES = {
    "full": [],
    "lora": ["--use_lora"],
    "separators": ["--use_lora", "--train_separators"],
    "qlora": ["--use_qlora"],
}


@pytest.fixture(scope="module")
def runs(toy_data, tmp_path_factory):
    """The folder of a short run in each mode, made when it is first asked for."""
    made = {}

    def run(mode):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp(mode)
            script.main(arguments(toy_data, made[mode], *FAR, *MODES[mode]))
        return made[mode]

    return run


def arguments(toy_data, folder, *flags):
    return ["--data_dir", str(toy_data), "--output_dir", str(folder), *COMMON, *flags]


# ---------------------------------------------------------------------------------------------------------------
# --evaluate_only


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_folder_is_evaluated_as_at_the_end_of_its_run(toy_data, runs, tmp_path, mode):
    flags = ["--model_name_or_path", str(runs(mode)), "--evaluate_only", *(["--use_qlora"] if mode == "qlora" else [])]
    assert script.main(arguments(toy_data, tmp_path, *flags)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.html", "evaluation.json"]
    reports = [tmp_path / "evaluation.json", runs(mode) / "eval_after.json", runs(mode) / "eval_before.json"]
    found, after, before = (json.loads(path.read_text()) for path in reports)
    assert found == after and found["predictions"] != before["predictions"]
    page = (tmp_path / "evaluation.html").read_text()
    assert "Before" not in page.split("<h2>Examples</h2>")[1] and "<h2>Training</h2>" not in page


def test_another_split_is_evaluated(toy_data, runs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    lines = (data / "ucf101_val.jsonl").read_text().splitlines(keepends=True)
    (data / "ucf101_mine.jsonl").write_text("".join(lines[:2]))
    flags = ["--model_name_or_path", str(runs("full")), "--evaluate_only", "--eval_split", "mine"]
    script.main(arguments(data, tmp_path / "out", *flags))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["num_examples"] == 2


def test_an_adapter_is_no_model_to_train_from(toy_data, runs, tmp_path):
    with pytest.raises(InputError, match="holds an adapter: give its base .*merge_adapter"):
        script.main(arguments(toy_data, tmp_path, "--model_name_or_path", str(runs("lora"))))


# ---------------------------------------------------------------------------------------------------------------
# --dry_run


@pytest.mark.parametrize("flags", [[], ["--use_lora", "--train_separators"]])
def test_a_dry_run_leaves_nothing_and_says_that_it_passed(toy_data, tmp_path, capsys, flags):
    script.main(arguments(toy_data, tmp_path, "--dry_run", *flags))
    assert "dry run passed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_sees_that_the_saved_model_is_another(toy_data, tmp_path, monkeypatch):
    save = RecipeTrainer.save_model

    def damaging(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        path = tmp_path / "dry_run" / "model.safetensors"
        save_file({name: torch.randn_like(x) for name, x in load_file(path).items()}, path, {"format": "pt"})

    monkeypatch.setattr(RecipeTrainer, "save_model", damaging)
    with pytest.raises(InputError, match="loaded again, the model answers otherwise"):
        script.main(arguments(toy_data, tmp_path, "--dry_run"))


# ---------------------------------------------------------------------------------------------------------------
# --keep_best


def test_the_best_model_is_kept(toy_data, tmp_path, monkeypatch):
    values, weights = iter([0.25, 0.75, 0.5, 0.75]), []
    report = Evaluation.report

    def scripted(self, model, args, **kwargs):
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return report(self, model, args, **kwargs) | {"accuracy": next(values)}

    monkeypatch.setattr(Evaluation, "report", scripted)
    flags = [*SHORT, "--max_steps", "3", "--eval_steps", "1", "--keep_best", "--no_eval_before"]
    script.main(arguments(toy_data, tmp_path, *flags))
    record = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert (record["step"], record["accuracy"]) == (2, 0.75)
    kept = Phi3VForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[1].items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in weights[2].items())


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(toy_data, tmp_path):
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


def test_a_checkpoint_of_another_folder_does_not_mix_results(toy_data, runs, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--save_steps", "1"]
    script.main(arguments(toy_data, tmp_path / "a", *flags))
    shutil.copytree(runs("lora"), tmp_path / "b")
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-1")]
    script.main(arguments(toy_data, tmp_path / "b", *flags, *resume))
    assert (tmp_path / "b" / "earlier-1" / "adapter_config.json").is_file()
    assert not (tmp_path / "b" / "adapter_config.json").exists() and (tmp_path / "b" / "model.safetensors").is_file()


def test_a_base_is_not_moved_away_by_its_own_training(toy_data, runs, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(runs("full"), folder)
    with pytest.raises(InputError, match="choose another --output_dir"):
        script.main(arguments(toy_data, folder, "--model_name_or_path", str(folder)))
    assert (folder / "model.safetensors").is_file() and not (folder / "earlier-1").exists()


def test_evaluation_may_be_added_to_a_run_that_goes_on(toy_data, tmp_path):
    flags = arguments(toy_data, tmp_path, *SHORT, "--no_eval_before", "--save_steps", "1")
    script.main(flags)
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "finished.json").unlink()
    trainer = script.main([*flags, "--resume_from_checkpoint", "auto", "--eval_steps", "1", "--keep_best"])
    assert trainer.state.global_step == 2 and (tmp_path / "best" / "model.safetensors").is_file()


def test_a_kept_model_is_evaluated_with_its_own_crops(toy_data, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--eval_steps", "1", "--keep_best", "--num_crops", "2"]
    script.main(arguments(toy_data, tmp_path / "out", *flags))
    best = ["--model_name_or_path", str(tmp_path / "out" / "best"), "--evaluate_only"]
    flags = [flag for flag in arguments(toy_data, tmp_path / "e", *best) if flag not in ("--num_crops", "4")]
    assert script.parse_arguments(flags)[0].num_crops == 2


def test_a_tracker_that_is_not_installed_is_named(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(InputError, match="--report_to: WandbCallback requires wandb"):
        script.main(arguments(toy_data, tmp_path, *SHORT, "--report_to", "wandb"))


def test_keep_best_needs_evaluations(toy_data, tmp_path):
    with pytest.raises(InputError, match="--keep_best has no effect without --eval_steps"):
        script.parse_arguments(arguments(toy_data, tmp_path, "--keep_best"))


# ---------------------------------------------------------------------------------------------------------------
# --preset

PUBLISHED = [  # as published: script, preset, what is set
    (docvqa, "full", {"learning_rate": 5e-6, "num_train_epochs": 2, "batch_size": 64, "full_train": True}),
    (docvqa, "frozen", {"learning_rate": 1e-4, "num_train_epochs": 2, "freeze_vision_model": True}),
    (docvqa, "lora", {"learning_rate": 2e-4, "lora_rank": 32, "alpha": 16, "use_lora": True, "use_qlora": False}),
    (docvqa, "qlora", {"learning_rate": 2e-4, "lora_rank": 32, "alpha": 16, "use_lora": True, "use_qlora": True}),
    (hateful_memes, "full", {"learning_rate": 5e-5, "num_train_epochs": 2, "use_lora": False}),
    (hateful_memes, "frozen", {"learning_rate": 1e-4, "num_train_epochs": 3}),
    (hateful_memes, "lora", {"learning_rate": 2e-4, "num_train_epochs": 2, "lora_rank": 128, "alpha": 256}),
    (hateful_memes, "qlora", {"learning_rate": 2e-4, "num_train_epochs": 2, "lora_rank": 128, "alpha": 256}),
    (nlvr2, "full", {"learning_rate": 1e-5, "num_train_epochs": 3}),
    (nlvr2, "frozen", {"learning_rate": 2e-5, "num_train_epochs": 2, "freeze_vision_model": True}),
]


@pytest.mark.parametrize("task, preset, wanted", PUBLISHED)
def test_a_preset_has_the_published_settings(tmp_path, task, preset, wanted):
    args, training_args = task.parse_arguments(["--output_dir", str(tmp_path), "--preset", preset])
    values = training_args.to_dict() | vars(args) | {"alpha": args.lora_alpha_ratio * args.lora_rank}
    assert {name: values[name] for name in wanted} == wanted and args.batch_size == 64
    assert (training_args.deepspeed is None) == args.use_lora


def test_flags_go_before_a_preset(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--preset", "lora", "--learning_rate", "1e-4", "--batch_size", "8"]
    args, training_args = docvqa.parse_arguments(flags)
    assert (training_args.learning_rate, args.batch_size, args.lora_rank) == (1e-4, 8, 32)


@pytest.mark.parametrize("task, preset, said", [(nlvr2, "lora", "must be full, frozen"), (script, "full", "no result")])
def test_an_unknown_preset_is_an_error(tmp_path, task, preset, said):
    with pytest.raises(InputError, match=f"--preset.*{said}"):
        task.parse_arguments(["--output_dir", str(tmp_path), "--data_dir", str(tmp_path), "--preset", preset])


# ---------------------------------------------------------------------------------------------------------------
# What is said before training


def test_a_rendered_example_shows_images_and_what_is_learned(toy_data, tmp_path, capsys):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--no_eval_before"))
    out = capsys.readouterr().out
    first = json.loads((toy_data / "ucf101_train.jsonl").read_text().splitlines()[0])
    answer = first["conversations"][-1]["assistant"]
    assert re.search(r"example train-0, \d+ tokens", out) and f"[[{answer}<|end|>" in out.replace("[[ ", "[[")
    assert "trains     615,168 of 648,768 parameters (full): language model 459,392, vision tower" in out
    assert "steps      2 of 4 examples: 1 processes x micro-batch of 1 examples x 4 accumulated" in out


def args_steps(training_args) -> int:
    return training_args.max_steps if training_args.max_steps > 0 else 40


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning_rate", "1e-3"], "--learning_rate 0.001 is high for full: 1e-06 to 0.0001 is usual"),
        (["--learning_rate", "1e-6", "--use_lora"], "--learning_rate 1e-06 is low for LoRA"),
        (["--warmup_steps", "50"], "--warmup_steps 50 is as long as the run of 40 steps"),
        (["--save_steps", "100"], "--save_steps 100 is more than the 40 steps"),
        (["--eval_steps", "90", "--keep_best"], "--keep_best sees no evaluation"),
        (["--max_steps", "10"], "10 optimizer steps are few"),
        ([], None),
    ],
)
def test_settings_known_to_go_wrong_are_doubted(toy_data, tmp_path, flags, said):
    args, training_args = script.parse_arguments(arguments(toy_data, tmp_path, "--learning_rate", "4e-5", *flags))
    found = summary.doubts(args, training_args, 4_000_000_000, [Size(10, 0, 0, 3, 0)], args_steps(training_args))
    assert [text.startswith(f"warning: {said}") for text in found] == ([True] if said else [])


def test_the_rates_of_small_models_are_not_doubted(toy_data, tmp_path):
    args, training_args = script.parse_arguments(arguments(toy_data, tmp_path, "--learning_rate", "1e-3"))
    assert summary.doubts(args, training_args, 1_000_000, [Size(10, 0, 0, 3, 0)], steps=40) == []


@pytest.mark.parametrize("task", [docvqa, hateful_memes, nlvr2, script])
def test_help_is_grouped_and_fits_80_columns(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        task.parse_arguments(["--help"])
    out = capsys.readouterr().out
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    expected = ["data", "model", "what is trained", "optimisation", "evaluation", "the run"]
    assert titles[:7] == [*expected, "the Trainer's own, most used"]
    assert max(map(len, out.splitlines())) <= 80
    described = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert len(described) == len(set(described)) > 60 and "--learning_rate" in described
    assert "--gradient_accumulation_steps" not in out


# ---------------------------------------------------------------------------------------------------------------
# The model card, trackers


@pytest.mark.parametrize("mode", ["full", "separators"])
def test_the_card_is_true_and_its_code_runs(runs, tmp_path, mode, monkeypatch):
    folder = runs(mode)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    card, after = yaml.safe_load(metadata), json.loads((folder / "eval_after.json").read_text())
    assert card["library_name"] == ("peft" if mode == "separators" else "transformers")
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": after["accuracy"]}]
    assert f"| after training | {after['accuracy']:.4f} |" in text and "| learning rate | 0.005, linear |" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40)).save("image.jpg")
    names = {}
    exec(code, names)
    loaded = names["model"]
    if mode == "full":
        wanted = load_file(folder / "model.safetensors")
    else:
        wanted = load_file(folder / "separators.safetensors")
        loaded = loaded.get_base_model()
        assert any("lora_B" in name and weight.any() for name, weight in loaded.named_parameters())
    state = loaded.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)  # bf16 in the base


def test_trackers_get_the_same_names_and_pictures(toy_data, tmp_path):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--report_to", "tensorboard", "--eval_steps", "1"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.iterdir())) == 1  # one writer, open from the first evaluation to the last
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    names = {"train/loss", "train/learning_rate", "eval/accuracy", "perf/mfu", "perf/tokens_per_second"}
    assert names <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 1, 2, 2]  # before, during and after
    assert any(tag.startswith("eval_samples/") for tag in tags["images"])


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_samples_go_to_other_trackers_as_they_take_them(tracker):
    """With a stand-in for the package: what is called, and with what. The packages themselves were tried by hand."""
    logged, pandas_frames = [], []
    package = SimpleNamespace(
        Image=lambda image, caption=None: ("image", image.size, caption),
        Table=lambda **kwargs: pandas_frames.append(kwargs) or kwargs,
        log=logged.append,
    )
    rows = [[Image.new("RGB", (4, 2)), "id", "q", "a", "b", "c", 1.0], [None, "id", "q", "a", "b", "c", 0.0]]
    columns = ["images", "id", "question", "answers", "before", "after", "score"]
    getattr(trackers, f"_to_{tracker}")(package, columns, rows)
    (content,) = logged
    if tracker == "wandb":
        assert content["eval/sample_images"] == [("image", (4, 2), "q c")]
        assert content["eval/samples"]["data"] == [row[1:] for row in rows]
    else:
        frame = content["eval/samples"]["dataframe"]
        assert list(frame.columns) == columns and frame["images"][0] == ("image", (4, 2), None)


def test_a_base_is_named(runs):
    assert str(CHECKPOINT) in (runs("lora") / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------
# Processes that were not started alike


# One rank is started otherwise; torchrun gives both the same command.
ODD_RANK = """
import os, sys
import finetune_hf_trainer_ucf101 as script

flags = sys.argv[1:]
if os.environ["RANK"] == "1":
    flags += FLAGS
script.exit_on_input_error(lambda: script.main(flags))
"""


@pytest.mark.parametrize(
    "odd, said",
    [
        (["--no_eval_before"], "processes 0 and 1 were started with other flags: no_eval_before: false, true"),
        (["--data_dir", "OTHER"], "processes 0 and 1 have different data: 24 and 20 examples"),
    ],
)
def test_ranks_that_were_started_otherwise_end_at_once(toy_data, tmp_path, odd, said):
    other = tmp_path / "other"
    shutil.copytree(toy_data, other)
    lines = (other / "ucf101_train.jsonl").read_text().splitlines(keepends=True)
    (other / "ucf101_train.jsonl").write_text("".join(lines[:20]))
    driver = tmp_path / "driver.py"
    odd = [str(other) if flag == "OTHER" else flag for flag in odd]
    driver.write_text(ODD_RANK.replace("FLAGS", repr(odd)))
    run = torchrun(driver, *arguments(toy_data, tmp_path / "out", *SHORT, "--batch_size_per_gpu", "2"))
    assert run.returncode != 0 and said in run.stderr + run.stdout, run.stderr[:3000]
    assert 'driver.py", line' not in run.stderr  # no traceback of ours


@pytest.mark.parametrize("name, value", [("MIXED_PRECISION", "bf16"), ("USE_DEEPSPEED", "true"), ("USE_FSDP", "true")])
def test_accelerates_own_settings_are_refused(toy_data, tmp_path, monkeypatch, name, value):
    monkeypatch.setitem(command_line.LAUNCHED, f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match="accelerate launch: "):
        script.parse_arguments(arguments(toy_data, tmp_path))


def test_the_progress_bar_shows_the_loss(toy_data, tmp_path, capsys):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--no_eval_before", "--no_tqdm", "false"))
    losses = re.findall(r"2/2 .*loss=(\d\S*)\]", capsys.readouterr().err)
    assert losses and float(losses[-1]) > 0
