"""How the training processes join one another, and what they do one after another."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from . import phases
from .errors import InputError
from .ranks import rank, world_size


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


@contextlib.contextmanager
def first_of_node(training_args, desc: str):
    """The first process of each node runs the block before the others, to fill caches that these read.

    training_args: a TrainingArguments; desc: what is found in the block, such as "data". If a process raises InputError
    in the block, all of them raise it: otherwise the others would go on, and end with a traceback when they miss that
    process.
    """
    failure = None
    with training_args.main_process_first(desc=desc):
        try:
            yield
        except InputError as e:
            failure = str(e)
    phases.ended(f"finding the {desc}")
    if failures := [text for text in gather_object([failure]) if text]:
        raise InputError(failures[0])
