"""Layers with an adapter compute, where functions are fused, what PEFT computes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from phi3v.model import fused, lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_afterwards():
    yield
    fused.turn_off()
    torch._dynamo.reset()


def adapted(**config):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    lora.use_less_traffic(model)
    return model.train()


def results(model, dtype=None, needs_input=True):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype or torch.float32)
    x.requires_grad_(needs_input)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(x)
    leaves = [*([x] if needs_input else []), *(p for p in model.parameters() if p.requires_grad)]
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


def count(monkeypatch):
    calls, own = [], lora._Up.apply
    monkeypatch.setattr(lora._Up, "apply", lambda *args: calls.append(1) or own(*args))
    return calls


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_peft(monkeypatch, dtype, needs_input):
    model, calls = adapted(), count(monkeypatch)
    expected = results(model, dtype, needs_input)
    assert not calls
    fused.compile_all(CPU, backend="eager")
    found = results(model, dtype, needs_input)
    assert len(calls) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        largest = other.float().abs().max()
        assert (one.float() - other.float()).abs().max() <= (1e-5 if dtype is None else 0.03) * largest


@pytest.mark.parametrize("case", ["dropout", "variant", "disabled", "merged", "bias"])
def test_whatever_is_not_plain_is_left_to_peft(monkeypatch, case):
    options = {"dropout": {"lora_dropout": 0.5}, "variant": {"use_dora": True}, "bias": {"lora_bias": True}}
    model, calls = adapted(**options.get(case, {})), count(monkeypatch)
    if case == "merged":
        model.merge_adapter()
    x = torch.randn(2, 5, 16)
    found = []
    for fuse in (False, True):
        if fuse:
            fused.compile_all(CPU, backend="eager")
        torch.manual_seed(2)
        if case == "disabled":
            with model.disable_adapter():
                found.append(model(x))
        else:
            found.append(model(x))
    assert torch.equal(*found) and not calls


def test_the_same_layer_can_be_copied_and_called_twice():
    model = adapted()
    fused.compile_all(CPU, backend="eager")
    again = copy.deepcopy(model)
    assert torch.equal(model(torch.ones(1, 2, 16)), again(torch.ones(1, 2, 16)))
    first = model(torch.ones(1, 2, 16))
    assert torch.equal(first, model(torch.ones(1, 2, 16)))
