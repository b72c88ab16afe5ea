"""What gpu_report.py says about the machine that it runs on. Names of host, user and folders are not in it."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from report_parts import ROOT

# Packages that training uses, and those that make it faster, if they are installed.
PACKAGES = (
    "torch torchvision transformers accelerate tokenizers safetensors huggingface_hub peft bitsandbytes deepspeed "
    "datasets numpy pillow psutil triton flash-attn flash_attn_3 nvidia-nccl-cu12 nvidia-nccl-cu13"
).split()


class NotHere(Exception):
    """The device that was asked for is not there, or the installed torch can't use it."""


def versions() -> dict[str, str]:
    """The versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def find_facts(device: str | None) -> dict:
    """Facts about this machine and the device; torch is imported here. Raises NotHere with a sentence."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        if accelerator is None:
            raise NotHere("torch finds no GPU on this machine: --device cpu --tiny tries the program without one")
        device = accelerator.type
    if device != "cpu" and (accelerator is None or accelerator.type != device):
        raise NotHere(f"torch {torch.__version__} finds no device {device!r} on this machine")
    facts = {
        "device": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions(),
        "torch_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "device_count": torch.accelerator.device_count() if device != "cpu" else 0,
        "device_name": _cpu_name(),
        "driver": None,
    }
    if device == "cuda":
        try:
            facts["capability"] = list(torch.cuda.get_device_capability())
            facts["memory_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
            facts["device_name"] = torch.cuda.get_device_name()
            torch.ones(8, device=device).sum().item()
        except (RuntimeError, AssertionError) as e:
            raise NotHere(f"torch {torch.__version__} can't use the GPU ({' '.join(str(e).split())[:300]})") from None
        facts["driver"] = _driver()
    elif device != "cpu":
        facts["device_name"] = device
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0] if lines else None


def code() -> dict:
    """The commit of this checkout, whether tracked files differ from it, and a digest of the code that stages run."""
    files = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "phi3v").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    found = {"commit": _git("rev-parse", "HEAD"), "changed": None, "digest": digest.hexdigest()[:16]}
    if found["commit"]:
        found["changed"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
