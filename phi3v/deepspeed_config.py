"""The DeepSpeed json: how it is read, and which ZeRO stage it asks for."""

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace

import torch

from .errors import InputError
from .files import read_json
from .number_limits import check_finite

# Parts of the json that are objects.
SECTIONS = {
    "zero_optimization", "fp16", "bf16", "amp", "optimizer", "scheduler", "activation_checkpointing", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "elasticity", "autotuning", "aio", "pipeline",
    "data_types", "data_efficiency", "curriculum_learning", "compression_training", "checkpoint", "compile",
    "tensor_parallel", "hybrid_engine",
}  # fmt: skip
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_deepspeed_config(path: str | Path | None) -> dict | None:
    """The content of a DeepSpeed json; None for None and "none". Raises InputError."""
    if path is None or str(path) == "none":
        return None
    try:
        config = read_json(path)
    except OSError:
        raise InputError(f"--deepspeed {path} can't be read: give a json file, or none") from None
    except InputError as e:
        raise InputError(f"--deepspeed {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise InputError(f"--deepspeed {path} must hold a JSON object, and so must its zero_optimization")
    check_finite(config, f"--deepspeed {path}")
    check_values(config, path)
    if not torch.accelerator.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes a minute and a C++ compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return config


def check_values(config: dict, path: str | Path):
    """Raises InputError for what DeepSpeed itself would refuse only when the model is loaded.

    The batch sizes depend on the command line: they are replaced, and `check_agreement` looks at them.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    for name in SECTIONS & config.keys():
        if not isinstance(config[name], dict):
            raise InputError(f"--deepspeed {path}: {name} is {config[name]!r}, must be an object")
    for name in BATCHES:
        if name in config and config[name] != "auto" and not (type(config[name]) is int and config[name] > 0):
            raise InputError(f"--deepspeed {path}: {name} is {config[name]!r}, must be auto or a whole number above 0")
    optimizer, schedule = (config.get(section, {}).get("type") for section in ("optimizer", "scheduler"))
    if optimizer is not None and not (
        isinstance(optimizer, str) and (optimizer.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, optimizer))
    ):
        raise InputError(
            f"--deepspeed {path}: optimizer type {optimizer!r} must be one of {', '.join(DEEPSPEED_OPTIMIZERS)}"
        )
    if schedule is not None and schedule not in VALID_LR_SCHEDULES:
        raise InputError(
            f"--deepspeed {path}: scheduler type {schedule!r} must be one of {', '.join(VALID_LR_SCHEDULES)}"
        )
    written = config.get("flops_profiler", {}).get("output_file")
    if isinstance(written, str) and Path(written).exists():
        raise InputError(f"--deepspeed {path}: flops_profiler would overwrite {written}: name a new output_file")
    known = {name: value for name, value in _without_auto(config).items() if name not in BATCHES}
    try:
        DeepSpeedConfig(known | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except Exception as e:  # DeepSpeed raises many kinds
        text = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"--deepspeed {path} holds what DeepSpeed refuses ({text[:300]})") from None


def _without_auto(value):
    """A copy without the values that the Trainer fills in."""
    if isinstance(value, dict):
        return {name: _without_auto(inner) for name, inner in value.items() if inner != "auto"}
    return value


def check_agreement(training_args, hidden_size: int, steps: int):
    """Raises InputError if the DeepSpeed json has other values than the flags, such as another learning rate.

    hidden_size: of the model; steps: of the training, of which the schedule in the json may depend.
    """
    if not training_args.deepspeed:
        return
    config = copy.deepcopy(training_args.hf_deepspeed_config)
    try:
        config.trainer_config_finalize(
            training_args, SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size)), steps
        )
    except ValueError as e:
        lines = [line.removeprefix("- ds ") for line in str(e).splitlines() if line.startswith("- ds ")] or [str(e)]
        raise InputError(
            f'--deepspeed: the json contradicts the flags: {"; ".join(lines)}; write "auto" in the json'
        ) from None


def zero_stage(deepspeed: dict) -> int:
    """The ZeRO stage of a DeepSpeed config: 0 to 3."""
    return deepspeed.get("zero_optimization", {}).get("stage", 0)


def offload_device(deepspeed: dict, what: str) -> str | None:
    """Where a DeepSpeed config moves what a GPU does not hold: "cpu", "nvme", or None. what: "optimizer" or "param"."""
    device = (deepspeed.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")
    return None if device == "none" else device
