"""Refuses a run that can't fit into memory, before any weight is read or downloaded.

The kernel kills a process that needs more main memory than there is, without a word. So a run is refused if the part
that it needs whatever its data are exceeds the memory: weights, gradients and optimizer states. Compared is with all of
the memory, not with what is free now: other programs may end, and a run that might fit is never refused. What is free
decides on the plan, which a run prints before it loads weights, and which says when memory may not suffice.
"""

import copy
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from transformers import TrainingArguments

from ..deepspeed_config import offload_device, read_deepspeed_config, zero_stage
from ..errors import NEEDS_LESS, InputError
from ..model.configuration_phi3v import Phi3VConfig
from ..model.loading import not_quantized, outline_of
from ..ranks import local_world_size, world_size
from .estimate import ADAM_BYTES, Estimate
from .hardware import USABLE_SHARE, weights_dtype
from .host_memory import memory_limit
from .outline import estimate_run
from .workload import workload_of_example

CONFIGS = Path(__file__).resolve().parents[2] / "ds_config"
# Bytes that optimizers keep for each parameter. Others may keep less, so nothing is counted for them.
MOMENT_BYTES = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "stable_adamw"), ADAM_BYTES)
MOMENT_BYTES |= dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), 2.0)
MOMENT_BYTES |= {"adagrad": 4.0, "rmsprop": 4.0, "lion_32bit": 4.0, "lion_8bit": 1.0}
MOST_GPUS = 16  # that an advice names


def check_training(args, training_args: TrainingArguments, choose_trained: Callable, folder: Path):
    """Raises InputError if training can't fit into the memory of this process, with the flags that would fit.

    It talks to no other rank. args, training_args: as `parse_arguments` returns them.
    choose_trained: the script's function that freezes parts of a model or puts adapters on it.
    folder: where the model's config.json lies; one that can't be read is left to the code that loads the model.
    """
    run = SimpleNamespace(
        **{name: getattr(training_args, name) for name in ("deepspeed", "world_size", "bf16", "fp16")}
    )
    try:
        config = Phi3VConfig.from_pretrained(folder)
        estimate = estimate_run(args, run, [], choose_trained, folder)
    except (OSError, ValueError):
        return
    estimate.moment_bytes = _moment_bytes(training_args)
    parts = dict(zip(("weights", "gradients", "optimizer states"), estimate.standing(), strict=True))
    if any(name in training_args.optim.value for name in ("lomo", "layerwise")):
        parts["gradients"] = 0.0  # each is dropped as soon as it has been used
    shortage = _shortage(parts, training_args.device) if estimate.on_gpu else _shortage(parts)
    if estimate.on_gpu and not shortage:
        shortage = _shortage(_parts_on_host(estimate, args, run, config))
    if shortage:
        fitting = _flags_that_fit(args, run, choose_trained, folder, config, training_args.device)
        advice = _advice(fitting, "training on examples with one image")
        raise InputError(f"training can't fit into memory: {shortage}; {advice}")


def check_weights(
    folder: Path, dtype: torch.dtype, device: torch.device, quantize: bool, quantize_vision: bool,
    flags: dict[str, str], ranks: int = 1,
):  # fmt: skip
    """Raises InputError if the weights of a whole model can't fit into the memory of this process, to evaluate it.

    dtype: in which they are loaded; device: on which they are used; quantize: whether in 4 bits, quantize_vision: those
    of the vision model too.
    flags: what the program calls "bf16" and "4 bits", to name them where they would fit.
    ranks: among which ZeRO-3 divides the weights.
    """
    try:
        config = Phi3VConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return
    on_gpu = device.type != "cpu"

    def needed(dtype: torch.dtype, quantize: bool) -> tuple[dict[str, float], dict[str, float]]:
        """What the device needs, and what main memory needs of it."""
        model = outline_of(config).to(dtype).requires_grad_(False)
        kept = not_quantized(quantize_vision) if quantize else None
        estimate = Estimate(model, [], 1, dtype.itemsize, None, kept, on_gpu)
        weights, as_saved = estimate.standing()[0] / ranks, estimate.frozen * dtype.itemsize / ranks
        converted = 0.0 if _is_mapped(config, dtype) else as_saved
        if on_gpu:
            return {"weights": weights}, {"weights while they are loaded": 0.0 if quantize or ranks > 1 else converted}
        return {"weights": weights}, {"weights": weights - as_saved + converted}

    of_device, of_host = needed(dtype, quantize)
    shortage = (on_gpu and _shortage(of_device, device)) or _shortage(of_host)
    if shortage:
        fitting = {}
        tries = {"bf16": (torch.bfloat16, quantize), "4 bits": (dtype, True)}
        for name, (other, quantized) in tries.items():
            of_device, of_host = needed(other, quantized)
            main = of_host if on_gpu else of_device
            fits = _fits(main) and (not on_gpu or _fits(of_device, device))
            if fits and (other, quantized) != (dtype, quantize) and other.itemsize <= dtype.itemsize:
                fitting[flags[name]] = of_device["weights"]
        advice = _advice(fitting, "the weights")
        raise InputError(f"the model can't fit into memory: {shortage}; {advice}")


def _moment_bytes(training_args) -> float:
    own = (training_args.deepspeed or {}).get("optimizer")
    if own:  # the json's optimizer takes the place of --optim
        return ADAM_BYTES if str(own.get("type")).lower() in ("adam", "adamw") else 0.0
    return MOMENT_BYTES.get(training_args.optim.value, 0.0)


def _is_mapped(config: Phi3VConfig, dtype: torch.dtype) -> bool:
    """Whether weights on a CPU are pages of their file, which the kernel drops when memory is short, because they need
    not be converted. DistributedDataParallel writes to all weights, so that none is left of them in training."""
    return config.dtype in (None, dtype)


def _parts_on_host(estimate: Estimate, args, training_args, config: Phi3VConfig) -> dict[str, float]:
    """What a process that trains on a GPU needs in main memory: for loading, or later for what DeepSpeed offloads."""
    deepspeed, size = estimate.deepspeed, estimate.stream_bytes
    stage, share, offloaded = zero_stage(deepspeed), estimate.trained / estimate.world_size, 0.0
    if offload_device(deepspeed, "optimizer") == "cpu":
        # fp32 weights, moments, and gradients or new weights in the model's dtype; before ZeRO-3 gradients in fp32 too
        for_each = 4 + estimate.moment_bytes + size + (4 if stage < 3 else 0)
        offloaded = share * for_each * deepspeed["zero_optimization"]["offload_optimizer"].get("ratio", 1.0)
    if offload_device(deepspeed, "param") == "cpu" and stage == 3:
        offloaded += (estimate.trained + estimate.frozen) / estimate.world_size * size
    loading = 0.0
    if not (args.use_qlora or stage == 3 or _is_mapped(config, weights_dtype(training_args, args.use_lora))):
        loading = (estimate.trained + estimate.frozen) * size
    if offloaded > loading:
        return {"what DeepSpeed offloads": offloaded}
    return {"weights while they are loaded": loading}


def _room(device: torch.device | None, processes: int) -> float:
    """Bytes that a process can have at most: of a GPU, or with None of main memory, which `processes` share. Infinite
    for an accelerator that torch.cuda does not know."""
    if device is None:
        return memory_limit() / processes
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")


def _held(device: torch.device | None) -> float:
    """Bytes of main memory that this process holds already, without pages of files, which the kernel can drop."""
    info = psutil.Process().memory_info()
    return 0.0 if device else info.rss - getattr(info, "shared", 0)


def _fits(
    parts: dict[str, float], device: torch.device | None = None, processes: int | None = None, share=USABLE_SHARE
):
    return sum(parts.values()) + _held(device) <= share * _room(device, processes or local_world_size())


def _shortage(parts: dict[str, float], device: torch.device | None = None) -> str | None:
    """What exceeds the memory, as a text; None if it does not. parts: bytes by name."""
    if _fits(parts, device, share=1.0):
        return None
    processes, held = local_world_size(), _held(device)
    *first, last = [f"{name} {size / 2**30:.1f}" for name, size in parts.items() if size]
    needed = f"{', '.join(first)} and {last}" if first else last
    text = f"{needed} GiB" + (f", beside {held / 2**30:.1f} GiB that the process holds already," if held else "")
    room, whole = (f"{_room(device, n) / 2**30:.1f} GiB" for n in (processes, 1))
    limit = f"the {room} of this GPU"
    if not device:
        limit = f"the {room} of main memory" + (f" that each of {processes} processes has" if processes > 1 else "")
        limited = _room(None, 1) < psutil.virtual_memory().total
        limit += f" ({whole} together)" if processes > 1 else ""
        limit += ", which the limit of a container or a job allows" if limited else ""
    place = f" on {platform.node()}" if world_size() > processes else ""
    verb = "are" if first or not last.startswith("what") else "is"
    return f"{text} {verb} more than {limit}{place}"


def _advice(fitting: dict[str, float], what: str) -> str:
    """fitting: the bytes that a process is expected to need for `what`, by the flags with which it fits."""
    if not fitting:
        return f"none of the flags that need less would make it fit; {NEEDS_LESS}"
    listed = ", ".join(f"{flags} ({size / 2**30:.1f} GiB)" for flags, size in fitting.items())
    return f"by the estimate, {what} would fit with any of these: {listed}"


def _flags_that_fit(args, run, choose_trained: Callable, folder: Path, config: Phi3VConfig, device) -> dict[str, float]:
    """The expected peak of a process, for each change to the command line with which a run would fit."""
    on_gpu, fitting = torch.accelerator.is_available(), {}
    crops = args.num_crops + 1
    page = workload_of_example(tokens=157 * crops + 200, crops=crops, targets=32)  # 157 tokens a crop are the most

    def peak(of_args: dict, of_run: dict) -> float | None:
        """None if it does not fit."""
        changed, changed_run = copy.copy(args), SimpleNamespace(**vars(run) | of_run)
        for name, value in of_args.items():
            setattr(changed, name, value)
        estimate = estimate_run(changed, changed_run, [], choose_trained, folder)
        size = estimate.memory(page, "all").peak
        parts = {"": size}
        if not on_gpu:
            return size if _fits(parts) else None
        processes = local_world_size() * changed_run.world_size // run.world_size
        host = _parts_on_host(estimate, changed, changed_run, config)
        return size if _fits(parts, device) and _fits(host, None, processes) else None

    in_full_precision = not (run.bf16 or run.fp16)
    for flags, of_args, of_run in _changes(args, run, on_gpu):
        size = peak(of_args, of_run)
        if size is None and in_full_precision and "bf16" not in of_run and "--bf16" not in fitting:
            flags, size = f"{flags} --bf16", peak(of_args, of_run | {"bf16": True})
        if size is not None:
            fitting[flags] = size
    return fitting


def _changes(args, run, on_gpu: bool) -> Iterator[tuple[str, dict, dict]]:
    """(flags, values of `args`, values of the TrainingArguments) that need less memory, those that change the result
    least first."""
    known = {name: CONFIGS / f"{name}.json" for name in ("zero2", "zero3", *(["zero2_offload"] if on_gpu else []))}
    known = {name: read_deepspeed_config(path) for name, path in known.items() if path.is_file()}
    if not args.use_lora:
        for name, config in known.items():
            if config != run.deepspeed:
                yield f"--deepspeed ds_config/{name}.json", {}, {"deepspeed": config}
    if on_gpu:
        for n in (n for n in (2, 4, 8, MOST_GPUS) if n > run.world_size):
            yield f"{n} such GPUs", {}, {"world_size": n}
    elif not (run.bf16 or run.fp16):
        yield "--bf16", {}, {"bf16": True}
    trains_vision = args.vision_training != "default" or args.train_separators or args.vision_lr or args.projector_lr
    if not (args.freeze_vision_model or args.adapter_folder or trains_vision):  # which contradict it
        yield "--freeze_vision_model", {"freeze_vision_model": True}, {}
    if args.train_projector:  # contradicts adapters
        return
    without = " without --deepspeed" if run.deepspeed and (args.use_lora or run.deepspeed != known.get("zero2")) else ""
    if not args.use_lora:
        yield f"--use_lora{without}", {"use_lora": True}, {"deepspeed": None}
    if not args.use_qlora:
        yield f"--use_qlora{without}", {"use_lora": True, "use_qlora": True}, {"deepspeed": None}
