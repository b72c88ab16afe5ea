"""What the machine at hand can do, said before anything is loaded."""

import torch
from transformers.utils import is_flash_attn_2_available

from ..errors import InputError

ATTENTION = ("flash_attention_2", "sdpa", "eager")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _is_ampere() -> bool:
    """An NVIDIA GPU of compute capability 8.0 or more, from which on there are bf16 and flash attention."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_accelerator():
    """Raises InputError for a GPU that the installed torch was not built for; its first kernel would fail."""
    if torch.cuda.is_available() and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability()
        # A cubin runs on its own major version from its minor upwards; PTX, which torch ships for its newest
        # architecture, on everything later.
        built = [divmod(int(arch.split("_")[1].rstrip("af")), 10) for arch in torch.cuda.get_arch_list()]
        if built and not any(b[0] == major and b[1] <= minor for b in built) and (major, minor) < max(built):
            raise InputError(
                f"torch {torch.__version__} has no code for this GPU ({torch.cuda.get_device_name()}, sm_{major}{minor}"
                "): install a build of torch that does (a V100 needs one for CUDA 12), with the matching torchvision"
            )


def choose_precision(bf16: bool, fp16: bool, fp32: bool, elsewhere: bool = False) -> str:
    """The precision asked for, by default fp16 on a GPU and fp32 on a CPU, as a key of DTYPES.

    elsewhere: for the estimate of a run on another machine, with a GPU; bf16 stands for fp16 then, which takes as much.
    Raises InputError where more than one is asked for, or one that this machine lacks.
    """
    asked = [name for name, on in (("bf16", bf16), ("fp16", fp16), ("fp32", fp32)) if on]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} contradict each other: give one")
    if elsewhere:
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
    """Of a TrainingArguments, as a key of DTYPES."""
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


def choose_attention(asked: str | None, use_flash: bool, precision: str, elsewhere: bool = False) -> str:
    """The attention implementation asked for, by default flash attention where it can run, else sdpa.

    use_flash: asks for flash attention in other words. elsewhere: for the estimate of a run on another machine; sdpa
    stands for flash attention then, which takes as much. Raises InputError for an unknown one, for a contradiction, and
    for flash attention where something that it needs is missing.
    """
    if use_flash and asked not in (None, "flash_attention_2"):
        raise InputError(f"--use_flash_attention contradicts --attn_implementation {asked}")
    asked = "flash_attention_2" if use_flash else asked
    if asked is not None and asked not in ATTENTION:
        raise InputError(f"--attn_implementation {asked} is unknown: {', '.join(ATTENTION)}")
    if elsewhere:
        return "eager" if asked == "eager" else "sdpa"
    missing = None
    if not _is_ampere():
        missing = "an Ampere GPU or newer"
    elif not is_flash_attn_2_available():
        missing = "the package flash-attn (MAX_JOBS=32 pip install flash-attn --no-build-isolation)"
    elif precision == "fp32":
        missing = "half precision (--bf16 or --fp16)"
    if asked == "flash_attention_2" and missing:
        raise InputError(f"flash attention needs {missing}: or use --attn_implementation sdpa")
    return asked or ("sdpa" if missing else "flash_attention_2")
