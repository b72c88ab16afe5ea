"""The cases in tests/golden, with the official implementation's numbers, and the model that gives them."""

import json
from pathlib import Path

import golden_inputs
import numpy as np
import torch

from phi3v import Phi3VForCausalLM

GOLDEN = Path(__file__).with_name("golden")  # benchmarks/gpu_report.py uses this file without the tests' packages
SUMMARY = json.loads((GOLDEN / "model_summary.json").read_text())


def load(attn_implementation="sdpa"):
    return Phi3VForCausalLM.from_pretrained(
        GOLDEN / "tiny", dtype=torch.float32, attn_implementation=attn_implementation
    )


def case_inputs(name):
    case, saved = SUMMARY[name], np.load(GOLDEN / f"case_{name}.npz")
    inputs = {key: torch.tensor(saved[key]) for key in ("input_ids", "attention_mask")}
    if "position_ids" in saved:
        inputs["position_ids"] = torch.tensor(saved["position_ids"])
    if case["n_images"]:
        used = [h * w for h, w in case["crops"]]
        pixels = golden_inputs.pixel_values(case["n_images"], case["n_crops_incl_global"], used, case["garbage"])
        inputs |= {"pixel_values": torch.tensor(pixels), "image_sizes": torch.tensor(saved["image_sizes"])}
    return inputs, saved
