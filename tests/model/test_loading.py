"""A base model that lacks weights, or has only pickled ones, is refused."""

import shutil

import pytest
import torch
from helpers import CHECKPOINT, RESUMABLE_MODES, train_losses, train_resumable
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError


def test_a_model_that_lacks_something_is_refused(toy_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.vision_embed_tokens.img_projection.0.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})

    def fails(message):
        with pytest.raises(script.InputError, match=message):
            train_losses(toy_data, tmp_path / "out", "--deepspeed", "none", "--model_name_or_path", str(broken))

    fails("lacks model.vision_embed_tokens.img_projection.0.weight")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails("--model_name_or_path")
    (broken / "tokenizer.json").unlink()
    fails("--model_name_or_path")
    (broken / "config.json").write_text('{"model_type": "phi3"}')
    fails("holds a model of type phi3, must be phi3_v")


def test_pickled_weights_are_not_loaded(toy_data, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        train_resumable(toy_data, tmp_path / "a", *RESUMABLE_MODES["full"], "--model_name_or_path", folder)
