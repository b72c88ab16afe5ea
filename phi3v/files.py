"""Writing files so that they appear whole or not at all, whatever happens while they are written."""

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

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
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new, empty folder beside `path` to fill. When the block ends, that folder becomes `path`, which must not
    exist or must be an empty folder; after an exception it is deleted with everything in it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str):
    with replacing(path, several_writers=True) as partial:  # whose name no other file has
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict, sort_keys: bool = False):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading. Raises InputError for whatever is no regular file: reading from a named pipe or a
    device can wait for ever. What is opened is checked, so that the file can't be swapped after the check."""
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
