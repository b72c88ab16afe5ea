"""The commands of the README are ones that the scripts take."""

import importlib
import re
import shlex

import pytest
from helpers import CHECKPOINT, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = re.findall(r"^    .*?\b(finetune_hf_trainer_\w+)\.py (.*)$", README, re.MULTILINE)
PLACES = {"OUT": "out", "DATA": "data", "…": "", "SPLIT": "val"}


def test_there_are_commands_to_look_at():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("name, flags", COMMANDS)
def test_a_command_is_taken(name, flags, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    words = shlex.split(flags, comments=True)
    words = [PLACES.get(word, word) for word in words]
    if words[:1] == ["out"]:  # of the SLURM script, which has the output folder first
        words[:1] = ["--output_dir", "out"]
    words = [word for word in words if word]
    if "--evaluate_only" in words:
        words[words.index("out")] = str(CHECKPOINT)
    else:
        words += ["--model_name_or_path", str(CHECKPOINT)]
    if "ucf101" in name and "--data_dir" not in words:
        words += ["--data_dir", "data"]
    script.parse_arguments(words)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_a_link_leads_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:tools|tests|ds_config|demo|benchmarks)/[\w./]+\w", README)))
)
def test_a_named_file_exists(path):
    assert (ROOT / path).exists()
