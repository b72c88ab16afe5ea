"""What is said when a process that prepares batches dies, or the machine has too little of something."""

import errno
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from phi3v import workers
from phi3v.data import loading
from phi3v.data.loading import batches_of, make_loader
from phi3v.errors import InputError, exit_on_input_error
from phi3v.signals import stop_signals
from phi3v.training.stopping import Interrupted, Preemption
from phi3v.workers import explain

MEMORY, SHM, FILES = "memory ran out: lower --dataloader_num_workers", "/dev/shm is full: lower", "ulimit -n"
IN_WORKER = (
    "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n{0}: {1}\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), MEMORY),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), MEMORY),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), SHM),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 28. Details are lost"), SHM),
        (
            RuntimeError(IN_WORKER.format("RuntimeError", "unable to … shared memory …: No space left on device (28)")),
            SHM,
        ),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 24. Details are lost"), FILES),
        (RuntimeError("received 0 items of ancdata"), FILES),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), FILES),
        (OSError(errno.EMFILE, "Too many open files"), FILES),
        (OSError(IN_WORKER.format("OSError", "[Errno 24] Too many open files: 'a.png'")), FILES),
        (MemoryError(IN_WORKER.format("MemoryError", "")), "ran out of memory: lower --dataloader_num_workers"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
            "num_workers 0 shows where",
        ),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1."), "ended with status 1"),
        (RuntimeError("CUDA error"), None),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "), None),
        (RuntimeError(IN_WORKER.format("RuntimeError", "something else\nToo many open files\nend")), None),
    ],
)
def test_each_death_is_explained_in_one_line(error, said):
    text = explain(error)
    assert text is None if said is None else said in text and "\n" not in text


def test_the_limit_of_open_files_is_raised(monkeypatch):
    for limits, wanted in (((1024, 4096), 4096), ((64, 64), None), ((1024, resource.RLIM_INFINITY), 65_536)):
        asked = []
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=limits: limits)
        monkeypatch.setattr(resource, "setrlimit", lambda kind, new, asked=asked: asked.append(new[0]))
        workers.raise_file_limit()
        assert asked == ([wanted] if wanted else [])


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


class Items:
    """Items that one batch each is made of; some are what goes wrong."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        if item == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "sleeps":
            time.sleep(600)
        return Unsendable() if item == "can not be sent" else item


def loader(*items):
    return make_loader(Items(*items), num_workers=2, batches=len(items), batch_size=None, collate_fn=lambda item: item)


@pytest.mark.slow
@pytest.mark.parametrize(("item", "said"), [("killed", MEMORY), ("can not be sent", SHM)])
def test_a_worker_that_dies_ends_the_program_in_one_line(item, said, capfd):
    def main():
        for batch in batches_of(loader("good", item, "good")):
            assert batch == "good"

    start = time.monotonic()
    with pytest.raises(SystemExit) as status:
        exit_on_input_error(main)
    err = capfd.readouterr().err
    assert status.value.code == 2 and err.startswith("error: a process that prepares images") and said in err
    assert err.count("\n") == 1 and time.monotonic() - start < 200 and not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("has_signal", [False, True])
def test_a_batch_that_never_comes_is_an_error_and_a_signal_ends_the_wait(has_signal, monkeypatch, capfd):
    monkeypatch.setattr(loading, "POLL", 0.1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits at the end
    monkeypatch.setattr(loading, "LONGEST_WAIT", 0.5 if not has_signal else 50)
    monkeypatch.setattr("phi3v.training.stopping.LONGEST_WAIT", 0.3)
    Preemption()
    stop_signals.until = "after this step"
    try:
        if has_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        wanted = Interrupted if has_signal else InputError
        with pytest.raises(wanted, match=None if has_signal else "made no batch for [0-9]+ s: .*_workers"):
            for _ in batches_of(loader("good", "sleeps")):
                pass
    finally:
        workers.end_workers()
        loading.on_long_wait.clear()
    assert ("stops waiting, as a signal has come" in capfd.readouterr().err) == has_signal
    assert not multiprocessing.active_children()
