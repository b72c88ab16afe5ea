"""The commands of the hardware guide are ones that the scripts take."""

import importlib
import shlex

import pytest
from helpers import ROOT

COMMANDS = [
    line.removesuffix("\\").strip().split("finetune_hf_trainer_")[1]
    for line in (ROOT / "benchmarks" / "hardware.md").read_text().replace("\\\n", " ").splitlines()
    if line.startswith("    ") and "finetune_hf_trainer_" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_hardware_guide(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    name, *flags = shlex.split(command)
    script = importlib.import_module(f"finetune_hf_trainer_{name.removesuffix('.py')}")
    script.parse_arguments([*flags, "--model_name_or_path", "demo/base_checkpoint", "--output_dir", str(tmp_path)])
