"""FLOPs and memory computed from a model's modules, against what torch counts of the real size."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.adapters import add_adapter
from phi3v.measuring import Costs, load_of_packing
from phi3v.packing import pack

TARGETS = (
    r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|model\.vision_embed_tokens\.(img_projection\.[02]|"
    r"img_processor\.vision_model\.encoder\.layers\.(\d|1\d|2[012])\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2))"
)


def micro_batch(examples) -> dict:
    """Examples of (grids, text tokens, supervised tokens), one after another, those with the same number alike."""
    encoded = []
    for grids, text, supervised, images in examples:
        n = sum((h * w + 1) * 144 + 1 + (h + 1) * 12 for h, w in grids)
        ids = torch.cat([torch.full((n,), -1), torch.arange(text) + 3 + len(encoded)])
        labels = torch.full_like(ids, -100)
        labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
        tiles = torch.zeros(sum(h * w for h, w in grids), 336, 336, 3, dtype=torch.uint8)
        encoded.append(
            {"input_ids": ids, "labels": labels, "pixel_values": tiles, "grids": list(grids), "images": images}
        )
    row = pack(encoded, 4096, True)
    grids = row["packing"].grids
    row["image_sizes"] = torch.tensor(grids).view(-1, 2) * 336
    row["packing"] = replace(row["packing"], mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    return row


BATCHES = {
    "3x4": [([(3, 4)], 43, 32, None)],
    "two": [([(1, 2)], 60, 5, None), ([(2, 2), (1, 1)], 700, 600, None)],
    "shared": [([(2, 2)], 50, 10, "page"), ([(2, 2)], 70, 20, "page"), ([(2, 2)], 60, 3, "page")],
}


def build(mode: str, dtype, device, attention="sdpa", checkpointing="none", layers=None):
    config = Phi3VConfig(**({"num_hidden_layers": layers} if layers else {}))
    config._attn_implementation = attention
    with torch.device(device):
        model = Phi3VForCausalLM(config).to(dtype).train()
        if mode.startswith("frozen"):
            model.model.vision_embed_tokens.requires_grad_(False)
            model.model.vision_embed_tokens.img_projection.requires_grad_("projector" in mode)
        if mode.startswith("lora"):
            targets = TARGETS.split("|model")[0] if "frozen" in mode else TARGETS
            if "frozen" in mode:
                targets = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
            adapted = add_adapter(model, LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=targets))
            base = model
            model = adapted
        else:
            base = model
    if checkpointing != "none":
        base.checkpoint_tower = checkpointing == "all"
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def to(row: dict, device) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in row.items()}


@pytest.mark.parametrize("checkpointing", ["none", "decoder", "all"])
@pytest.mark.parametrize("mode", ["full", "frozen", "frozen+projector", "lora", "lora+frozen"])
def test_flops_at_real_size(mode, checkpointing):
    """Attention is counted in full there: every query with every key of its kernel call. QLoRA computes as LoRA does."""
    row = micro_batch(BATCHES["two"])
    model = build(mode, torch.bfloat16, "meta", checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter:
        model(**to(row, "meta")).loss.backward()
    load = load_of_packing(row["packing"], causal=False)
    counted = counter.get_total_flops()
    costs = Costs(model, checkpointing)
    assert costs.flops(load, again=True) == pytest.approx(counted, rel=0.01)
    causal = costs.flops(load_of_packing(row["packing"]), again=True)
    print(f"{mode} {checkpointing}: {counted / 1e12:.3f} counted, formula {costs.flops(load, again=True) / counted - 1:+.3%}, causal {causal / counted:.3f}")
    assert 0.95 * counted < causal < counted


CASES = [
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
]


@pytest.mark.parametrize(("mode", "dtype", "checkpointing", "batch"), CASES)
def test_kept_tensors_at_real_size(mode, dtype, checkpointing, batch, monkeypatch):
    monkeypatch.setattr("phi3v.modeling_phi3v.Phi3VModel._check_images", lambda *args: None)  # looks at values
    row = micro_batch(BATCHES[batch])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = build(mode.split(" ")[0], dtype, "cpu", checkpointing=checkpointing)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters and tensor.grad_fn is None or True:
                kept.setdefault(storage._cdata, (storage, tensor.dtype, tuple(tensor.shape)))
            return tensor

        inputs = {k: fake.from_tensor(v) if torch.is_tensor(v) else v for k, v in row.items()}
        autocast = "autocast" in mode
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(**inputs).loss
    total = sum(storage.nbytes() for key, (storage, _, _) in kept.items() if key not in parameters)
    costs = Costs(model, checkpointing, stream_bytes=dtype.itemsize, compute_bytes=2 if autocast else dtype.itemsize)
    expected = costs.kept_bytes(load_of_packing(row["packing"]))
    print(f"{mode} {dtype} {checkpointing} {batch}: kept {total / 2**30:.2f} GiB, expected {expected / total - 1:+.1%}")
    if abs(expected / total - 1) > 0.1:
        import collections
        log = collections.Counter()
        for key, (storage, dt, shape) in kept.items():
            if key not in parameters:
                log[(dt, shape)] += storage.nbytes()
        for k, v in log.most_common(25):
            print(k, v / 2**20)
        print({k: v * costs._units(load_of_packing(row["packing"]))[k] / 2**20 for k, v in costs.kept.items()})
    assert expected == pytest.approx(total, rel=0.1)
