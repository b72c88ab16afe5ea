"""FLOPs and memory computed from a model's modules, against what torch counts of the real size."""

import importlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import finetune_hf_trainer_ucf101 as ucf101
from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.arguments import parse_arguments
from phi3v.data.conversations import Size
from phi3v.errors import InputError
from phi3v.model.adapters import add_adapter
from phi3v.model.packing import pack
from phi3v.run import estimate_run
from phi3v.training.costs import Costs
from phi3v.training.estimate import Estimate
from phi3v.training.hardware import GPUS, published_peak
from phi3v.training.workload import workload_of_packing

ROOT = Path(__file__).resolve().parents[1]
DECODER = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
VISION = (
    r"model\.vision_embed_tokens\.(img_projection\.[02]|"
    r"img_processor\.vision_model\.encoder\.layers\.(\d|1\d|2[012])\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2))"
)


def micro_batch(examples) -> dict:
    """Examples of (grids, text tokens, supervised tokens, what their images are called) in one row."""
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


def build(mode: str, dtype, checkpointing="none"):
    """The model at its real size on the meta device."""
    config = Phi3VConfig()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        base = model = Phi3VForCausalLM(config).to(dtype).train()
        if mode.startswith("frozen"):
            base.model.vision_embed_tokens.requires_grad_(False)
            base.model.vision_embed_tokens.img_projection.requires_grad_("projector" in mode)
        if mode.startswith("lora"):
            targets = DECODER if "frozen" in mode else f"{DECODER}|{VISION}"
            model = add_adapter(base, LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=targets))
    if checkpointing != "none":
        base.checkpoint_tower = checkpointing == "all"
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def to(row: dict, device) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in row.items()}


@pytest.mark.parametrize("checkpointing", ["none", "decoder", "all"])
@pytest.mark.parametrize("mode", ["full", "frozen", "frozen+projector", "lora", "lora+frozen"])
def test_flops_at_real_size(mode, checkpointing):
    """Attention is counted in full there: every query with every key of its call. QLoRA computes as LoRA does."""
    row = micro_batch(BATCHES["two"])
    model = build(mode, torch.bfloat16, checkpointing)
    with FlopCounterMode(display=False) as counter:
        model(**to(row, "meta")).loss.backward()
    counted = counter.get_total_flops()
    costs, workload = Costs(model, checkpointing), workload_of_packing(row["packing"], causal=False)
    assert costs.flops(workload, with_recomputation=True) == pytest.approx(counted, rel=0.01)
    # What is reported counts a query with the keys before it alone.
    assert 0.95 * counted < costs.flops(workload_of_packing(row["packing"]), with_recomputation=True) < counted


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
    """On fake CPU tensors, where attention is the fused kernel's, as on a GPU; on the meta device it is not."""
    monkeypatch.setattr("phi3v.model.modeling_phi3v.Phi3VModel._check_images", lambda *args: None)  # looks at values
    row = micro_batch(BATCHES[batch])
    model = build(mode.split()[0], dtype, checkpointing)
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
    if autocast:  # it keeps copies of the weights that train
        expected += sum(2 * p.numel() for p in model.parameters() if p.requires_grad and p.dim() > 1)
    assert expected == pytest.approx(found, rel=0.1)


def test_names_of_gpus():
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "Tesla V100-SXM2-32GB": 125e12,
        "NVIDIA A10G": 70e12,
        "Quadro RTX 8000": 130e12,
        "NVIDIA RTX A1000": None,
        "NVIDIA GeForce RTX 4080": None,
    }
    assert {name: published_peak(name) for name in names} == names
    assert all(published_peak(name) for name in GPUS)


def test_an_estimate(capfd, tmp_path):
    """What --estimate prints for the real size; memory falls with checkpointing, and time with the number of GPUs."""
    sizes = [Size(2443, 2400, 17, 10, 0)] * 3
    model = build("full", torch.bfloat16)
    estimates = [Estimate(model, sizes, n, 2, {"zero_optimization": {"stage": 2}}) for n in (1, 8)]
    workload = estimates[0].largest_workload(1)
    peaks = [estimates[1].memory(workload, kind).peak for kind in ("none", "decoder", "all")]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] < estimates[0].memory(workload, "none").peak
    text = estimates[1].describe(workload, 2)
    assert "4,146,621,440, of which 4,134,023,168 train" in text and "V100 32 GB" in text
    assert estimates[1].flops_per_example("none") == pytest.approx(
        77.9e12, rel=0.1
    )  # the recipe's own count is 77.9 TFLOP
    plan = estimates[1].plan(64, 1, "auto", None, 72e9)
    assert plan.tokens >= 2443 and plan.memory.peak <= 72e9


def test_memory_under_deepspeed():
    """What DeepSpeed 0.19 keeps for the whole model: states, buckets of 5e8 in pairs, gathered parameters."""
    model, sizes = build("full", torch.bfloat16), [Size(2443, 2400, 17, 10, 0)]
    whole, trained, largest = 4146621440, 4134023168, 32064 * 3072

    def memory(name, n):
        config = json.loads((ROOT / "ds_config" / f"{name}.json").read_text())
        estimate = Estimate(model, sizes, n, 2, config)
        workload = estimate.largest_workload(1)
        found = estimate.memory(workload, "all")
        return found, found.passes - estimate.costs["all"].peak_bytes(workload)

    found, buffers = memory("zero2", 8)
    assert (found.gradients, found.optimizer, found.update) == (trained / 4, trained * 1.5, trained * 0.75)
    assert buffers == pytest.approx(2e9 + trained / 4)  # with the gradients of the micro-batch at hand
    found, buffers = memory("zero2_offload", 8)
    assert (found.gradients, found.optimizer, found.update) == (2 * largest, 0, 0)
    assert buffers == pytest.approx(2e9)
    assert memory("zero2_offload", 1)[0] == found  # all that is divided is on the host
    found, buffers = memory("zero3", 8)
    assert (found.weights, found.gradients, found.optimizer) == (whole / 4, trained / 4, trained * 1.5)
    assert buffers == pytest.approx(2 * 3072**2 + 2e9)  # the bucket as the Trainer fills it in
    assert memory("zero3", 1)[0].update == 6e9  # a group of parameters after the other


def parse(script, *flags):
    return parse_arguments(script.RecipeArguments, script.TRAINING, script.PRESETS, script.__doc__, list(flags))


COMMANDS = [
    line.removesuffix("\\").strip().split("finetune_hf_trainer_")[1]
    for line in (ROOT / "benchmarks" / "hardware.md").read_text().replace("\\\n", " ").splitlines()
    if line.startswith("    ") and "finetune_hf_trainer_" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_hardware_guide(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    name, *flags = shlex.split(command)
    script = importlib.import_module(f"finetune_hf_trainer_{name.removesuffix('.py')}")
    parse(script, *flags, "--model_name_or_path", "demo/base_checkpoint", "--output_dir", str(tmp_path))


def test_an_estimate_is_for_a_machine_elsewhere(tmp_path):
    """fp16 and flash attention, which a CPU lacks, and eager attention, which keeps its weights."""
    common = ["--data_dir", str(tmp_path), "--model_name_or_path", str(ROOT / "demo" / "base_checkpoint"), "--estimate"]

    def estimate(*flags):
        args, training_args = parse(ucf101, *common, *flags)
        estimated = estimate_run(args, training_args, [Size(200, 26, 4, 5, 0)], ucf101.choose_trained)
        return estimated.memory(estimated.largest_workload(1), "none").peak

    half = estimate("--bf16")
    assert estimate("--fp16", "--use_flash_attention") == estimate() == half < estimate("--fp32")
    assert estimate("--attn_implementation", "eager") > half
    with pytest.raises(InputError, match="--bf16 and --fp16 contradict"):
        estimate("--bf16", "--fp16")
    with pytest.raises(InputError, match="auto depends on a GPU's memory"):
        estimate("--max_tokens_per_gpu", "auto")
