"""What a run prints: rank 0 speaks for all ranks. Everything else in phi3v prints through this module.

Converters import this module too, so it does not load torch, which takes seconds.
"""

import errno
import io
import os
import sys

from .ranks import is_first
from .secrets import safe_to_print


def say(*lines: str, to_stderr: bool = False):
    """Prints on rank 0 alone, as `tell` does."""
    if is_first():
        tell(*lines, to_stderr=to_stderr)


def tell(*lines: str, to_stderr: bool = False):
    """Prints each line, with tokens and passwords masked. Whatever a terminal obeys is escaped, line breaks too: names
    from outside stay in their line."""
    for line in lines:
        print(safe_to_print(line), flush=True, file=sys.stderr if to_stderr else None)


class _Output(io.FileIO):
    """Standard output or standard error that a run outlives: when its reader has gone (`| head -1`, a closed terminal),
    or the disk of a log is full, what is written to it is dropped, and the run goes on."""

    at_line_start = True

    def write(self, data) -> int:
        self.at_line_start = bytes(data[-1:]) == b"\n"
        try:
            return super().write(data)
        except OSError as e:
            if e.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
                if self.fileno() == 1 and sys.stderr:
                    tell("nobody reads the standard output any more: the program goes on without it", to_stderr=True)
            return len(data)


class _Unbuffered(io.BufferedWriter):
    """What `python -u` and PYTHONUNBUFFERED ask for: everything is shown as soon as it is written."""

    def write(self, data) -> int:
        count = super().write(data)
        self.flush()
        return count


def begin_line():
    """Ends the line of standard error that a progress bar has left open."""
    sys.stderr.flush()
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    if isinstance(raw, _Output) and not raw.at_line_start:
        print(file=sys.stderr)


def outlive_readers():
    """Lets this process go on when nobody reads what it prints, and when its streams can't show a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the next file that is opened would get its number, and what others print
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and stream.fileno() == number:
            stream.flush()
            options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            kind = _Unbuffered if stream.write_through else io.BufferedWriter
            buffer = kind(_Output(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **options))
