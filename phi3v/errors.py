"""Wrong input: one message from one rank, and the exit status that says so."""

import contextlib
import signal
import sys
import time

from safetensors import SafetensorError

from .ranks import is_first, leave_group


class InputError(ValueError):
    """Something a user gave is wrong: a line that says where, what, and what to do; a line each for several things."""


class Problems:
    """Collects what is wrong with an input, so that a user sees all of it and not just the first.

        problems = Problems()
        problems.add("data.jsonl:7", "id is [], must be a text")
        problems.raise_if_any("data.jsonl")

    Only the first `shown` are kept as text; `count` is the number of all.
    """

    def __init__(self, shown: int = 10):
        self.shown = shown
        self.count = 0
        self.lines: list[str] = []

    def __len__(self):
        return self.count

    def add(self, where: str, message: str):
        self.count += 1
        if len(self.lines) < self.shown:
            line = f"{where}: {message}"
            if not line.isprintable():  # a file name can hold line breaks, and codes that change a terminal's colours
                line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
            self.lines.append(line if len(line) <= 400 else f"{line[:300]} … {line[-90:]}")

    def extend(self, other: "Problems"):
        self.lines = (self.lines + other.lines)[: self.shown]
        self.count += other.count

    def raise_if_any(self, source: str):
        """Raises InputError with the first problems; a single one is the whole message."""
        if self.count == 1:
            raise InputError(self.lines[0])
        if self.count:
            head = f"{source}: {self.count:,} problems"
            if self.count > len(self.lines):
                head += f", of which these are the first {len(self.lines)}"
            raise InputError("\n  ".join([head, *self.lines]))


@contextlib.contextmanager
def blaming(flag: str, value):
    """Turns what libraries raise for a wrong value into an InputError that names the flag and the value."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        raise InputError(f"--{flag} {value}: {' '.join(str(e).split())}") from None


def exit_on_input_error(main):
    """Calls `main`. An InputError ends the process with `error: …` and status 2, without a traceback."""
    try:
        main()
        leave_group()
    except SystemExit:
        leave_group()
        raise
    except InputError as e:
        if not is_first():
            # Rank 0 meets most errors too. It reports them, and torchrun ends this process before it wakes up.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)
        # From a loader's worker the message comes behind the worker's traceback, and with the class's name.
        message = str(e).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
