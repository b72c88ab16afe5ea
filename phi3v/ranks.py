"""Which of the training processes this one is.

Converters import this module too, so it does not load torch, which takes seconds.
"""

import atexit
import contextlib
import os
import sys
import threading


def _process_group():
    """torch.distributed if this process has joined a process group, for which it must have been imported; else None."""
    dist = sys.modules.get("torch.distributed")
    is_initialized = getattr(dist, "is_initialized", None)  # it has none while it is being imported
    return dist if is_initialized and is_initialized() else None


def rank() -> int:
    """The number of this process among all that train together, from 0."""
    group = _process_group()
    return group.get_rank() if group else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, on all nodes."""
    group = _process_group()
    return group.get_world_size() if group else int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """How many of these processes run on this node and share its CPU cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is rank 0, which prints and writes files for all ranks."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process among those on its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first_of_node() -> bool:
    """Whether this is the first process of its node, which fetches files for all processes of the node."""
    return local_rank() == 0


def start_alone():
    """Makes this process a world of one if torchrun did not start it: sets the variables that torch, accelerate and
    DeepSpeed read."""
    if "RANK" not in os.environ:
        # Port 0 is any free one, which the system chooses when the process group is made. A port chosen here could be
        # taken by another program until then, because the model and the data are loaded in between.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def end_process(status: int):
    """Ends this process with `status`, and with status 0 first leaves the process group.

    With gloo, Python's own way to end is not safe: one of gloo's threads may still have to let go of a tensor, for
    which it needs Python, and a thread that asks for Python at that moment aborts the process. DeepSpeed's hooks keep
    gloo's threads alive until the end. So the process does what Python does at its end, except for taking itself down.
    """
    if (group := _process_group()) and status == 0:  # after an error, the other ranks may still wait for this one
        group.destroy_process_group()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the reader, as `| head` does
            stream.flush()
    os._exit(status)
