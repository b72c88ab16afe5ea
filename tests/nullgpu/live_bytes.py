"""Runs training steps of the real model on fake tensors of the stand-in GPU, and counts what lives in its memory.

    python tests/nullgpu/stand_in.py tests/nullgpu/live_bytes.py [--layers N] [--documents N] [--attention NAME …]

Prints tables of what is found and what is expected, for every mode and kind of activation checkpointing.
"""

import argparse
import dataclasses
import weakref
from collections import Counter

import torch
from helpers import packed_row, real_size_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phi3v import Phi3VConfig
from phi3v.model.adapters import inner_model
from phi3v.model.loading import not_quantized
from phi3v.training.activation_checkpointing import KINDS
from phi3v.training.estimate import Estimate
from phi3v.training.peak import peak_bytes
from phi3v.training.workload import workload_of_packing

DEVICE = torch.device("cuda", 0)
# mode: what trains; the dtype of the weights; whether autocast computes in bf16, as without DeepSpeed
MODES = {
    "full, ZeRO-2": ("full", torch.bfloat16, False),
    "full, DDP": ("full", torch.float32, True),
    "frozen vision, ZeRO-2": ("frozen", torch.bfloat16, False),
    "LoRA": ("lora", torch.bfloat16, True),
    "QLoRA": ("qlora", torch.bfloat16, True),
}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages on the accelerator that were made inside of this context and still exist.

    bytes: now; peak: the most so far.
    operations: how often each operation ran. to_host: those with an input on the accelerator and a result on the host,
    and to_device: those the other way round; a copy of either kind makes the host wait unless it is non-blocking.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakKeyDictionary()
        self.operations, self.to_host, self.to_device = Counter(), Counter(), Counter()

    def _watch(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int):
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), results)
        )
        name = func._schema.name
        self.operations[name] += 1
        given, made = ({x.device.type for x in tensors} for tensors in (inputs, outputs))
        self.to_host[name] += "cpu" in made and DEVICE.type in given
        self.to_device[name] += DEVICE.type in made and given == {"cpu"}
        for tensor in outputs:
            if tensor.device.type == DEVICE.type:
                self._watch(tensor)
        return results


def four_bit_weight(shape: torch.Size, dtype: torch.dtype) -> torch.nn.Parameter:
    """A weight in NF4 as bitsandbytes holds it: 4 bits for each number, a scale of 8 bits for 64 of them, and a scale
    in fp32 for 256 of these scales."""
    from bitsandbytes.functional import QuantState

    def made(n, dtype):
        return torch.empty(n, dtype=dtype, device=DEVICE)

    blocks = shape.numel() // 64
    scales = QuantState(made(-(-blocks // 256), torch.float32), code=made(256, torch.float32), blocksize=256)
    scales.dtype = torch.float32
    weight = torch.nn.Parameter(made((shape.numel() // 2, 1), torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        made(blocks, torch.uint8), shape, made(16, torch.float32), 64, "nf4", dtype, made((), torch.float32), scales
    )
    return weight


def place(model: torch.nn.Module, dtype: torch.dtype):
    """Gives a model of the meta device its weights on the accelerator."""
    for module in model.modules():
        is_four_bit = type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")
        for name, p in module._parameters.items():
            if p is None:
                continue
            if is_four_bit and name == "weight":
                module._parameters[name] = four_bit_weight(torch.Size((module.out_features, module.in_features)), dtype)
            else:
                fresh = torch.empty(p.shape, dtype=p.dtype, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(fresh, p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def measure(mode: str, row: dict, attention: str, sizes: dict) -> dict:
    """Trains on a micro-batch, when its gradients exist already: without activation checkpointing, and with each kind.

    Returns for each kind bytes: `weights`; `gradients`; `passes`, the most that the forward and backward pass took; and
    what of it was `kept` between the two. `expected` has what the estimate says of these. Under ZeRO-2 a gradient is
    given away as soon as it is complete, and DeepSpeed's buffers are neither measured nor expected here.
    """
    trains, dtype, autocast = MODES[mode]
    model, workload = real_size_model(trains, dtype, "none", attention, **sizes), workload_of_packing(row["packing"])
    estimate = Estimate(model, [], 1, 2, None, not_quantized(quantize_vision=False) if trains == "qlora" else None)
    inner, found = inner_model(model), {}
    with FakeTensorMode() as fake, Live() as live:
        place(model, dtype)
        weights = live.bytes
        for p in model.parameters():
            if p.requires_grad and autocast:
                p.grad = torch.empty_like(p)
            elif p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        gradients = live.bytes - weights
        for kind in KINDS:
            if kind != "none":
                inner.checkpoint_tower = kind == "all"
                inner.activation_checkpointing_enable({"use_reentrant": False})
            inputs = {
                key: torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
                for key, value in row.items()
                if torch.is_tensor(value)
            }
            packing = row["packing"]
            rows = {name: fake.from_tensor(getattr(packing, name)) for name in ("kept_rows", "label_rows")}
            packing = dataclasses.replace(packing, **rows, _on_device={})
            before = live.peak = live.bytes
            for counter in (live.operations, live.to_host, live.to_device):
                counter.clear()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                loss = model(**inputs, packing=packing, num_items_in_batch=workload.targets).loss
            kept = live.bytes - before
            loss.backward()
            del loss, inputs, packing
            memory, costs = estimate.memory(workload, kind), estimate.costs[kind]
            expected = {"weights": memory.weights, "gradients": memory.gradients, "passes": memory.passes}
            if not autocast:
                whole = estimate.parameters * dtype.itemsize
                expected = {"weights": whole, "gradients": 0, "passes": peak_bytes(costs, workload)}
            found[kind] = {
                "weights": weights,
                "gradients": gradients,
                "passes": live.peak - before,
                "kept": kept,
                "expected": expected | {"kept": costs.activation_bytes(workload)},
                "operations": dict(live.operations),
                "to_host": +live.to_host,
                "to_device": +live.to_device,
            }
    return found


def measure_all(attention: list[str], documents: int, layers: int | None = None) -> dict:
    """What `measure` finds for each attention implementation and mode, for a micro-batch of documents of 4x4 crops.

    layers: of the decoder, and of the tower those that are used; by default all.
    """
    sizes = {}
    if layers:
        vision = Phi3VConfig().vision_config.to_dict() | {"num_hidden_layers": layers + 1}
        sizes = {"num_hidden_layers": layers, "vision_config": vision}
    row = packed_row([([(4, 4)], 43, 32, None)] * documents)
    return {name: {mode: measure(mode, row, name, sizes) for mode in MODES} for name in attention}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="of the decoder, and used ones of the tower; default: all")
    parser.add_argument("--documents", type=int, default=4, help="in the micro-batch; default: %(default)s")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="attention implementations; default: sdpa")
    args = parser.parse_args()
    found = measure_all(args.attention, args.documents, args.layers)
    for attention, modes in found.items():
        head = f"{attention}, GiB"
        print(f"{head:34}{'weights':>9}{'gradients':>11}{'passes':>9}{'expected':>10}{'difference':>12}{'of all':>9}")
        for name, one in ((f"{mode}, {kind}", one) for mode, kinds in modes.items() for kind, one in kinds.items()):
            gib, expected = (
                [values[part] / 2**30 for part in ("weights", "gradients", "passes")]
                for values in (one, one["expected"])
            )
            print(
                f"{name:34}{gib[0]:9.2f}{gib[1]:11.2f}{gib[2]:9.2f}{expected[2]:10.2f}"
                f"{expected[2] / gib[2] - 1:+12.1%}{sum(expected) / sum(gib) - 1:+9.1%}"
            )


if __name__ == "__main__":
    main()
