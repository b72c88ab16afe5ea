"""Other programs read saved adapters and merged models: PEFT, the Auto classes, the text-only Phi-3."""

import json
import os
import shutil
import stat

import pytest
import torch
from helpers import CHECKPOINT
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
)

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import add_adapter, continue_adapter, load_adapter
from phi3v.model.loading import outline_of
from phi3v.model.vision_parts import save_parts
from tools import merge_adapter as merge_tool

PROMPT = "<|user|>\n<|image_1|>\nWhat digit is this?<|end|>\n<|assistant|>\n"
LANGUAGE_MODEL = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
TARGETS = rf"lm_head|{LANGUAGE_MODEL}|model\.vision_embed_tokens\.(img_processor.*\.(q_proj|fc1)|img_projection\.[02])"


def base():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch():
    return Phi3VProcessor.from_pretrained(CHECKPOINT)(PROMPT, Image.effect_noise((90, 40), 90).convert("RGB"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = add_adapter(base(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    Phi3VProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    merge_tool.main([str(adapter), str(folder), "--dtype", "fp32"])
    return folder


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def test_plain_peft_on_the_auto_classes(adapter, merged, batch):
    wanted = logits(load_adapter(base(), adapter), batch)
    assert (wanted - logits(base(), batch)).abs().max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, adapter)
    torch.testing.assert_close(logits(tuned, batch), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(tuned.merge_and_unload(), batch), wanted, rtol=0, atol=1e-4)
    by_its_own_config = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    torch.testing.assert_close(logits(by_its_own_config, batch), wanted, rtol=0, atol=0)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        torch.testing.assert_close(logits(auto.from_pretrained(merged), batch), wanted, rtol=0, atol=1e-4)


def test_an_adapters_tensors_have_pefts_names_for_the_hubs_modules(adapter):
    modules = {name.removesuffix(".weight") for name in load_file(CHECKPOINT / "model.safetensors")}
    for name in load_file(adapter / "adapter_model.safetensors"):
        module, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        assert module in modules and kind in ("A.weight", "B.weight"), name


@pytest.mark.parametrize("folder", ["adapter", "merged"])
def test_processor_and_tokenizer_of_the_auto_classes(folder, batch, request):
    folder = request.getfixturevalue(folder)
    assert type(AutoProcessor.from_pretrained(folder)) is Phi3VProcessor
    ours, theirs = Phi3VProcessor.from_pretrained(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    text = "<|user|>\nA digit?<|end|>\n<|assistant|>\n"
    assert ours(text).input_ids == theirs(text).input_ids
    turns = [{"role": "user", "content": "A digit?"}]
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text


def test_transformers_own_phi3_reads_the_language_model(merged):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("vocab_size", "pad_token_id", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    saved = json.loads((merged / "config.json").read_text())
    config = Phi3Config(**{key: saved[key] for key in keys})
    stock, info = Phi3ForCausalLM.from_pretrained(merged, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("model.vision_embed_tokens.") for name in info["unexpected_keys"])
    ids = {"input_ids": torch.tensor([[1, 5, 99, 300, 42, 7]])}
    ours = logits(Phi3VForCausalLM.from_pretrained(merged), ids)
    torch.testing.assert_close(logits(stock, ids), ours, rtol=0, atol=1e-4)


def test_shards_and_their_index(merged, batch, tmp_path):
    model = Phi3VForCausalLM.from_pretrained(merged)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and {path.name for path in shards} == set(index["weight_map"].values())
    with safe_open(merged / "model.safetensors", "pt") as whole:
        assert index["weight_map"].keys() == set(whole.keys()) and whole.metadata() == {"format": "pt"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_another_user_may_read_the_weights(adapter, merged, tmp_path):
    model = add_adapter(base(), LoraConfig(r=2, target_modules=LANGUAGE_MODEL), train_separators=True)
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
        save_parts(model, tmp_path)
    finally:
        os.umask(before)
    weights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.safetensors")}
    assert weights == {"adapter_model.safetensors": 0o640, "separators.safetensors": 0o640}
    for folder, config in ((adapter, "adapter_config.json"), (merged, "config.json")):
        for path in folder.glob("*.safetensors"):
            assert path.stat().st_mode == (folder / config).stat().st_mode


# ---- Training an adapter further


def test_our_own_adapter_keeps_its_pattern_and_its_new_base(adapter, tmp_path):
    model = continue_adapter(base(), adapter, "v2")
    saved = json.loads((adapter / "adapter_config.json").read_text())
    model.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "adapter_config.json").read_text())
    assert again["target_modules"] == saved["target_modules"] == TARGETS and again["revision"] == "v2"
    assert again["base_model_name_or_path"] == str(CHECKPOINT)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_in_half_precision_is_trained_further_in_fp32(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "half")
    half = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(half, tmp_path / "half" / "adapter_model.safetensors")
    model = continue_adapter(base().bfloat16(), tmp_path / "half")
    state = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert state.keys() == half.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, half[name].float()) for name, p in state.items())


def test_without_weights_an_adapter_gets_its_layers(adapter):
    outline = outline_of(base().config)
    model = continue_adapter(outline, adapter)
    assert all(p.is_meta for p in model.parameters())
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
