"""The resident memory of training steps on a CPU against the memory that is expected of them.

    python benchmarks/memory.py

Every case runs in a process of its own, with the model of 51M parameters in benchmarks/common.py, fp32, one thread:
three steps of two micro-batches with AdamW. Measured is the largest resident size of the process, less its resident
size after the imports. glibc is told to give every freed block of 64 KiB or more back to the system at once: by default
it keeps many of them, which takes up to 70% more memory with activation checkpointing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# name: mode, grids of each example's image (None: text of 512 tokens), activation checkpointing, DeepSpeed
CASES = {
    "full, 3x4": ("full", [(3, 4)], "none", False),
    "full, 1x2": ("full", [(1, 2)], "none", False),
    "full, text-512": ("full", [None], "none", False),
    "full, 2 of 3x4": ("full", [(3, 4)] * 2, "none", False),
    "full, 2 of 3x4, checkpointing": ("full", [(3, 4)] * 2, "all", False),
    "frozen, 2 of 3x4": ("frozen", [(3, 4)] * 2, "none", False),
    "LoRA, 3x4": ("lora", [(3, 4)], "none", False),
    "QLoRA, 3x4": ("qlora", [(3, 4)], "none", False),
    "full, ZeRO-2, 3x4": ("full", [(3, 4)], "none", True),
    "full, ZeRO-2, 4 of 2x2": ("full", [(2, 2)] * 4, "none", True),
}


def measure(name: str):
    """Runs a case in this process and prints what it took, as JSON in bytes."""
    # The process that starts the cases needs none of this.
    import deepspeed
    import torch
    from common import make_example, make_model, pack_examples
    from peft import LoraConfig

    from phi3v import Phi3VForCausalLM
    from phi3v.data.sizes import Size
    from phi3v.deepspeed_config import read_deepspeed_config
    from phi3v.model.adapters import add_adapter
    from phi3v.model.loading import nf4_config, not_quantized
    from phi3v.ranks import start_alone
    from phi3v.training.estimate import Estimate
    from phi3v.training.workload import workload_of_packing

    mode, grids, checkpointing, zero = CASES[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    examples = [
        make_example([grid], images_key=i) if grid else make_example([], images_key=i, text_tokens=512, supervised=511)
        for i, grid in enumerate(grids)
    ]
    batch = pack_examples(examples)
    deepspeed_config = None
    if zero:
        start_alone()
        deepspeed_config = read_deepspeed_config(ROOT / "ds_config" / "zero2.json")
        zero_options = {k: v for k, v in deepspeed_config["zero_optimization"].items() if v != "auto"}
        deepspeed_config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": zero_options,
        }
        deepspeed.init_distributed("gloo")
    skip = not_quantized(quantize_vision=False) if mode == "qlora" else None
    targets = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"

    def build(device):
        with torch.device(device):
            model = make_model()
        if mode == "frozen":
            model.model.vision_embed_tokens.requires_grad_(False)
        return model

    outline = build("meta")
    if "lora" in mode:
        outline = add_adapter(outline, LoraConfig(r=64, target_modules=targets))  # imports more modules
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    model = build("cpu")
    if mode == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            options = {"dtype": torch.float32, "quantization_config": nf4_config(torch.float32)}
            model = Phi3VForCausalLM.from_pretrained(folder, **options).train()
    if "lora" in mode:
        model = add_adapter(model, LoraConfig(r=64, target_modules=targets))
    if checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    engine = None
    if zero:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    for micro_batch in range(6):
        if engine:
            engine.backward(engine(**batch).loss)
            engine.step()
        else:
            model(**batch).loss.backward()
            if micro_batch % 2:
                optimizer.step()
                optimizer.zero_grad()
    measured = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    sizes = [Size(1, 0, 0, 1, 0)]
    estimate = Estimate(outline, sizes, 1, 4, deepspeed_config, skip, on_gpu=False)
    memory = estimate.memory(workload_of_packing(batch["packing"]), checkpointing)
    print(json.dumps({"measured": measured, "expected": memory.peak, "parts": str(memory)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="measure this case alone, in this process")
    args = parser.parse_args()
    if args.case:
        return measure(args.case)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    print(f"{'case':34}{'measured GiB':>14}{'expected':>10}{'difference':>12}")
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        measured, expected = found["measured"], found["expected"]
        line = f"{name:34}{measured / 2**30:>14.2f}{expected / 2**30:>10.2f}{expected / measured - 1:>+12.0%}"
        print(f"{line}   {found['parts']}", flush=True)


if __name__ == "__main__":
    main()
