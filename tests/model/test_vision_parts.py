"""Parts of the vision model that train fully: which weights these are, how they are saved, and their gradients."""

import pytest
import torch
from helpers import CHECKPOINT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM
from phi3v.errors import InputError
from phi3v.model import modeling_phi3v
from phi3v.model.adapters import add_adapter, check_resumable, continue_adapter, load_adapter
from phi3v.model.vision_parts import (
    SEPARATORS,
    SEPARATORS_FILE,
    VISION_FILE,
    VISION_TRAINING,
    load_parts,
    parameters_of,
    parts_beside,
    parts_of,
    round_parts,
    save_parts,
    train_vision_alone,
    trained_fully,
    vision_training_of,
)

CONFIG = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"}


def base(dtype=torch.float32):
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)


def changed(vision_training="all", train_separators=False, dtype=torch.float32):
    """A model with adapters and parts that train fully, all of whose trained weights are random."""
    model = add_adapter(base(dtype), LoraConfig(**CONFIG), train_separators, vision_training)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    save_parts(model, folder)
    return folder


def test_parts_and_flags():
    for value in VISION_TRAINING:
        for separators in (False, True):
            assert vision_training_of(parts_of(value, separators)) == value
    assert vision_training_of(("tower", "projector")) is None


def test_the_weights_of_parts_leave_out_what_is_never_run():
    model = base()
    everything = parameters_of(model, parts_of("all"))
    names = {name for name, p in model.named_parameters() if "vision_embed_tokens" in name and p.requires_grad}
    assert everything.keys() == names and not any(".layers.2." in name or "post_layernorm" in name for name in names)
    assert parameters_of(model, ["separators"]).keys() == set(SEPARATORS)
    parts = [parameters_of(model, [part]).keys() for part in ("tower", "projector", "separators")]
    assert sum(map(len, parts)) == len(everything) and set().union(*parts) == everything.keys()


def reference_gradients(model, batch, names):
    """In plain torch and PEFT, without our functions: the gradients of all weights, of which these names are kept."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.train()(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if name in names}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("value", ["all", "tower", "projector"])
def test_gradients_beside_a_frozen_language_model_are_those_of_full_training(value, checkpointing, toy_batch):
    model = train_vision_alone(base(), value).train()
    if checkpointing:
        model.checkpoint_tower = True
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(**toy_batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == parameters_of(model, parts_of(value)).keys()
    for name, grad in reference_gradients(base(), toy_batch, found).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_gradients_beside_adapters_are_those_of_plain_peft(toy_batch):
    model = changed().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(**toy_batch).loss.backward()
    plain = get_peft_model(base(), LoraConfig(**CONFIG))
    plain.load_state_dict(model.state_dict())
    wanted = reference_gradients(plain, toy_batch, trained)
    assert wanted.keys() == trained.keys() and sum("lora_" not in name for name in wanted) == len(trained_fully(model))
    for name, grad in wanted.items():
        torch.testing.assert_close(trained[name].grad, grad, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_without_images_has_a_loss_with_gradients_of_zero(monkeypatch):
    monkeypatch.setattr(modeling_phi3v.dist, "is_initialized", lambda: False)  # an earlier test may have joined a group
    model = train_vision_alone(base(), "projector").train()
    ids = torch.tensor([[1, 511, 14, 300, 42]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(not p.grad.any() for p in model.model.vision_embed_tokens.img_projection.parameters())
    full = base().train()  # which has other weights to train, so that nothing is computed for the vision model
    full(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in full.model.vision_embed_tokens.parameters())


@pytest.mark.parametrize(
    ("value", "separators", "file"),
    [("default", True, SEPARATORS_FILE), ("all", False, VISION_FILE), ("tower", True, VISION_FILE)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_parts_are_loaded_bit_for_bit(value, separators, file, dtype, tmp_path):
    model = changed(value, separators, dtype)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    saved(model, tmp_path)
    wanted = {name: p for name, p in trained_fully(model).items()}
    assert load_file(tmp_path / file).keys() == wanted.keys()
    assert parts_beside(base(), tmp_path) == parts_of(value, separators)
    for again in (continue_adapter(base(dtype), tmp_path), load_adapter(base(), tmp_path)):
        own = again.get_base_model()
        assert all(torch.equal(own.get_parameter(name), p) for name, p in wanted.items())
    for name, p in load_adapter(base(dtype), tmp_path).get_base_model().named_parameters():
        assert name not in wanted or torch.equal(p, wanted[name].to(dtype)), name
    check_resumable(model, tmp_path)


def test_the_saved_model_is_rounded_as_it_is_loaded(tmp_path):
    model = changed("tower", dtype=torch.bfloat16)
    round_parts(model, torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(saved(model, tmp_path) / VISION_FILE).values())
    model = changed("default", train_separators=True, dtype=torch.bfloat16)
    round_parts(model, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained_fully(model).values())


def test_files_that_do_not_hold_whole_parts_are_refused(tmp_path):
    whole = load_file(saved(changed("tower", True), tmp_path) / VISION_FILE)

    def refused(tensors, message):
        save_file(tensors, tmp_path / VISION_FILE)
        with pytest.raises(InputError, match=message) as error:
            load_parts(base(), tmp_path)
        assert "\n" not in str(error.value)

    name = next(name for name in whole if "fc1.weight" in name)
    refused({key: tensor for key, tensor in whole.items() if key != name}, "vision.safetensors lacks the weights .*fc1")
    refused(whole | {name: whole[name][1:]}, "of shape .*, must be")
    refused(whole | {"lm_head.weight": whole[name] + 1}, "holds weights that the model does not have, lm_head.weight")
    refused(whole | {name: whole[name] * torch.nan}, "fc1.weight hold NaN or infinity")
    both = {key: whole[key] for key in SEPARATORS}
    save_file(both, tmp_path / SEPARATORS_FILE)
    refused(whole, "holds separators in separators.safetensors and in vision.safetensors")


def test_a_checkpoint_without_the_parts_is_not_resumed_from(tmp_path):
    model = changed("projector")
    saved(model, tmp_path)
    (tmp_path / VISION_FILE).unlink()
    with pytest.raises(InputError, match="lacks model.vision_embed_tokens.img_projection.0.bias"):
        check_resumable(model, tmp_path)
