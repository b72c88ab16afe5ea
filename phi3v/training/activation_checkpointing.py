"""Activation checkpointing: which layers discard their activations and compute them again in the backward pass.

There are three kinds, from least to most: "none", "decoder" (the layers of the language model), and "all" (those of the
vision tower as well). The flag --activation_checkpointing is a bool or not given; the Trainer switches checkpointing on
for the decoder alone. The functions here translate between these.
"""

import contextlib

from torch import nn

from ..model.adapters import inner_model

KINDS = ("none", "decoder", "all")
DESCRIPTIONS = {
    "none": "no activation checkpointing",
    "decoder": "activation checkpointing in the decoder",
    "all": "activation checkpointing in tower and decoder",
}


def kind_from_flag(flag: bool | None) -> str | None:
    """The kind that --activation_checkpointing asks for; None if it was not given, and the memory is to decide."""
    return None if flag is None else "all" if flag else "none"


def flag_for_trainer(kind: str) -> bool:
    """The value of `TrainingArguments.activation_checkpointing` with which the Trainer switches on this kind."""
    return kind != "none"


@contextlib.contextmanager
def switched_on(model: nn.Module, kind: str):
    """A context in which the model uses this kind. Before and after it the model uses none.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    """
    inner = inner_model(model)
    set_tower_checkpointing(inner, kind)
    if kind != "none":
        inner.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        for module in inner.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def set_tower_checkpointing(model: nn.Module, kind: str):
    """Says whether the vision tower takes part when the Trainer switches activation checkpointing on.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    """
    inner_model(model).checkpoint_tower = kind == "all"
