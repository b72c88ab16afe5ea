"""What a run prints before training: an example, what trains, and warnings."""

import json
import re

import pytest
from helpers import SHORT, arguments, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v.data.sizes import Size
from phi3v.report import summary

# What is said before training


def test_a_rendered_example_shows_images_and_what_is_learned(toy_data, tmp_path, capsys):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--no_eval_before"))
    out = capsys.readouterr().out
    first = json.loads((toy_data / "ucf101_train.jsonl").read_text().splitlines()[0])
    answer = first["conversations"][-1]["assistant"]
    assert re.search(r"example train-0, \d+ tokens", out) and f"[[{answer}<|end|>" in out.replace("[[ ", "[[")
    assert "trains     615,168 of 648,768 parameters (full): language model 459,392, vision tower" in out
    assert "steps      2 of 4 examples: 1 processes x micro-batch of 1 examples x 4 accumulated" in out
    attention = "sdpa, scaled_dot_product_attention of torch"
    assert f"attention  {attention}" in out and attention in (tmp_path / "report.html").read_text()


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
        (
            ["--eval_steps", "10", "--early_stopping_patience", "3"],
            "--early_stopping_patience 3 can't end this run early, which has 3 evaluations before its last step",
        ),
        (["--eval_steps", "9", "--early_stopping_patience", "3"], None),
        (["--vision_training", "tower"], "--vision_training tower learns nothing, because no training example has"),
        (["--vision_training", "tower", "--use_lora", "--learning_rate", "2e-4"], None),
        (["--max_steps", "10"], "10 optimizer steps are few"),
        ([], None),
    ],
)
def test_settings_that_often_go_wrong_give_a_warning(toy_data, tmp_path, flags, said):
    args, training_args = parse_command(script, arguments(toy_data, tmp_path, "--learning_rate", "4e-5", *flags))
    found = summary.questionable_settings(
        args, training_args, 4_000_000_000, [Size(10, 0, 0, 3, 0)], args_steps(training_args)
    )
    assert [text.startswith(f"warning: {said}") for text in found] == ([True] if said else [])


def test_learning_rates_of_small_models_give_no_warning(toy_data, tmp_path):
    args, training_args = parse_command(script, arguments(toy_data, tmp_path, "--learning_rate", "1e-3"))
    assert summary.questionable_settings(args, training_args, 1_000_000, [Size(10, 0, 0, 3, 0)], steps=40) == []
