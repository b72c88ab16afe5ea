"""How the libraries are loaded: without work that most runs do not need, and without notices that ask for nothing."""

import contextlib
import functools
import gc
import logging
import types
import warnings
from collections.abc import Iterator

import torch

# Notices that mean nothing here, by the logger that prints them.
NOTICES = {
    # DeepSpeed's config takes the number of accumulated micro-batches from the Trainer, so the two can't differ.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # The user knows whether there is a GPU, and the start of a run says how much memory its device has.
    "DeepSpeed": "Setting accelerator to CPU",
    # A faster kernel for 4-bit layers on a CPU, which would be downloaded from the Hub.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# Warnings that mean nothing here: their class, and a regular expression for how they begin.
WARNINGS = [
    (FutureWarning, ".*is deprecated"),  # libraries call functions of one another under names that have since changed
    (UserWarning, "OMP_NUM_THREADS/MKL_NUM_THREADS unset"),  # accelerate then takes as many threads as there are cores
]


def hide_notices():
    """Hides NOTICES and WARNINGS, and nothing else."""
    for name, text in NOTICES.items():
        logging.getLogger(name).addFilter(functools.partial(_is_other, text))
    for category, beginning in WARNINGS:
        warnings.filterwarnings("ignore", beginning, category)


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Libraries that are imported in the block take about two thirds of the CPU time.

    Python's garbage collector would look through a million new objects again and again, none of which is garbage. And
    bitsandbytes, which peft imports in every mode, calls torch.compile, which loads torch's compiler."""
    was_enabled = gc.isenabled()
    gc.disable()
    compile_now, torch.compile = torch.compile, compile_later
    try:
        yield
    finally:
        torch.compile = compile_now
        if was_enabled:
            gc.enable()


_compile = torch.compile


def compile_later(function=None, **options):
    """torch.compile, except that it compiles a function when the function is first called."""
    if function is None:
        return functools.partial(compile_later, **options)
    if not isinstance(function, types.FunctionType):
        return _compile(function, **options)
    compiled = functools.cache(lambda: _compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))
