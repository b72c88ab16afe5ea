"""A stand-in for a GPU: torch finds one A100, whose kernels do nothing.

    python tests/nullgpu/stand_in.py PROGRAM …     # runs a Python program on it

Two things can be learned on it. With fake tensors (`live_bytes.py`): on which devices and in which dtypes tensors are,
which kernels run, and how much memory they need. With real ones (`waits.py`): how often the host waits for the device.
Nothing is computed, so no result of a kernel means anything, and neither does any time.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
COUNTERS = ("waits", "copies", "launches")  # of nullcuda.c


def missing() -> str | None:
    """What the stand-in needs and this machine lacks; None if nothing."""
    if not shutil.which("gcc"):
        return "needs gcc"
    return None if torch.version.cuda else "needs a CUDA build of torch"


def build(folder: Path) -> dict[str, str]:
    """Compiles the two libraries into `folder`. Returns the environment variables with which a process uses them, and
    imports what tests import."""
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    preloaded = folder / "nullcuda.so"
    compile_library = ["gcc", "-w", "-O1", "-shared", "-fPIC", f"-I{headers}", "-o"]
    subprocess.run([*compile_library, preloaded, HERE / "nullcuda.c", "-ldl"], check=True)
    driver = [folder / "libcuda.so.1", HERE / "nulldriver.c", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*compile_library, *driver], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_PRELOAD": str(preloaded),
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))),
    }


def run(folder: Path, program: str, *arguments, **variables) -> dict:
    """Runs a program of this folder on the stand-in, which is compiled into `folder`. Returns the JSON object that the
    program's last line is. variables: added to its environment."""
    from helpers import environment  # without the variables of a training in this process, whose port is taken

    command, own = [sys.executable, HERE / program, *map(str, arguments)], build(folder) | variables
    done = subprocess.run(command, env=environment(**own), capture_output=True, text=True, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def counts() -> dict[str, int]:
    """In a process on the stand-in: how often the host has waited, copied and launched a kernel so far."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    return {name: ctypes.c_long.in_dll(library, f"nullcuda_{name}").value for name in COUNTERS}


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"error: the stand-in for a GPU {lacking}")
    with tempfile.TemporaryDirectory() as libraries:
        variables = os.environ | build(Path(libraries))
        sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=variables).returncode)
