"""The model card describes the run correctly, and the code in it runs."""

import json
import re

import pytest
import torch
import yaml
from helpers import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file

# The model card, trackers


@pytest.mark.parametrize("mode", ["full", "separators"])
def test_the_card_is_true_and_its_code_runs(saved_run, tmp_path, mode, monkeypatch):
    folder = saved_run(mode)
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


def test_the_card_names_the_base(saved_run):
    assert str(CHECKPOINT) in (saved_run("lora") / "README.md").read_text()
