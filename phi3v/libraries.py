"""How the libraries are loaded: without work that most runs do not need, and without notices that ask for nothing."""

import contextlib
import functools
import gc
import logging
import sys
import types
import warnings
from collections.abc import Iterator

# Notices that mean nothing here, by the logger that prints them.
NOTICES = {
    # DeepSpeed's config takes the number of accumulated micro-batches from the Trainer, so the two can't differ.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # The user knows whether there is a GPU, and the start of a run says how much memory its device has.
    "DeepSpeed": "Setting accelerator to CPU",
    # A faster kernel for 4-bit layers on a CPU, which would be downloaded from the Hub.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # tools/merge_adapter.py --dequantize says what it saves.
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
}
# Warnings that mean nothing here: their class, and a regular expression for how they begin.
WARNINGS = [
    (FutureWarning, ".*is deprecated"),  # libraries call functions of one another under names that have since changed
    (UserWarning, "OMP_NUM_THREADS/MKL_NUM_THREADS unset"),  # accelerate then takes as many threads as there are cores
]


def hide_notices():
    """Hides NOTICES, and nothing else."""
    for name, text in NOTICES.items():
        logging.getLogger(name).addFilter(functools.partial(_is_other, text))


def hide_warnings():
    """Hides WARNINGS, and nothing else, in a program of ours: whoever imports phi3v may want to see them. So may a user
    who gives `python -W` or PYTHONWARNINGS."""
    if not sys.warnoptions:
        for category, beginning in WARNINGS:
            warnings.filterwarnings("ignore", beginning, category)


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


@contextlib.contextmanager
def quick_imports(for_good: bool = False) -> Iterator[None]:
    """Libraries that are imported in the block take about two thirds of the CPU time.

    Python's garbage collector would look through a million new objects again and again, none of which is garbage. And
    bitsandbytes, which peft imports in every mode, calls torch.compile, which loads torch's compiler.

    for_good: the collector never looks at any of the objects that exist now, as in a program that has just begun."""
    was_enabled = gc.isenabled()
    gc.disable()
    import torch  # here, because it is one of the libraries that load more quickly

    compile_now, torch.compile = torch.compile, functools.partial(_compile_later, torch.compile)
    try:
        yield
    finally:
        torch.compile = compile_now
        if for_good:
            gc.freeze()
        if was_enabled:
            gc.enable()


def _compile_later(compile_now, function=None, **options):
    """What torch.compile does, except that a function is compiled when it is first called."""
    if function is None:
        return functools.partial(_compile_later, compile_now, **options)
    if not isinstance(function, types.FunctionType):
        return compile_now(function, **options)
    compiled = functools.cache(lambda: compile_now(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))
