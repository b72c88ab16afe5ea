"""Loading refuses a base model that lacks weights or has only pickled ones, and finds the base of an adapter."""

import json
import shutil

import pytest
import torch
from helpers import CHECKPOINT, RESUMABLE_MODES, train_losses, train_resumable
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model import loading
from phi3v.model.adapters import add_adapter


def test_a_model_that_lacks_something_is_refused(toy_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.vision_embed_tokens.img_projection.0.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})

    def fails(message):
        with pytest.raises(InputError, match=message):
            train_losses(toy_data, tmp_path / "out", "--deepspeed", "none", "--model_name_or_path", str(broken))

    fails("lacks the weights model.vision_embed_tokens.img_projection.0.weight")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails("model.safetensors can't be read as safetensors")
    shutil.copy(CHECKPOINT / "model.safetensors", broken)
    (broken / "tokenizer.json").unlink()
    fails("its tokenizer can't be read")
    (broken / "config.json").write_text('{"model_type": "phi3"}')
    fails("holds a model of type phi3, must be phi3_v")


def test_pickled_weights_are_not_loaded(toy_data, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        train_resumable(toy_data, tmp_path / "a", *RESUMABLE_MODES["full"], "--model_name_or_path", folder)


@pytest.mark.parametrize("name", ["Phi-3.5-vision-instruct", "Phi-3-vision-128k-instruct"])
def test_both_published_checkpoints_train_and_keep_their_config(name, hub_repositories, toy_data, tmp_path):
    source = hub_repositories / "models" / "microsoft" / name
    flags = [*RESUMABLE_MODES["full"], "--model_name_or_path", source, "--max_steps", "1"]
    trainer = train_resumable(toy_data, tmp_path, *flags)
    assert type(trainer.model) is Phi3VForCausalLM and trainer.state.global_step == 1
    # Phi-3-vision's repository has no processor_config.json, and 16 crops in its preprocessor_config.json.
    assert Phi3VProcessor.from_pretrained(source).image_processor.num_crops == (4 if "3.5" in name else 16)
    config, saved = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path))
    own = {
        "_name_or_path",
        "_attn_implementation",
        "eos_token_id",
        "auto_map",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "vision_config",
    }
    for key in config.keys() - own:
        assert saved[key] == config[key], key
    names = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert load_file(tmp_path / "model.safetensors").keys() == names


def test_weights_that_are_missing_are_named():
    loading.check_complete({"missing_keys": []}, "folder")
    with pytest.raises(InputError, match="^folder lacks the weights a, b, c and 2 more: "):
        loading.check_complete({"missing_keys": ["e", "d", "c", "b", "a"]}, "folder")


def test_the_base_of_an_adapter_is_the_one_that_it_names(tmp_path):
    assert loading.base_and_adapter("someone/model") == ("someone/model", None, None)
    assert loading.base_and_adapter(str(tmp_path)) == (str(tmp_path), None, None)
    config = tmp_path / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "someone/base"}')
    assert loading.base_and_adapter(tmp_path) == ("someone/base", None, tmp_path)
    config.write_text('{"base_model_name_or_path": "someone/base", "revision": "abc"}')
    assert loading.base_and_adapter(tmp_path) == ("someone/base", "abc", tmp_path)
    for content in ("{}", "[]", "{", '{"base_model_name_or_path": null}'):
        config.write_text(content)
        message = "is not valid JSON" if content == "{" else "does not name a base_model_name_or_path"
        with pytest.raises(InputError, match=message):
            loading.base_and_adapter(str(tmp_path))


def test_a_relative_base_is_looked_for_from_here_and_from_the_adapter(tmp_path, monkeypatch):
    adapter, elsewhere = tmp_path / "out" / "adapter", tmp_path / "elsewhere"
    for folder in (adapter / "models" / "base", elsewhere / "models" / "base"):
        folder.mkdir(parents=True)
    config = adapter / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "models/base"}')
    monkeypatch.chdir(tmp_path)
    assert loading.base_and_adapter(adapter)[0] == str(adapter / "models/base")
    monkeypatch.chdir(elsewhere)
    assert loading.base_and_adapter(adapter)[0] == "models/base"
    config.write_text('{"base_model_name_or_path": "../gone/base"}')
    monkeypatch.setattr("phi3v.hub._fetch", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match="can't be loaded"):
        loading.find_saved(str(adapter))


def test_an_adapter_names_its_base_by_an_absolute_path(monkeypatch):
    monkeypatch.chdir(CHECKPOINT.parent)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT.name)
    config = add_adapter(model, LoraConfig(target_modules=["lm_head"])).peft_config["default"]
    assert config.base_model_name_or_path == str(CHECKPOINT)
    model.name_or_path = "owner/name"
    config = add_adapter(model, LoraConfig(target_modules=["lm_head"])).peft_config["default"]
    assert config.base_model_name_or_path == "owner/name"


@pytest.mark.parametrize("quantize_vision", [False, True])
def test_the_output_layer_stays_in_half_precision_and_the_vision_part_too_unless_asked_for(quantize_vision):
    config = loading.nf4_config(torch.bfloat16, quantize_vision)
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    skipped = ["lm_head"] if quantize_vision else ["lm_head", ".*vision_embed_tokens"]
    assert config.llm_int8_skip_modules == skipped
