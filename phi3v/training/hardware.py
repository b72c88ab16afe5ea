"""What this machine can do: precision, attention implementation, speed and memory of its devices."""

import os
import re
import resource
import sys
import time

import psutil
import torch
from accelerate.utils import check_cuda_p2p_ib_support, gather_object

from ..errors import InputError
from ..model.varlen import KERNELS, kernels_best_first
from ..old_versions import accelerator_memory
from ..ranks import local_world_size
from .host_memory import free_memory

ATTENTION = (*KERNELS, "sdpa", "eager")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Peak dense FLOP/s in half precision with sums in fp32, as NVIDIA publishes them; for V100, T4 and RTX 8000 in fp16. If
# several names occur as words in the name of a device, the first one is taken.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 155e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 8000": 130e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
LONGEST_MEASUREMENT = 0.8  # seconds, of the speed of a device
USABLE_SHARE = 0.9  # of a device's memory; the rest is left free in every plan
# Common GPUs and their GiB, for estimates on a machine without a GPU. Each name contains a name from PEAK_FLOPS.
GPUS = {
    "RTX 3090 24 GB": 24,
    "RTX 4090 24 GB": 24,
    "V100 32 GB": 32,
    "A100 40 GB": 40,
    "RTX 8000 48 GB": 48,
    "A100 80 GB": 80,
    "H100 80 GB": 80,
    "H200 141 GB": 141,
}


def _is_ampere() -> bool:
    """Whether there is an NVIDIA GPU of compute capability 8.0 or more, which bf16 and flash attention need."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_accelerator():
    """Raises InputError if the installed torch was not built for this GPU, on which its first kernel would fail."""
    if torch.cuda.is_available() and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability()
        # A compiled kernel runs on GPUs of the same major version and of its own or a higher minor version. For its
        # newest architecture torch also ships PTX, which runs on all later ones.
        built = [divmod(int(arch.split("_")[1].rstrip("af")), 10) for arch in torch.cuda.get_arch_list()]
        if built and not any(b[0] == major and b[1] <= minor for b in built) and (major, minor) < max(built):
            raise InputError(
                f"torch {torch.__version__} has no code for this GPU ({torch.cuda.get_device_name()}, sm_{major}{minor}"
                "): install a build of torch that does (a V100 needs one for CUDA 12), with the matching torchvision"
            )


def disable_direct_links() -> list[str]:
    """Tells NCCL not to connect GPUs directly if they can't be: several cards of the RTX 40 series with a driver older
    than 550.40.07. accelerate fails on these unless both variables are set. Variables that are set stay as they are.

    Returns the line that says so; none if nothing had to be set.
    """
    if not torch.cuda.is_available() or check_cuda_p2p_ib_support():
        return []
    unset = [name for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    settings = " and ".join(f"{name}=1" for name in unset)
    return (
        [f"RTX 40 series with an old driver: set {settings}, as NCCL needs; a newer driver is faster"] if unset else []
    )


def choose_precision(bf16: bool, fp16: bool, fp32: bool, for_another_machine: bool = False) -> str:
    """The precision that the flags ask for, as a key of DTYPES; by default fp16 on a GPU and fp32 on a CPU.

    for_another_machine: the run is only estimated, for another machine that has a GPU. Then fp16 gives "bf16",
        which takes the same memory and the same time.
    Raises InputError if the flags ask for more than one precision, or for one that this machine lacks.
    """
    asked = [name for name, on in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)) if on]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} contradict each other: give one")
    if for_another_machine:
        return "fp32" if fp32 else "bf16"
    _check_accelerator()
    has_gpu = torch.accelerator.is_available()
    precision = asked[0] if asked else ("fp16" if has_gpu else "fp32")
    if precision == "fp16" and not has_gpu:
        raise InputError("--fp16 needs a GPU: on a CPU use --bf16, or --fp32, the default there")
    if precision == "bf16" and torch.cuda.is_available() and not _is_ampere():
        raise InputError("--bf16 needs an Ampere GPU or newer: use --fp16, the default on a GPU")
    return precision


def precision_of(training_args) -> str:
    """The precision of a TrainingArguments, as a key of DTYPES."""
    return "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32"


def compute_dtype(training_args) -> torch.dtype:
    """The dtype of matrix products."""
    return DTYPES[precision_of(training_args)]


def weights_dtype(training_args, adapters_only: bool) -> torch.dtype:
    """The dtype in which the model's weights are loaded for training.

    DeepSpeed keeps an fp32 copy of half-precision weights in its optimizer, and adapters are fp32 on a frozen base.
    Otherwise the weights that the optimizer updates are fp32, and autocast computes in half precision.
    """
    return compute_dtype(training_args) if training_args.deepspeed or adapters_only else torch.float32


def choose_attention(asked: str | None, use_flash: bool, precision: str, for_another_machine: bool = False) -> str:
    """The attention implementation that the flags ask for; by default flash attention if it can run here, else sdpa.

    asked: the value of --attn_implementation, None if not given.
    use_flash: whether --use_flash_attention is given, which asks for the best kernel of flash attention.
    for_another_machine: the run is only estimated, for another machine. Then flash attention gives "sdpa",
        which takes the same memory and the same time.
    Raises InputError for an unknown implementation, if the flags contradict each other, and for flash attention if
    something that it needs is missing.
    """
    if use_flash and asked not in (None, *KERNELS):
        raise InputError(f"--use_flash_attention contradicts --attn_implementation {asked}")
    if asked is not None and asked not in ATTENTION:
        raise InputError(f"--attn_implementation {asked} is unknown: choose one of {', '.join(ATTENTION)}")
    if for_another_machine:
        return "eager" if asked == "eager" else "sdpa"
    if asked in ("sdpa", "eager"):
        return asked
    kinds = [asked] if asked else kernels_best_first()
    missing = {kind: _missing_for_flash(kind, precision) for kind in kinds}
    for kind, what in missing.items():
        if what is None:
            return kind
    if asked or use_flash:
        other = "sdpa" if _missing_for_flash("varlen", precision) else "varlen"
        raise InputError(f"flash attention needs {missing[kinds[-1]]}; --attn_implementation {other} runs without")
    return "sdpa"


def _missing_for_flash(kind: str, precision: str) -> str | None:
    """What a kernel of flash attention needs and does not have here; None if it can run."""
    if not _is_ampere():
        return "an Ampere GPU or newer"
    if precision == "fp32":
        return "half precision (--bf16 or --fp16)"
    return KERNELS[kind].lacks()


def describe_attention(kind: str, dropout: float = 0.0) -> str:
    """Which code computes attention in training, for the reader of a run's output.

    kind: as `choose_attention` returns it; dropout: of the model's attention.
    """
    if kind == "eager":
        return "eager, plain matrix products"
    sdpa = "scaled_dot_product_attention of torch"
    if kind == "sdpa":
        return f"sdpa, {sdpa}"
    if dropout:
        return f"{kind}, but in training {sdpa}, because flash attention has no dropout"
    return f"{kind}, {KERNELS[kind].describe()}"


def published_peak(name: str) -> float | None:
    """FLOP/s in half precision of the GPU with this name; None for a GPU that PEAK_FLOPS does not list."""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b", name, re.IGNORECASE)), None)


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of this process's device, and where the number comes from: published for a GPU in PEAK_FLOPS, else
    measured with a matrix product in `dtype`."""
    if torch.cuda.is_available() and (peak := published_peak(torch.cuda.get_device_name())):
        return peak, "published"
    device = best_device()
    sizes = (256, 512, 1024, 1536) if device.type == "cpu" else (1024, 4096, 8192)
    best, end = 0.0, time.perf_counter() + LONGEST_MEASUREMENT
    for n in sizes:
        rows, weight = torch.ones(2, n, n, dtype=dtype, device=device)
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)  # the layout of the model's layers; others can be slower
            wait_for_device()
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
            if time.perf_counter() + 8 * seconds > end:  # the next one, of up to twice the size, may take too long
                return best, "measured with a matrix product"
    return best, "measured with a matrix product"


def use_plain_cpu(training_args):
    """Makes a TrainingArguments and accelerate call a CPU "cpu". accelerate calls it "cpu:0", and torch copies every
    weight and every batch that is moved from "cpu" to "cpu:0"."""
    if training_args.device.type == "cpu":
        vars(training_args)["_setup_devices"] = training_args.distributed_state.device = torch.device("cpu")


def best_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def wait_for_device():
    """Waits until the accelerator, if there is one, has finished all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> int:
    """Bytes: the most that tensors have taken on the accelerator; on a CPU the largest resident size of the process."""
    if torch.accelerator.is_available():
        return accelerator_memory().max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_memory() -> float:
    """Bytes that a training process can use: the USABLE_SHARE of what is free on its GPU, or, on a CPU, of its share of
    the machine's free memory. All ranks get the smallest value of any rank, so that they make the same plan."""
    if torch.cuda.is_available():
        own = torch.cuda.mem_get_info()[0]
    else:
        own = free_memory() / local_world_size()
    return USABLE_SHARE * min(gather_object([own]))


def held_memory() -> int:
    """Bytes of main memory that this process holds; 0 on a GPU, which `device_memory` asks for what is free there."""
    return 0 if torch.accelerator.is_available() else psutil.Process().memory_info().rss
