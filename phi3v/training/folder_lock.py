"""Only one run at a time writes to an output folder.

Rank 0 locks a file in it, with a lock of POSIX: the system lets it go when the process ends, however it ends, and it
holds between the machines that share a folder over NFS. The processes that prepare images do not inherit it.
"""

import atexit
import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
from pathlib import Path

from ..console import say
from ..errors import InputError
from ..ranks import is_first
from .own_files import LOCK

HELD = (errno.EACCES, errno.EAGAIN)
_held: dict[Path, int] = {}  # the open lock file of this process


def lock_folder(output_dir: Path, dry_run: bool = False):
    """Locks an output folder until `unlock_folder` or the end of this process. Every rank calls it.

    dry_run: `output_dir` is OUT/dry_run, which is deleted before and after, so the lock file is in OUT.
    Raises InputError on rank 0 if another run is in the folder. On a file system without locks, rank 0 says so.
    """
    if not is_first():
        return
    unlock_folder()  # of an earlier run in this process
    path = output_dir.with_name(f".{output_dir.name}{LOCK}") if dry_run else output_dir / LOCK
    while True:
        file = _open(path, output_dir)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = _holder(file)
            os.close(file)
            if e.errno in HELD:
                raise InputError(
                    f"--output_dir {output_dir} is in use by {holder}: wait until that run ends, stop it, or choose "
                    "another --output_dir"
                ) from None
            say(
                f"warning: {output_dir} is on a file system that can't lock files ({e.strerror}): a second run in the "
                "same folder would not be noticed"
            )
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)  # the run before has deleted this file, and the next run would make another one
    started = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    content = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started})
    with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
        os.ftruncate(file, 0)
        os.pwrite(file, content.encode(), 0)
    # This process must not open the file again: closing it would let the lock go.
    _held[path] = file


def unlock_folder():
    """Lets go of the folder that this process has locked, and deletes the lock file."""
    while _held:
        path, file = _held.popitem()
        path.unlink(missing_ok=True)
        os.close(file)


atexit.register(unlock_folder)


def _open(path: Path, output_dir: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o666)
    except OSError as e:
        raise InputError(f"--output_dir {output_dir}: its lock file {path} can't be opened: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise InputError(f"--output_dir {output_dir}: {path} is not a regular file, and is in the way of the lock file")
    return file


def _holder(file: int) -> str:
    try:
        content = json.loads(os.pread(file, 4096, 0))
        host, process, started = content["host"], content["process"], content["started"]
    except (OSError, ValueError, KeyError, TypeError):  # it has not been written yet
        return "another run"
    return f"a run on {host!s:.100}, process {process!s:.20}, since {started!s:.40}"
