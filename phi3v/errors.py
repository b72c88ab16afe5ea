"""Wrong input: one line from one rank, and the exit status that says so."""

import contextlib
import os
import sys
import time

import torch.distributed as dist
from safetensors import SafetensorError


class InputError(ValueError):
    """Something a user gave is wrong: one line that says where, what, and what to do."""


@contextlib.contextmanager
def blaming(flag: str, value):
    """Turns what libraries raise for a wrong value into an InputError that names the flag and the value."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        raise InputError(f"--{flag} {value}: {' '.join(str(e).split())}") from None


def exit_on_input_error(main):
    """Calls `main`. An InputError ends the process with a line `error: …` and status 2, without a traceback."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # else its threads now and then abort the process when Python ends
    except InputError as e:
        if int(os.environ.get("RANK", 0)) > 0:
            # Rank 0 meets most errors too. It reports them, and torchrun ends this process before it wakes up.
            time.sleep(20)
        # From a loader's worker the message comes behind the worker's traceback, and with the class's name.
        message = str(e).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
