"""Errors in what a user gave: one message, printed by one rank, and exit status 2."""

import contextlib
import signal
import sys
import time

from accelerate.utils import gather_object
from safetensors import SafetensorError

from .ranks import is_first, leave_group


class InputError(ValueError):
    """Something that a user gave is wrong. The message says where, what is wrong, and what to do, in one line for each
    problem."""


class Problems:
    """Collects all problems of an input, so that a user does not have to find them one run at a time.

        problems = Problems()
        problems.add("data.jsonl:7", "id is [], must be a text")
        problems.raise_if_any("data.jsonl")

    Only the first `shown` problems are kept as text; `count` counts all of them.
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
                head += f"; these are the first {len(self.lines)}"
            raise InputError("\n  ".join([head, *self.lines]))


@contextlib.contextmanager
def blaming(flag: str, value):
    """Turns an exception that a library raises for a wrong value into an InputError that names flag and value."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        raise InputError(f"--{flag} {value}: {' '.join(str(e).split())}") from None


@contextlib.contextmanager
def first_of_node(training_args, desc: str):
    """The first process of each node runs the block before the others, to fill caches that these read.

    training_args: a TrainingArguments. If a process raises InputError in the block, all of them raise it: otherwise the
    others would go on, and end with a traceback when they miss that process.
    """
    failure = None
    with training_args.main_process_first(desc=desc):
        try:
            yield
        except InputError as e:
            failure = str(e)
    if failures := [text for text in gather_object([failure]) if text]:
        raise InputError(failures[0])


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
            # Most errors occur on rank 0 as well. It reports them, and torchrun ends this process while it sleeps.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)
        # An error from a DataLoader's worker has the worker's traceback and the class's name before its message.
        message = str(e).rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
