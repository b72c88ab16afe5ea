"""A merged model has the weights that PEFT gives when it merges the whole model at once, to the bit."""

import errno
import gc
import json
import weakref

import pytest
import torch
from helpers import CHECKPOINT
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model import merging, weights
from phi3v.model.adapters import add_adapter, load_adapter
from phi3v.model.loading import find_saved, load_saved, nf4_config
from phi3v.model.merging import MergedWeights
from phi3v.model.vision_parts import SEPARATORS, save_parts
from tools import merge_adapter as merge_tool

TARGETS = r"lm_head|model\.layers.*_proj|model\.vision_embed_tokens.*(q_proj|fc1|img_projection\.0)"
# How the base is saved
BASES = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "4 bits": {"dtype": torch.bfloat16, "quantization_config": nf4_config(torch.bfloat16)},
    "8 bits": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    },
}


@pytest.fixture(scope="module")
def adapter_on(tmp_path_factory):
    """adapter_on(base): the folder of an adapter with separators, whose base is saved as BASES says."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("adapter")
            base = tmp_path_factory.mktemp("base")
            device_map = {"": "cpu"} if "quantization_config" in BASES[name] else None
            whole = Phi3VForCausalLM.from_pretrained(CHECKPOINT, **BASES[name], device_map=device_map)
            for parameter in whole.parameters() if name == "fp32" else ():
                parameter.data *= 1.001  # no longer what bf16 can represent
            whole.save_pretrained(base)
            Phi3VProcessor.from_pretrained(CHECKPOINT).save_pretrained(base)
            torch.manual_seed(1)
            model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
            config = LoraConfig(r=4, target_modules=TARGETS, use_dora=name == "bf16")
            model = add_adapter(model, config, train_separators=True)
            model.peft_config["default"].base_model_name_or_path = str(base)
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name or parameter_name.endswith(SEPARATORS):
                    parameter.data += torch.randn_like(parameter) * 0.1
            model.save_pretrained(made[name])
            save_parts(model, made[name])
        return made[name]

    return get


def merged_at_once(adapter, dtype=torch.float32, quantization=None) -> Phi3VForCausalLM:
    saved = find_saved(str(adapter))
    device = "cpu" if quantization else None
    base = load_saved(saved, dtype=dtype, quantization=quantization, device=device, with_adapter=False)
    base = base.dequantize().float() if getattr(base, "is_quantized", False) else base
    return load_adapter(base, adapter).merge_and_unload()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("base", BASES)
def test_merging_layer_by_layer(base, dtype, adapter_on, tmp_path):
    adapter = adapter_on(base)
    merge_tool.main([str(adapter), str(tmp_path / "merged"), "--dtype", dtype])
    wanted = merged_at_once(adapter).to(merge_tool.DTYPES[dtype])
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == wanted.state_dict().keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in wanted.state_dict().items())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("flags", [[], ["--quantize_vision"]])
def test_merging_into_the_rounded_base(flags, adapter_on, tmp_path):
    adapter = adapter_on("fp32")
    merge_tool.main([str(adapter), str(tmp_path / "merged"), "--dequantize", *flags])
    rounded = merged_at_once(adapter, torch.bfloat16, nf4_config(torch.float32, bool(flags))).to(torch.bfloat16)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in rounded.state_dict().items())


def test_config_and_shards_are_those_of_save_pretrained(adapter_on, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_SIZE", "300KB")
    adapter = adapter_on("bf16")
    merge_tool.main([str(adapter), str(tmp_path / "merged")])
    model = merged_at_once(adapter).to(torch.bfloat16)
    merge_tool.use_own_settings(model, Phi3VProcessor.from_pretrained(CHECKPOINT))
    model.save_pretrained(tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 3
    assert all((tmp_path / "merged" / name).read_bytes() == content for name, content in files.items())
    assert not (tmp_path / "merged" / "model.safetensors").exists()


def test_one_shard_and_one_layer_are_in_memory(adapter_on, tmp_path, monkeypatch):
    """Whatever was computed for earlier shards and layers is gone, without waiting for the garbage collector."""
    monkeypatch.setattr(weights, "SHARD_SIZE", "300KB")
    merged, save_file, written, layers = MergedWeights(find_saved(str(adapter_on("bf16")))), merging.save_file, [], []
    get, merge = MergedWeights.__getitem__, MergedWeights._merge

    def note_layer(self, name):
        assert not [ref for ref in layers if ref() is not None]
        layer = merge(self, name)
        layers.append(weakref.ref(layer.weight))
        return layer

    def look(self, name):
        assert not [ref for ref in written if ref() is not None]
        return get(self, name)

    def note_shard(tensors, *args):
        save_file(tensors, *args)
        written.extend(map(weakref.ref, tensors.values()))

    monkeypatch.setattr(MergedWeights, "_merge", note_layer)
    monkeypatch.setattr(MergedWeights, "__getitem__", look)
    monkeypatch.setattr(merging, "save_file", note_shard)
    gc.disable()
    try:
        merged.save(tmp_path, torch.bfloat16)
    finally:
        gc.enable()
    assert len(written) == len(merged.outline.state_dict()) and len(layers) > 10


def test_merging_changes_nothing_that_is_read_again(adapter_on):
    """The weights of a base in fp32 are views of its file, and PEFT merges in place."""
    saved = find_saved(str(adapter_on("fp32")))
    before = (saved.base_folder / "model.safetensors").read_bytes()
    merged = MergedWeights(saved)
    once = merged["lm_head.weight"].clone()
    assert torch.equal(merged["lm_head.weight"], once)
    assert (saved.base_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("at", ["second shard", "start"])
def test_a_full_disk_leaves_nothing(at, adapter_on, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_SIZE", "300KB")
    save_file, written = merging.save_file, []

    def fail_later(*args):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(save_file(*args))

    monkeypatch.setattr(merging, "save_file", fail_later)
    if at == "start":
        monkeypatch.setattr(merging.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**20}))
    message = "has 0.0 GiB of room, the model needs" if at == "start" else "No space left on device"
    with pytest.raises(InputError, match=message):
        merge_tool.main([str(adapter_on("bf16")), str(tmp_path / "merged")])
    assert bool(written) == (at != "start") and not list(tmp_path.iterdir())
