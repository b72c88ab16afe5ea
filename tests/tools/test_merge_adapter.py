"""A saved adapter, and the model that it is merged into, answer like the trained model."""

import logging

import pytest
import torch
from helpers import CHECKPOINT, ROOT, arguments_of_mode
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.adapters import load_adapter
from phi3v.model.vision_parts import SEPARATORS
from phi3v.training.start import num_crops_of_run
from tools import merge_adapter as merge_tool


@pytest.fixture(scope="module", params=["lora", "dora", "qlora", "lora, whole vision"])
def trained(request, toy_data, tmp_path_factory):
    """A mode, the output folder of a short run, and the trainer."""
    out = tmp_path_factory.mktemp(request.param)
    steps = ["--max_steps", "3", "--learning_rate", "0.002", "--batch_size_per_gpu", "4", "--no_eval_before"]
    return request.param, out, script.main([*arguments_of_mode(request.param, toy_data, out), *steps])


def logits(model, batch, dtype=torch.float64):
    """The logits of the real tokens, in double precision: with logits around 25, fp32 alone causes errors of 2e-5."""
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    inputs.pop("labels")
    with torch.no_grad():
        return model.eval()(**inputs).logits[batch["attention_mask"].bool()]


def base():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def test_an_adapter_holds_no_base_weights(trained):
    mode, out, trainer = trained
    saved = load_file(out / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert not any(".encoder.layers.2." in name for name in saved)
    assert trainer.model.peft_config["default"].task_type == "CAUSAL_LM"
    assert not (out / "model.safetensors").exists()
    assert (out / "separators.safetensors").exists() == (mode == "dora")
    assert (out / "vision.safetensors").exists() == ("whole" in mode)


def test_a_saved_adapter_is_the_trained_model(trained, toy_batch):
    mode, out, trainer = trained
    found = logits(load_adapter(base(), out).double(), toy_batch)
    assert (found - logits(base().double(), toy_batch)).abs().max() > 0.1
    if mode != "qlora":  # which was trained on another base: see below
        torch.testing.assert_close(found.float(), logits(trainer.model, toy_batch, torch.float32), rtol=0, atol=1e-4)


def test_merging(trained, toy_batch, tmp_path):
    mode, out, _ = trained
    merge_tool.main([str(out), str(tmp_path), "--dtype", "fp32"])
    merged, info = Phi3VForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = logits(load_adapter(base(), out).double(), toy_batch)
    torch.testing.assert_close(logits(merged.double(), toy_batch), expected, rtol=0, atol=1e-5)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(CHECKPOINT / "model.safetensors").keys() and set(SEPARATORS) <= names
    assert Phi3VProcessor.from_pretrained(tmp_path).image_processor.num_crops == 4
    assert num_crops_of_run(tmp_path) == 4  # so that it is evaluated with them


@pytest.mark.parametrize("trained", ["qlora"], indirect=True)
def test_merging_into_the_rounded_base_gives_the_model_that_qlora_trained(
    trained, toy_batch, tmp_path, caplog, monkeypatch
):
    _, out, trainer = trained
    # A notice of this logger would stand between the tool's bars; transformers keeps it from pytest's own handler.
    monkeypatch.setattr(logging.getLogger("transformers.integrations.bitsandbytes"), "handlers", [caplog.handler])
    merge_tool.main([str(out), str(tmp_path), "--dtype", "fp32", "--dequantize"])
    assert caplog.messages == []
    merged = logits(Phi3VForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), toy_batch, torch.float32)
    evaluated = logits(trainer.model, toy_batch, torch.float32)
    torch.testing.assert_close(merged, evaluated, rtol=0, atol=1e-3)
    plain = logits(load_adapter(base(), out), toy_batch, torch.float32)
    assert (plain - evaluated).abs().max() > 0.1  # what rounding the base does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere", "out"], "nowhere has no adapter_config.json"), (["ADAPTER", "."], ". is not empty")],
)
def test_merging_what_cannot_be_merged(arguments, message, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(merge_tool.InputError, match=message):
        merge_tool.main([str(trained[1]) if a == "ADAPTER" else a for a in arguments])


def test_a_folder_that_can_not_be_made(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(merge_tool.InputError, match="file/merged can't be written .*Not a directory"):
        merge_tool.main([str(trained[1]), str(tmp_path / "file" / "merged")])
