"""One place translates the flag, the plan and the switches of the model and the Trainer into one another."""

import pytest
import torch
from helpers import CHECKPOINT

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.training.activation_checkpointing import KINDS, flag_for_trainer, kind_from_flag, set_tower_checkpointing


def test_the_flag_becomes_a_kind():
    assert [kind_from_flag(flag) for flag in (None, True, False)] == [None, "all", "none"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_switches_on_just_its_layers(kind):
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(CHECKPOINT))
    set_tower_checkpointing(model, kind)
    if flag_for_trainer(kind):
        model.activation_checkpointing_enable({"use_reentrant": False})
    tower = model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers
    assert {layer.gradient_checkpointing for layer in model.model.layers} == {kind != "none"}
    assert {layer.gradient_checkpointing for layer in tower} == {kind == "all"}
