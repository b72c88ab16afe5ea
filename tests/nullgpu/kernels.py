"""Compiles the fused functions for the stand-in GPU, and says which kernels the compiler made of each.

    python tests/nullgpu/stand_in.py tests/nullgpu/kernels.py

Triton itself does not run: the compiler's code is made, and its kernels are replaced by ones that do nothing.
"""

import json
import re
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch

DEVICE = torch.device("cuda", 0)
ROWS = 2048, 500, 1024


def compile_all() -> dict[str, dict[str, int]]:
    """By function: how many Triton kernels it became, `sums` that torch computes of what they have written, and graphs
    for inputs of three lengths."""
    from torch._dynamo.utils import counters
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    from phi3v.model import functional, fused, norms  # noqa: F401

    found, code = {}, []
    nothing = SimpleNamespace(run=lambda *args, **kwargs: None)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=folder),
        mock.patch.object(torch._inductor.config, "force_disable_caches", True),
        mock.patch.object(AsyncCompile, "triton", lambda *args, **kwargs: nothing),
        mock.patch.object(GraphLowering, "save_output_code", code.append),
    ):
        fused.compile_all(DEVICE)
        for function in fused.Fused.every:
            code.clear()
            before = counters["stats"]["unique_graphs"]
            for rows in ROWS:
                function(*function.example(rows, torch.bfloat16, DEVICE))
            found[function.name] = {
                "kernels": len(re.findall(r"triton_\w+\.run\(", code[0])),
                "sums": len(re.findall(r"\.sum\(dim=", code[0])),
                "graphs": counters["stats"]["unique_graphs"] - before,
            }
        fused.turn_off()
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(), indent=2))
