"""Which of the training processes this one is, and how they find one another."""

import atexit
import contextlib
import datetime
import os
import sys
import threading

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process among all that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, on all nodes."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


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


def join_after_restart(timeout: float) -> bool:
    """Joins the other processes if torchrun has restarted this one after a failure; returns whether it has.

    timeout: of collective operations, in seconds.

    torch 2.14 itself fails at this: the restarted processes look one another up in the store of torchrun's agent under
    the names of the first attempt, and find processes that no longer exist. Each attempt has names of its own here.
    """
    environment = os.environ
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        limit = datetime.timedelta(seconds=timeout)
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(environment["LOCAL_RANK"]))
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = dist.TCPStore(host, port, world_size(), is_master=False, timeout=limit)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"attempt-{attempt}", store),
            rank=rank(),
            world_size=world_size(),
            timeout=limit,
        )
    return attempt > 0


def end_process(status: int):
    """Ends this process with `status`, and with status 0 first leaves the process group.

    With gloo, Python's own way to end is not safe: one of gloo's threads may still have to let go of a tensor, for
    which it needs Python, and a thread that asks for Python at that moment aborts the process. DeepSpeed's hooks keep
    gloo's threads alive until the end. So the process does what Python does at its end, except for taking itself down.
    """
    if dist.is_initialized() and status == 0:  # after an error, the other ranks may still wait for this one
        dist.destroy_process_group()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the reader, as `| head` does
            stream.flush()
    os._exit(status)
