"""The DeepSpeed json: how it is read, and which ZeRO stage it asks for."""

import importlib
from pathlib import Path

import torch

from .errors import InputError
from .files import read_json


def read_deepspeed_config(path: str | Path | None) -> dict | None:
    """The content of a DeepSpeed json; None for None and "none". Raises InputError."""
    if path is None or str(path) == "none":
        return None
    try:
        config = read_json(path)
    except OSError:
        raise InputError(f"--deepspeed {path} can't be read: give a json file, or none") from None
    except ValueError as e:
        raise InputError(f"--deepspeed {path} is not valid JSON: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise InputError(f"--deepspeed {path} must hold a JSON object, and so must its zero_optimization")
    if not torch.accelerator.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes a minute and a C++ compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return config


def zero_stage(deepspeed: dict) -> int:
    """The ZeRO stage of a DeepSpeed config: 0 to 3."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)
