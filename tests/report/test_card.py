"""The model card describes the run correctly, and the code in it runs."""

import json
import re
import sys
from types import SimpleNamespace

import markdown
import pytest
import torch
import yaml
from bad_texts import MARKDOWN
from helpers import CHECKPOINT
from html_pages import evaluation
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from phi3v.report.card import write_model_card


@pytest.mark.parametrize("mode", ["full", "separators", "whole vision"])
def test_the_card_is_true_and_its_code_runs(saved_run, tmp_path, mode, monkeypatch):
    folder = saved_run(mode)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    card, after = yaml.safe_load(metadata), json.loads((folder / "eval_after.json").read_text())
    assert card["library_name"] == ("transformers" if mode == "full" else "peft")
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
        wanted = load_file(folder / ("separators.safetensors" if mode == "separators" else "vision.safetensors"))
        loaded = loaded.get_base_model()
        assert any("lora_B" in name and weight.any() for name, weight in loaded.named_parameters())
    state = loaded.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name].float(), tensor.float(), rtol=1e-2, atol=1e-3)  # bf16 in the base


def test_the_card_names_the_base(saved_run):
    assert str(CHECKPOINT) in (saved_run("lora") / "README.md").read_text()


def card(folder, monkeypatch, name="owner/model", value="1", data="owner/data", script="finetune.py") -> str:
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [script, "--prompt", value])
    flags = {"model_name_or_path": name, "use_lora": True, "use_qlora": False, "use_dora": False, "batch_size": 4}
    flags |= {"wd": 0.0, "num_crops": 4, "lora_rank": 4, "lora_alpha_ratio": 2, "train_separators": False}
    flags |= {"vision_training": "default", "adapter": None}
    training = {"output_dir": str(folder), "learning_rate": 1e-3, "seed": 0}
    training["lr_scheduler_type"] = SimpleNamespace(value="linear")
    facts = {"data": {"training examples": "3"}, "epochs": "1", "steps": 2, "commits": {name: "0" * 40, data: value}}
    args = SimpleNamespace(**flags, freeze_vision_model=False)
    write_model_card(args, SimpleNamespace(**training), facts, evaluation([0]), evaluation([1]), "fp32")
    return (folder / "README.md").read_text(encoding="utf-8")


def form(text: str) -> list[str]:
    """The tags of a card's Markdown, and its headings."""
    html = markdown.markdown(text.split("\n---\n", 1)[1], extensions=["tables", "fenced_code"])
    return re.findall(r"<h\d>.*?</h\d>|<[^>]*>", html)


def test_commands_with_spaces_and_the_torchrun_that_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr("phi3v.launch.launcher", lambda: ["torchrun", "--nproc_per_node=8", "--log-dir", "my logs"])
    folder = tmp_path / "my out"
    text = card(folder, monkeypatch, value="two words", script="my scripts/finetune.py")
    assert (
        "\n    torchrun --nproc_per_node=8 --log-dir 'my logs' 'my scripts/finetune.py' --prompt 'two words'\n" in text
    )
    for tool, rest in (("ask", "image.jpg"), ("merge_adapter", "merged/")):
        assert f"`python tools/{tool}.py '{folder}' {rest}`" in text


@pytest.mark.parametrize("bad", MARKDOWN, ids=ascii)
def test_names_stay_in_their_place(bad, tmp_path, monkeypatch):
    good = card(tmp_path / "good", monkeypatch)
    folder = tmp_path / bad.replace("/", "-").replace("\0", "")[:200]
    text = card(folder, monkeypatch, name=bad, value=bad, data=f"{bad}/data", script="finetune.py")
    assert form(text) == form(good)
    data = ModelCard(text).data.to_dict()
    assert data.keys() == ModelCard(good).data.to_dict().keys() and "PWNED" not in str(data.get("license"))
    assert not {"\x1b", "\u2028", "\x85", "\x0c"} & set(text)
    assert len(re.findall("(?m)^---$", text)) == 2
