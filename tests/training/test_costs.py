"""FLOPs and memory computed from a model's modules, compared with what torch counts at the real size."""

import pytest
import torch
from helpers import packed_row, real_size_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from phi3v.training.costs import Costs
from phi3v.training.workload import workload_of_packing

BATCHES = {
    "3x4": [([(3, 4)], 43, 32, None)],
    "two": [([(1, 2)], 60, 5, None), ([(2, 2), (1, 1)], 700, 600, None)],
    "shared": [([(2, 2)], 50, 10, "page"), ([(2, 2)], 70, 20, "page"), ([(2, 2)], 60, 3, "page")],
}


def to(row: dict, device) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in row.items()}


MODES = ["full", "frozen", "frozen+projector", "lora", "lora+frozen"]
KINDS = ["none", "decoder", "all"]
# The decoder's layers are alike, so that a few show as much as all 32, which are in one case.
FLOPS = [(mode, kind, 4) for mode in MODES for kind in KINDS] + [("lora", "decoder", 32)]
WITH_WHOLE_PARTS = ["alone_all", "alone_tower", "alone_projector", "lora+whole_all", "lora+whole_projector"]
FLOPS += [(mode, kind, 4) for mode, kind in zip(WITH_WHOLE_PARTS, [*KINDS, "none", "decoder"], strict=True)]


@pytest.mark.parametrize(("mode", "checkpointing", "layers"), FLOPS)
def test_flops_at_real_size(mode, checkpointing, layers):
    """torch counts attention of every query with every key. QLoRA needs no case: it computes the same as LoRA."""
    row = packed_row(BATCHES["two"])
    model = real_size_model(mode, torch.bfloat16, checkpointing, num_hidden_layers=layers)
    with FlopCounterMode(display=False) as counter:
        model(**to(row, "meta")).loss.backward()
    counted = counter.get_total_flops()
    costs, workload = Costs(model, checkpointing), workload_of_packing(row["packing"], causal=False)
    assert costs.flops(workload, with_recomputation=True) == pytest.approx(counted, rel=0.01)
    # What is reported counts a query with the keys before it alone.
    assert 0.95 * counted < costs.flops(workload_of_packing(row["packing"]), with_recomputation=True) < counted


CASES = [  # with 4 of the decoder's 32 layers, and the first with all
    ("full", torch.bfloat16, "none", "3x4"),
    ("full", torch.float32, "none", "3x4"),
    ("full", torch.bfloat16, "none", "two"),
    ("full", torch.bfloat16, "none", "shared"),
    ("full", torch.bfloat16, "decoder", "two"),
    ("full", torch.bfloat16, "all", "3x4"),
    ("full under autocast", torch.float32, "none", "two"),
    ("frozen", torch.bfloat16, "none", "3x4"),
    ("frozen", torch.bfloat16, "all", "shared"),
    ("lora", torch.float32, "none", "3x4"),
    ("lora under autocast", torch.bfloat16, "none", "3x4"),
    ("lora under autocast", torch.bfloat16, "decoder", "two"),
    ("lora+frozen under autocast", torch.bfloat16, "none", "two"),
    ("alone_all", torch.bfloat16, "none", "two"),
    ("alone_projector", torch.bfloat16, "decoder", "two"),
    ("alone_tower under autocast", torch.float32, "none", "3x4"),
    ("lora+whole_all under autocast", torch.bfloat16, "none", "two"),
    ("lora+whole_all under autocast", torch.bfloat16, "all", "3x4"),
    ("lora+whole_projector under autocast", torch.bfloat16, "none", "two"),
]


@pytest.mark.parametrize(("mode", "dtype", "checkpointing", "batch"), CASES)
def test_kept_tensors_at_real_size(mode, dtype, checkpointing, batch, monkeypatch):
    """Uses fake CPU tensors, with which attention is a fused kernel as on a GPU; on the meta device it is not."""
    monkeypatch.setattr("phi3v.model.modeling_phi3v.Phi3VModel._check_images", lambda *args: None)  # looks at values
    row = packed_row(BATCHES[batch])
    layers = 32 if (mode, dtype, checkpointing, batch) == CASES[0] else 4
    model = real_size_model(mode.split()[0], dtype, checkpointing, num_hidden_layers=layers)
    autocast, kept = mode.endswith("autocast"), {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            for name, p in module._buffers.items():
                module._buffers[name] = torch.empty(p.shape, dtype=p.dtype)
        inputs = {key: fake.from_tensor(value) if torch.is_tensor(value) else value for key, value in row.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**inputs)
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    found = sum(storage.nbytes() for storage in kept.values())
    costs = Costs(model, checkpointing, dtype.itemsize, 2 if autocast else dtype.itemsize)
    expected = costs.activation_bytes(workload_of_packing(row["packing"]))
    assert expected == pytest.approx(found, rel=0.1)
