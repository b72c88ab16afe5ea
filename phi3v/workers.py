"""The processes that prepare batches (workers of a DataLoader): how they begin and end, and what is said when one dies.

torch reports the death of a worker as a RuntimeError in the middle of whatever the main process is doing.
"""

import contextlib
import errno
import multiprocessing
import multiprocessing.queues
import os
import re
import resource
import signal
import sys
import traceback

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOST_FILES = 65_536  # that a process of ours may have open, if the system allows it
_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) "
    r"(?:is killed by signal: ([^.]*)|exited unexpectedly(?: with exit code (\d+))?)"
)
LOWER = "lower --dataloader_num_workers or --dataloader_prefetch_factor"


def begin_worker(number: int):
    """For DataLoader's `worker_init_fn`. A signal to all processes of a job concerns only the one that trains. A worker
    that can't send its batch ends: the main process would wait for this batch for ever."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # of the process that trains
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    show = sys.excepthook  # for a thread that sends what the main process no longer takes, because it ends

    def show_unless_alone(kind, error, trace):
        if not issubclass(kind, ConnectionError):
            show(kind, error, trace)

    sys.excepthook = show_unless_alone


def _end_worker(error: Exception, batch):
    code = getattr(error, "errno", None)
    if code is None:  # torch names it in the text alone: "No space left on device (28)"
        found = re.search(r"\((\d{1,3})\)\s*$", str(error))
        code = int(found[1]) if found else 1
    os._exit(code or 1)


def end_workers():
    """Ends all workers of this process at once. They ignore SIGTERM, by which Python would end them when the program
    ends, and Python would wait for them for ever."""
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error when a worker is killed
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=5)
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def raise_file_limit():
    """Lets this process open as many files as the system allows: each tensor of a waiting batch is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def explain(error: BaseException) -> str | None:
    """One line about an error that comes from workers or from a limit of this machine, with what to do; None for any
    other error."""
    if isinstance(error.__cause__, RuntimeError) and _DIED.search(str(error.__cause__)):
        error = error.__cause__  # it also has the signal or the status
    text = str(error).strip()
    # An error in a worker is raised again with the worker's traceback as its text.
    last = text.rpartition("\n")[2]
    code = getattr(error, "errno", None)
    if (died := _DIED.search(text)) and isinstance(error, RuntimeError):
        pid, killer, status = died.groups()
        code = int(status or 0)
        who = f"a process that prepares images (pid {pid}) "
        if killer == "Killed" or not killer and not status:  # torch has not seen how it ended
            return (
                f"{who}was killed, most likely by the system because memory ran out: {LOWER}, or give the job more "
                "memory"
            )
        if code not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC) and killer != "Bus error":
            how = f"died of the signal {killer!r}" if killer else f"ended with status {status}"
            return f"{who}{how}: --dataloader_num_workers 0 shows where"
        if code in (0, errno.ENOSPC):
            return f"{who}ended, because /dev/shm is full: {SHM_HELP}"
    if code in (errno.EMFILE, errno.ENFILE) or re.search(r"Too many open files|items of ancdata", last):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"too many open files (this process may have {limit:,}): run `ulimit -n {max(4096, 4 * limit)}` before you "
            f"start, which an administrator may have to allow, or {LOWER}"
        )
    if "shared memory" in last and "No space left" in last:
        return f"/dev/shm is full: {SHM_HELP}"
    if isinstance(error, MemoryError) and "DataLoader worker" in text:
        return f"a process that prepares images ran out of memory: {LOWER}, or give the job more memory"
    forking = any(frame.f_code.co_name == "_launch" for frame, _ in traceback.walk_tb(error.__traceback__))
    if forking and isinstance(error, OSError):
        return f"the system starts no more processes ({last}): {LOWER}, or raise its limits (`ulimit -u`, memory)"
    return None


SHM_HELP = (
    f"{LOWER}; or give the container more shared memory (docker run --shm-size 16g; in Kubernetes an emptyDir with "
    "medium Memory at /dev/shm)"
)
