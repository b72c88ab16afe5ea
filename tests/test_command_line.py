"""How the flags are parsed, and what --help shows."""

import re

import pytest
from helpers import parse_command

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as script


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
