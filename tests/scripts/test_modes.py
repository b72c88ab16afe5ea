"""In each mode every parameter that should train gets a gradient, and no other parameter changes."""

import pytest
import torch
from helpers import MODES, arguments_of_mode, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v.model.modeling_phi3v import Phi3VImageEmbedding


def should_train(mode, name):
    """Whether a parameter should train, by its name alone: the scripts are not asked."""
    tower, vision = "img_processor" in name, "vision_embed_tokens" in name
    if tower and ("encoder.layers.2." in name or "post_layernorm" in name):
        return False  # the last of three layers, and what follows it, is never run
    if "vision_training" in MODES[mode] and vision:
        parts = MODES[mode].partition("--vision_training ")[2]
        part = "tower" if tower else "projector" if "img_projection" in name else "separators"
        return parts.startswith(("all", part)) or part in parts
    if "vision_training" in MODES[mode] and "lora" not in MODES[mode]:
        return False
    if "lora" in MODES[mode]:
        if "train_separators" in MODES[mode] and name.endswith(("sub_GN", "glb_GN")):
            return True
        return ("lora_" in name) and not (vision and "freeze" in MODES[mode])
    if vision and "freeze" in MODES[mode]:
        return "img_projection" in name and "train_projector" in MODES[mode]
    return True


def gradients(mode, checkpointing, toy_batch, toy_data, out, use_reentrant=False):
    """The model of a mode after one backward pass."""
    args, training_args = parse_command(script, arguments_of_mode(mode, toy_data, out))
    model = script.load_model(args, training_args).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide lora_A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**toy_batch).loss.backward()
    return model


def without_gradient(mode, model):
    """Names of parameters that should train but have no gradient."""
    return [
        name
        for name, p in model.named_parameters()
        # A key bias moves all scores of a query alike, so that its exact gradient is zero.
        if should_train(mode, name) and not name.endswith("k_proj.bias") and (p.grad is None or not p.grad.any())
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_trainable_parameter_gets_a_gradient(mode, checkpointing, toy_batch, toy_data, tmp_path):
    model = gradients(mode, checkpointing, toy_batch, toy_data, tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == should_train(mode, name), name
        assert parameter.requires_grad or parameter.grad is None, name
    assert not without_gradient(mode, model)


def test_reentrant_checkpointing_would_be_noticed(toy_batch, toy_data, tmp_path):
    model = gradients("lora", True, toy_batch, toy_data, tmp_path, use_reentrant=True)
    missing = without_gradient("lora", model)
    assert missing and all("img_processor" in name for name in missing)


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [(mode, flag) for mode in MODES for flag in ("true", "false") if flag == "true" or "vision_tr" not in MODES[mode]],
)
def test_only_what_should_train_changes(mode, checkpointing, toy_data, tmp_path):
    """Two real steps with weight decay. Frozen parameters stay as they are, to the bit; the others change."""
    flags = arguments_of_mode(mode, toy_data, tmp_path / "out")
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
def test_a_frozen_tower_is_left_out_of_the_backward_pass(mode, toy_batch, toy_data, tmp_path):
    args, training_args = parse_command(script, arguments_of_mode(mode, toy_data, tmp_path))
    model = script.load_model(args, training_args).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    features = []
    for module in model.modules():
        if isinstance(module, Phi3VImageEmbedding):
            module.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(**toy_batch).loss.backward()
    assert len(features) == 1 and not features[0].requires_grad
