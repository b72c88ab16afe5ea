"""Parts of the model train with learning rates of their own."""

import pytest
import torch
from helpers import TINY_MODEL

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.training.optimizer import set_part_rates


@pytest.fixture(scope="module")
def model():
    return Phi3VForCausalLM(Phi3VConfig(**TINY_MODEL))


def rates(model, **part_rates) -> dict[str, float]:
    """The learning rate of every parameter, with AdamW in two groups of different weight decay as the Trainer has."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in named if (p.dim() > 1) == decays], "weight_decay": 0.1 if decays else 0.0}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    set_part_rates(optimizer, model, **{"vision_lr": None, "projector_lr": None} | part_rates)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(found[id(p)]["weight_decay"] == (0.1 if p.dim() > 1 else 0.0) for _, p in named)
    return {name: found[id(p)]["lr"] for name, p in named}


@pytest.mark.parametrize(
    "part_rates", [{}, {"vision_lr": 1e-5}, {"projector_lr": 1e-2}, {"vision_lr": 1e-5, "projector_lr": 1e-2}]
)
def test_each_part_has_its_rate_and_keeps_its_weight_decay(part_rates, model):
    for name, rate in rates(model, **part_rates).items():
        part = None
        if "vision_embed_tokens" in name:
            part = "vision_lr" if "img_processor" in name else "projector_lr"
        assert rate == part_rates.get(part, 1e-3), name
