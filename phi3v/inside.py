"""Files in folders that strangers may have filled: what is opened lies in the folder, wherever links lead."""

import fcntl
import os
import re
from collections.abc import Sequence
from typing import BinaryIO

from .errors import InputError
from .files import open_regular

# A snapshot in the cache of the Hub. Its files are links to files in the folder `blobs` beside `snapshots`.
_SNAPSHOT = re.compile(r"(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?", re.DOTALL)


class Outside(ValueError):
    """A file lies outside of the folder that it must lie in."""


class Inside(str):
    """A path that `open_file` opens only if the file that it leads to lies in one of `folders`."""

    __slots__ = ("folders",)

    def __new__(cls, path: str, folders: tuple[str, ...]):
        made = super().__new__(cls, path)
        made.folders = folders
        return made

    def __getnewargs__(self):  # for pickle
        return str(self), self.folders


def real_folders(folder: str | os.PathLike) -> tuple[str, ...]:
    """The folder without links on the way to it. A snapshot in the Hub's cache has a second one, that of its blobs."""
    real = [os.path.realpath(folder)]
    try:
        descriptor = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            real.append(_real_path(descriptor))  # differs if the file system ignores the case of names
        finally:
            os.close(descriptor)
    except OSError:
        pass  # files in it can't be opened either
    blobs = [f"{found[1]}/blobs" for path in real if (found := _SNAPSHOT.fullmatch(path))]
    return tuple(dict.fromkeys([*real, *blobs]))


def is_inside(real_path: str, folders: Sequence[str]) -> bool:
    """Whether a path without links lies in one of the folders."""
    return any(real_path == folder or real_path.startswith(folder.rstrip("/") + "/") for folder in folders)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file for reading, and one of an `Inside` path only if it lies in one of its folders.

    What is opened is looked at, so that the file can't be swapped after the check. Raises ValueError with the reason,
    which is Outside for that one, or OSError, if the file can't be opened.
    """
    try:
        file = open_regular(path)
    except InputError:
        raise ValueError("not a regular file") from None
    except (OSError, ValueError):
        if os.path.exists(path):
            raise
        raise ValueError("the file does not exist") from None
    if isinstance(path, Inside) and not is_inside(_real_path(file.fileno()), path.folders):
        file.close()
        raise Outside(f"the file lies outside of {path.folders[0]}")
    return file


def _real_path(descriptor: int) -> str:
    """The path of an open file without links, as the system knows it."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")
