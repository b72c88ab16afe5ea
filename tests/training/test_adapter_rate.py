"""Adapters take the rate of the published runs unless a rate is given, a preset has one, or an older run resumes."""

import json
import shutil

import pytest
from helpers import ROOT, arguments, parse_command

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training.adapter_rate import FULL_RATE

SAID = "adapters train at a learning rate of 0.0002, because --learning_rate is not given\n"


@pytest.mark.parametrize(
    "flags, rate",
    [
        ("", 4e-5),
        ("--freeze_vision_model", 4e-5),
        ("--use_lora", 2e-4),
        ("--use_qlora", 2e-4),
        ("--use_lora --learning_rate 4e-5", 4e-5),
        ("--use_lora --preset full", 5e-6),
        ("--preset lora", 2e-4),
    ],
)
def test_the_default_rate(flags, rate, tmp_path, capsys):
    _, training = parse_command(docvqa, arguments("data", tmp_path, *flags.split()))
    assert training.learning_rate == rate
    assert (SAID in capsys.readouterr().out) == (flags in ("--use_lora", "--use_qlora"))


@pytest.mark.parametrize(
    "flags, rates",
    [
        ("--use_lora", (2e-4, None, None)),
        ("--vision_training all", (4e-5, None, None)),
        ("--use_lora --vision_training all", (2e-4, 4e-5, 4e-5)),
        ("--use_qlora --vision_training tower --learning_rate 1e-4", (1e-4, 4e-5, None)),
        ("--use_lora --vision_training tower --train_separators", (2e-4, 4e-5, 4e-5)),
        ("--use_lora --vision_training projector --projector_lr 1e-3", (2e-4, None, 1e-3)),
    ],
)
def test_the_rates_of_what_trains_fully_beside_adapters(flags, rates, tmp_path, capsys):
    args, training = parse_command(docvqa, arguments("data", tmp_path, *flags.split()))
    assert (training.learning_rate, args.vision_lr, args.projector_lr) == rates
    said = "the rate of what trains fully is 4e-05, because --vision_lr" in capsys.readouterr().out
    assert said == ("use" in flags and rates[1] is not None) and docvqa.TRAINING["learning_rate"] == FULL_RATE


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(InputError, match="--vision_training is full, must be default, all, tower, projector"):
        parse_command(docvqa, arguments("data", tmp_path, "--vision_training", "full"))


def test_a_run_of_an_earlier_version_resumes_at_its_own_rate(tmp_path, capsys):
    saved = tmp_path / "checkpoint-2"
    shutil.copytree(ROOT / "tests/golden/checkpoint_801afc1/lora/checkpoint-2", saved)
    flags = arguments("data", tmp_path, "--use_lora", "--resume_from_checkpoint", "auto")
    for stored, rate in ((4e-5, 4e-5), (1e-3, 2e-4), (2e-4, 2e-4)):
        manifest = json.loads((saved / "complete.json").read_text())
        manifest["settings"]["learning_rate"] = stored
        (saved / "complete.json").write_text(json.dumps(manifest))
        assert parse_command(script, flags)[1].learning_rate == rate
        assert (SAID in capsys.readouterr().out) == (rate == 2e-4)
    shutil.rmtree(saved)
    (tmp_path / "finished.json").write_text(json.dumps(manifest["settings"] | {"learning_rate": 4e-5}))
    assert parse_command(script, flags)[1].learning_rate == 4e-5
