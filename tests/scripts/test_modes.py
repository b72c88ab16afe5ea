"""What trains in each mode: every parameter that should gets a gradient, and nothing else moves."""

import pytest
import torch
from conftest import CHECKPOINT, ROOT
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import Collator, ConversationDataset
from phi3v.model.adapters import SEPARATORS, load_adapter
from phi3v.model.modeling_phi3v import Phi3VImageEmbedding
from tools import merge_adapter as merge_tool

MODES = {
    "full": "",
    "frozen": "--freeze_vision_model",
    "frozen, projector trains": "--freeze_vision_model --train_projector",
    "lora": "--use_lora --lora_rank 4",
    "lora, frozen": "--use_lora --lora_rank 4 --freeze_vision_model",
    "dora": "--use_lora --lora_rank 4 --use_dora --train_separators",
    "qlora": "--use_qlora --lora_rank 4",
    "qlora, all in 4 bits": "--use_qlora --lora_rank 4 --quantize_vision",
}
COMMON = ["--model_name_or_path", str(CHECKPOINT), "--num_crops", "4", "--no-tqdm", "--dataloader_num_workers", "0"]
COMMON += ["--deepspeed", "none", "--max_new_tokens", "4", "--max_eval_samples", "2"]


def flags_of(mode, toy_data, out):
    return ["--data_dir", str(toy_data), "--output_dir", str(out), *COMMON, *MODES[mode].split()]


@pytest.fixture(scope="module")
def batch(toy_data):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    data = ConversationDataset(read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images"), processor)
    return Collator(processor, "right")([data[i] for i in (1, 2, 3, 5)])


def should_train(mode, name):
    """By name alone, written down independently of the scripts."""
    tower, vision = "img_processor" in name, "vision_embed_tokens" in name
    if tower and ("encoder.layers.2." in name or "post_layernorm" in name):
        return False  # the last of three layers, and what follows it, is never run
    if "lora" in MODES[mode]:
        if "train_separators" in MODES[mode] and name.endswith(("sub_GN", "glb_GN")):
            return True
        return ("lora_" in name) and not (vision and "freeze" in MODES[mode])
    if vision and "freeze" in MODES[mode]:
        return "img_projection" in name and "train_projector" in MODES[mode]
    return True


def gradients(mode, checkpointing, batch, toy_data, out, use_reentrant=False):
    """The model of a mode after one backward pass."""
    args, training_args = script.parse_arguments(flags_of(mode, toy_data, out))
    model = script.load_model(args, training_args).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide lora_A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch).loss.backward()
    return model


def without_gradient(mode, model):
    """Names of parameters that should train, and get no gradient."""
    return [
        name
        for name, p in model.named_parameters()
        # A key bias moves all scores of a query alike, so that its exact gradient is zero.
        if should_train(mode, name) and not name.endswith("k_proj.bias") and (p.grad is None or not p.grad.any())
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_parameter_gets_a_gradient(mode, checkpointing, batch, toy_data, tmp_path):
    model = gradients(mode, checkpointing, batch, toy_data, tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == should_train(mode, name), name
        assert parameter.requires_grad or parameter.grad is None, name
    assert not without_gradient(mode, model)


def test_reentrant_checkpointing_would_be_noticed(batch, toy_data, tmp_path):
    model = gradients("lora", True, batch, toy_data, tmp_path, use_reentrant=True)
    missing = without_gradient("lora", model)
    assert missing and all("img_processor" in name for name in missing)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_else_moves(mode, checkpointing, toy_data, tmp_path):
    """Two real steps with weight decay. Frozen parameters stay as they are, to the bit; the others change."""
    flags = flags_of(mode, toy_data, tmp_path / "out")
    start = {}
    load = script.load_model

    def load_and_remember(*args, **kwargs):
        model = load(*args, **kwargs)
        if not kwargs:
            start.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_model", load_and_remember)
        more = ["--max_steps", "2", "--learning_rate", "0.01", "--warmup_steps", "0", "--no_eval_before"]
        trainer = script.main([*flags, *more, "--activation_checkpointing", checkpointing, "--batch_size_per_gpu", "4"])
    for name, tensor in trainer.model.state_dict().items():
        if name.endswith("k_proj.bias"):
            continue
        moved = not torch.equal(tensor, start[name])
        assert moved == should_train(mode, name.replace("base_layer.", "")), name


@pytest.mark.parametrize("mode", ["frozen", "lora, frozen"])
def test_a_frozen_tower_is_left_out_of_the_backward_pass(mode, batch, toy_data, tmp_path):
    args, training_args = script.parse_arguments(flags_of(mode, toy_data, tmp_path))
    model = script.load_model(args, training_args).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    features = []
    for module in model.modules():
        if isinstance(module, Phi3VImageEmbedding):
            module.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(**batch).loss.backward()
    assert len(features) == 1 and not features[0].requires_grad


# ---- adapters as they are saved, and merged


@pytest.fixture(scope="module", params=["lora", "dora", "qlora"])
def trained(request, toy_data, tmp_path_factory):
    """A mode, the output folder of a short run, and the trainer."""
    out = tmp_path_factory.mktemp(request.param)
    steps = ["--max_steps", "3", "--learning_rate", "0.002", "--batch_size_per_gpu", "4", "--no_eval_before"]
    return request.param, out, script.main([*flags_of(request.param, toy_data, out), *steps])


def logits(model, batch, dtype=torch.float64):
    """In double precision: at logits of some 25, fp32 arithmetic alone blurs them by 2e-5."""
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


def test_a_saved_adapter_is_the_trained_model(trained, batch):
    mode, out, trainer = trained
    found = logits(load_adapter(base(), out).double(), batch)
    assert (found - logits(base().double(), batch)).abs().max() > 0.1
    if mode != "qlora":  # which was trained on another base: see below
        torch.testing.assert_close(found.float(), logits(trainer.model, batch, torch.float32), rtol=0, atol=1e-4)


def test_merging(trained, batch, tmp_path):
    mode, out, _ = trained
    merge_tool.main([str(out), str(tmp_path), "--dtype", "fp32"])
    merged, info = Phi3VForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = logits(load_adapter(base(), out).double(), batch)
    torch.testing.assert_close(logits(merged.double(), batch), expected, rtol=0, atol=1e-5)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(CHECKPOINT / "model.safetensors").keys() and set(SEPARATORS) <= names
    assert Phi3VProcessor.from_pretrained(tmp_path).image_processor.num_crops == 4


@pytest.mark.parametrize("trained", ["qlora"], indirect=True)
def test_merging_into_the_rounded_base_gives_the_model_that_qlora_trained(trained, batch, tmp_path):
    _, out, trainer = trained
    merge_tool.main([str(out), str(tmp_path), "--dtype", "fp32", "--dequantize"])
    merged = logits(Phi3VForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), batch, torch.float32)
    evaluated = logits(trainer.model, batch, torch.float32)
    torch.testing.assert_close(merged, evaluated, rtol=0, atol=1e-3)
    plain = logits(load_adapter(base(), out), batch, torch.float32)
    assert (plain - evaluated).abs().max() > 0.1  # what rounding the base does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere", "out"], "nowhere holds no adapter_config.json"), (["ADAPTER", "."], ". is not empty")],
)
def test_merging_what_cannot_be_merged(arguments, message, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(merge_tool.InputError, match=message):
        merge_tool.main([str(trained[1]) if a == "ADAPTER" else a for a in arguments])
