"""Keeps examples in a temporary file without a name, which all processes of a node read, instead of in their memory.

The file disappears with the last process that has it open, also if that is killed. Other processes of the node open it
through /proc, as one of the open files of the process that wrote it.
"""

import array
import contextlib
import functools
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import numpy as np

from ..console import tell
from ..errors import InputError
from ..files import open_regular
from ..ranks import is_first_of_node

BUFFER = 2**20  # bytes that are written at once
TOKEN_BYTES = 16


class StoredLines(Sequence):
    """What `decode` makes of lines. It is called at each access, so that only the example in use is in memory.

    lines: are read once. decode: a function that can be pickled. A slice is a StoredLines with the same file.
    A pickled copy is small. It opens the file of the process that pickled it, which must be on this node and still run.
    in_memory: all lines, if they can't be shared through a file; then a pickled copy holds them too.
    """

    def __init__(self, lines: Iterable[bytes], decode: Callable[[bytes], object]):
        self.decode, self.chosen, self.last = decode, None, (None, None)
        # With these random bytes a process makes sure that it has opened the right file.
        self.token = secrets.token_bytes(TOKEN_BYTES)
        ends = array.array("q", [0])
        self.file, self.in_memory = _store(lines, ends, self.token)
        self.ends = np.frombuffer(ends, np.int64)  # (lines + 1,): where each line begins, and where the last one ends
        self.path, self.lines = None, len(ends) - 1  # path: of the file, for a copy that has not opened it yet

    def __getstate__(self):
        state = vars(self) | {"file": None, "last": (None, None)}
        if self.file:
            state |= {"path": _path(self.file), "ends": None}
        return state

    def __len__(self):
        return self.lines if self.chosen is None else len(self.chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(range(*i.indices(len(self))))
        i = range(len(self))[i]
        line = i if self.chosen is None else int(self.chosen[i])
        if self.last[0] != line:  # an example is often asked for twice in a row
            if not self.open():
                raise InputError("the file of examples can't be opened that another process of this run has made")
            self.last = line, self.decode(self._line(*self.ends[line : line + 2].tolist()))
        return self.last[1]

    def _line(self, start: int, end: int) -> bytes:
        if self.in_memory is not None:
            return bytes(self.in_memory[start:end])
        return os.pread(self.file.fileno(), end - start, start)  # does not move a position that processes share

    def select(self, indices: Iterable[int]) -> "StoredLines":
        """The lines with these numbers, in this order."""
        part = object.__new__(type(self))
        vars(part).update(vars(self))
        indices = np.fromiter(indices, np.int64)
        part.chosen = indices if self.chosen is None else self.chosen[indices]
        part.last = None, None
        return part

    def open(self) -> bool:
        """Opens the file, of which a pickled copy knows only where it is; False if this process can't."""
        if self.file is None and self.in_memory is None:
            self.file, self.ends = _open(self.path, self.token, self.lines) or (None, None)
        return self.file is not None or self.in_memory is not None


def _store(lines: Iterable[bytes], ends: array.array, token: bytes) -> tuple[BinaryIO | None, bytearray | None]:
    """Writes the lines, `ends` and the token to a new file, and adds to `ends` where each line ends.

    Returns the file, or what would be in it if there can't be a file that other processes can open.
    """
    buffer, file, failure = bytearray(), None, None
    try:
        file = tempfile.TemporaryFile(buffering=0)
    except OSError as e:
        failure = e

    def flush():
        nonlocal buffer, file, failure
        done = 0
        try:
            while file and done < len(buffer):
                done += file.write(memoryview(buffer)[done:])
        except OSError as e:
            buffer, file, failure = _content(file, file.tell() - done) + buffer, None, e
        if file:
            buffer = bytearray()

    for line in lines:
        buffer += line
        ends.append(ends[-1] + len(line))
        if file and len(buffer) >= BUFFER:
            flush()
    buffer += ends.tobytes() + token
    flush()
    if failure and is_first_of_node():
        _tell_once(
            f"examples can't be written to a temporary file ({failure.strerror or failure}), so every process reads "
            "them and keeps them in memory; the variable TMPDIR chooses another folder"
        )
    if file and not _open(_path(file), token, len(ends) - 1):  # a system without /proc
        buffer, file = _content(file, file.tell()), None
    return file, None if file else buffer


def _content(file: BinaryIO, size: int) -> bytearray:
    content = bytearray()
    while len(content) < size:
        content += os.pread(file.fileno(), min(BUFFER, size - len(content)), len(content))
    return content


def _path(file: BinaryIO) -> str:
    """Where other processes of this node find a file that this process has open."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _open(path: str, token: bytes, lines: int) -> tuple[BinaryIO, np.ndarray] | None:
    """The file that `_store` has made, and where its lines end; None if it can't be opened, or is another file."""
    size = (lines + 1) * np.dtype(np.int64).itemsize
    with contextlib.suppress(OSError, InputError), contextlib.ExitStack() as closing:
        file = closing.enter_context(open_regular(path))
        start = os.fstat(file.fileno()).st_size - size - len(token)
        if start >= 0 and os.pread(file.fileno(), len(token), start + size) == token:
            closing.pop_all()
            return file, np.frombuffer(os.pread(file.fileno(), size, start), np.int64)
    return None


_tell_once = functools.cache(tell)
