"""Writing files so that they appear whole or not at all, whatever happens while they are written."""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

MARK = ".being_written"  # an empty file in a folder that is not complete yet; only such folders are deleted
LARGEST_JSON = 256 << 20  # bytes; the tokenizer.json of a large vocabulary has about 20 MB


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = True, several_writers: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write to. When the block ends, the file written there takes the place of `path`;
    after an exception it is deleted, and `path` is as it was.

    durable: waits until the content is on the disk, so that the file is whole even after a power failure.
    several_writers: other processes may write the same file at the same time; the last one to finish wins.
    """
    path = Path(path)
    unique = f".{uuid.uuid4().hex}" if several_writers else ""
    partial = path.with_name(f"{path.name}{unique}.partial")
    try:
        yield partial
        if durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | Path, earlier: Container[str] = ()) -> Iterator[Path]:
    """Gives a new folder beside `path` to fill, which holds only MARK. When the block ends, that folder becomes `path`,
    which must not exist or must be an empty folder, or a link to one; after an exception it is deleted with everything
    in it.

    earlier: the names of what earlier versions, which made no MARK, left there when they were killed. Raises InputError
    if another process is filling the folder, or if something of its name is there that is not ours.
    """
    path = Path(os.path.realpath(path))
    if path.is_mount():  # which can't be replaced when all the work has been done
        raise InputError(f"{path} is where a file system is mounted: choose a new folder in it, such as {path / 'new'}")
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        is_folder = partial.is_dir() and not partial.is_symlink()
        names = os.listdir(partial) if is_folder else []
        if not is_folder or MARK not in names and any(name not in earlier for name in names):
            raise InputError(
                f"{partial} is in the way, and was not made by this program: move it away, or choose another folder "
                f"than {path}"
            )
        with _locked(partial / MARK):
            shutil.rmtree(partial)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        with _locked(partial / MARK):
            yield partial
            (partial / MARK).unlink()
            if path.exists():
                path.rmdir()
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(mark: Path) -> Iterator[None]:
    """Makes the mark if need be, and locks it until the block or the process ends. Raises InputError if another
    process has locked it."""
    with open(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing to {mark.parent}: wait until it ends") from None
        except OSError:  # a file system without locks
            pass
        yield


def write_text(path: str | Path, text: str):
    with replacing(path, several_writers=True) as partial:  # whose name no other file has
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict, sort_keys: bool = False):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading. Raises InputError for whatever is no regular file: reading from a named pipe or a
    device can wait for ever. What is opened is checked, so that the file can't be swapped after the check."""
    if stat.S_ISREG(os.stat(path).st_mode):  # some devices do something when they are opened
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise InputError(f"{path} is not a regular file: give a file that holds data, not a folder, pipe or device")


def read_json(path: str | Path):
    """The content of a JSON file. Raises InputError, with the file's name, for what is not JSON in UTF-8, is nested
    too deeply to be read, or is larger than `LARGEST_JSON`; OSError if the file can't be opened."""
    with open_regular(path) as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise InputError(
            f"{path} has more than {LARGEST_JSON >> 20} MiB, which is too large for a JSON file of settings"
        )
    try:
        return json.loads(content)
    except RecursionError:
        raise InputError(f"{path} is not readable: its JSON is nested too deeply") from None
    except ValueError as e:
        raise InputError(f"{path} is not valid JSON ({e})") from None


def let_others_read(folder: str | Path):
    """Gives the weights in a folder the permissions of its other files. safetensors lets only the owner read them, and
    a model server or a colleague is often another user."""
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(next(path.parent.glob("*config.json"), path).stat().st_mode & 0o777)
