"""How the flags are parsed, and what --help shows."""

import re

import pytest
from helpers import parse_command

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as script
from phi3v.command_line import OTHER_NAMES
from phi3v.errors import InputError


@pytest.mark.parametrize("task", [docvqa, hateful_memes, nlvr2, script])
def test_help_is_grouped_and_fits_80_columns(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_command(task, ["--help"])
    out = capsys.readouterr().out
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    expected = ["data", "model", "what is trained", "optimisation", "evaluation", "the run"]
    assert titles[:7] == [*expected, "the Trainer's most used flags"]
    assert max(map(len, out.splitlines())) <= 80
    described = re.findall(r"^  (--\w+)", out, re.MULTILINE)
    assert len(described) == len(set(described)) > 60 and "--learning_rate" in described
    assert "--gradient_accumulation_steps" not in out


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--lr 1e-3", "--learning_rate"),
        ("--datadir data", "--data_dir"),  # in a script that needs it
        ("--epochs 3", "--num_train_epochs"),
        ("--batchsize 4", "--batch_size"),
        ("--batch-sise=4", "--batch_size"),
        ("--save_step 4", "--save_steps"),
        ("--adam_beta_1 0.9", "--adam_beta1"),  # --help only lists it
        ("--no_evalbefore", "--no_eval_before"),
        ("--nosuch --lora_r 4 --lr 1", "--lora_rank, --learning_rate"),
        ("--max_new_token 3", "--max_new_tokens"),
        ("--foo_bar_baz", None),
        ("--gradient_accumulation_step 4", None),  # the flag of this name is refused
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_was_meant(given, meant):
    with pytest.raises(InputError) as error:
        parse_command(script, given.split())
    assert str(error.value).endswith(f" (did you mean {meant}? see --help)" if meant else " (see --help)")


def test_names_of_other_programs_are_unknown_here_and_their_names_here_are_known(capsys):
    with pytest.raises(SystemExit):
        parse_command(script, ["--help"])
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert set(OTHER_NAMES.values()) - {"data_dir"} <= known and not OTHER_NAMES.keys() & known
