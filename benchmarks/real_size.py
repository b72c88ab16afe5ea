"""Seconds and memory of loading, evaluating, saving and merging a model of the real size, on a CPU.

    python benchmarks/real_size.py FOLDER
    python benchmarks/real_size.py FOLDER --compare ../before    # every part also with the code of another checkout
    python benchmarks/real_size.py FOLDER --parts load merge
    python benchmarks/real_size.py FOLDER --tiny                 # tries the program with a small model

Writes to FOLDER, unless they are there, a model with random weights in bf16 (4,146,621,440 parameters, 8.3 GB), an
adapter of rank 64 on all layers, and two examples. What the parts save is deleted again, and needs another 8.3 GB
meanwhile. FOLDER stays: delete it when you are done.

Every part is a process of its own. The seconds are wall-clock time with the imports, which the first row has alone.
Memory is read from /proc 20 times a second and summed up over the process and its children. Anonymous memory is what
the kernel can't take back. Resident memory also counts the pages of memory-mapped files, such as the weights, which it
takes back when memory is short.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from phi3v.files import replacing_folder

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "pad_token_id": 507,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 336,
        "patch_size": 14,
    },
}
LOAD = """
import sys, torch
from phi3v import Phi3VForCausalLM
model = Phi3VForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
if sys.argv[2:]:
    model.save_pretrained(sys.argv[2])
"""
EVALUATE = (
    "--evaluate_only --eval_split val --max_new_tokens 2 --num_crops 1 --bf16 --no-tqdm --dataloader_num_workers 0"
)
SAMPLES_PER_SECOND = 20
WRITTEN = "written_by_real_size"  # an empty file in FOLDER


@dataclass
class Found:
    """What a part took: seconds, and the largest anonymous and resident memory in bytes."""

    seconds: float
    anonymous: int
    resident: int


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Anonymous and resident memory of a process and its children in bytes."""
    anonymous = resident = 0
    try:
        for one in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{one.pid}/status").read_text()
            anonymous += sum(int(kib) << 10 for kib in re.findall(r"RssAnon:\s+(\d+)", status))
            resident += sum(int(kib) << 10 for kib in re.findall(r"VmRSS:\s+(\d+)", status))
    except (psutil.Error, OSError):  # one of them has just ended
        pass
    return anonymous, resident


def measured(command: list[str], checkout: Path) -> Found:
    """Runs a Python command with the code of a checkout. Ends this program if the command fails."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    child = subprocess.Popen([sys.executable, *command], cwd=checkout, env=environment, text=True, **pipes)
    anonymous = resident = 0
    while True:
        try:
            output = child.communicate(timeout=1 / SAMPLES_PER_SECOND)[0]
            break
        except subprocess.TimeoutExpired:
            now = memory_of(psutil.Process(child.pid))
            anonymous, resident = max(anonymous, now[0]), max(resident, now[1])
    if child.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {child.returncode}:\n{output[-2000:]}")
    return Found(time.perf_counter() - start, anonymous, resident)


def write_inputs(folder: Path, base_later: Path, tiny: bool):
    """Writes the model, an adapter on it and two examples. base_later: where the model will be in the end."""
    import torch
    from peft import get_peft_model_state_dict
    from PIL import Image
    from safetensors.torch import save_file

    from finetune_hf_trainer_ucf101 import RecipeArguments, choose_trained
    from phi3v import Phi3VConfig, Phi3VImageProcessor, Phi3VProcessor
    from phi3v.model.loading import outline_of
    from phi3v.model.merging import save_model

    torch.manual_seed(0)
    outline = outline_of(Phi3VConfig(**(TINY if tiny else {}))).to(torch.bfloat16)
    shapes = outline.state_dict()

    def random_weight(name: str) -> torch.Tensor:
        if shapes[name].dim() == 1:
            return torch.ones(shapes[name].shape) if "norm" in name else torch.zeros(shapes[name].shape)
        return torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(0, 0.02)

    base = folder / "base"
    base.mkdir()
    save_model(outline, random_weight, base, "writing")
    tokenizer = Phi3VProcessor.from_pretrained(ROOT / "demo" / "base_checkpoint").tokenizer
    Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer).save_pretrained(base)

    with torch.device("meta"):
        adapted = choose_trained(outline, RecipeArguments(data_dir="", use_lora=True, lora_rank=64))
    adapted.peft_config["default"].base_model_name_or_path = str(base_later)
    adapted.peft_config["default"].save_pretrained(folder / "adapter")
    of_adapter = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: torch.empty(tensor.shape).normal_(0, 0.02) for name, tensor in of_adapter.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})

    (folder / "data" / "images").mkdir(parents=True)
    for split in ("train", "val"):
        rows = []
        for i in range(2):
            Image.effect_noise((336, 336), 90).convert("RGB").save(folder / "data" / "images" / f"{split}{i}.png")
            turn = {"images": [f"{split}{i}.png"], "user": "What is it?", "assistant": "noise"}
            rows.append(json.dumps({"id": f"{split}{i}", "source": "random", "conversations": [turn]}))
        (folder / "data" / f"ucf101_{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / WRITTEN).touch()


def parts(folder: Path) -> dict[str, list[str]]:
    """The command of each part."""
    base, saved = str(folder / "base"), str(folder / "saved")
    given = ["--model_name_or_path", base, "--data_dir", str(folder / "data"), "--output_dir", saved]
    return {
        "imports": ["-c", LOAD.partition("model =")[0]],
        "load": ["-c", LOAD, base],
        "load and save": ["-c", LOAD, base, saved],
        "evaluate": ["finetune_hf_trainer_ucf101.py", *given, *EVALUATE.split()],
        "merge": ["tools/merge_adapter.py", str(folder / "adapter"), saved],
    }


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the model, which is kept for the next time")
    parser.add_argument("--compare", type=Path, help="another checkout of this repository, whose code is measured too")
    parser.add_argument("--parts", nargs="+", choices=parts(Path()), default=list(parts(Path())), help="default: all")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.2M parameters, to try the program")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    if not (folder / WRITTEN).exists():
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} holds other files: choose a new folder")
        with replacing_folder(folder) as partial:
            write_inputs(partial, folder / "base", args.tiny)
    checkouts = {"before": args.compare.resolve()} if args.compare else {}
    checkouts |= {"now": ROOT}
    print(f"| {'part':<13} | {'code':<6} | seconds | anonymous GiB | resident GiB |")
    print("| --- | --- | --- | --- | --- |")
    for part in args.parts:
        for name, checkout in checkouts.items():
            try:
                found = measured(parts(folder)[part], checkout)
            finally:
                shutil.rmtree(folder / "saved", ignore_errors=True)
            memory = f"{found.anonymous / 2**30:>13.2f} | {found.resident / 2**30:>12.2f}"
            print(f"| {part:<13} | {name:<6} | {found.seconds:>7.1f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
