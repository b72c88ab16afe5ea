"""Errors in what a user gave: one message, printed by one rank, and exit status 2.

Converters import this module too, so it does not load torch, which takes seconds.
"""

import contextlib
import re
import signal
import sys
import time

from safetensors import SafetensorError

from .console import begin_line, outlive_readers, say
from .flag_hints import HintingParser
from .libraries import hide_warnings
from .ranks import end_process, is_first
from .secrets import guard_output_of_libraries, masked_command, safe_to_print
from .workers import STOP_SIGNALS, end_workers, explain, raise_file_limit

# What libraries raise as a RuntimeError when a device, or the host, has too little memory
NO_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory", re.IGNORECASE
)
NEEDS_LESS = 'docs/hardware.md, section "Which command", says what needs less'


class InputError(ValueError):
    """Something that a user gave is wrong. The message says where, what is wrong, and what to do, in one line.

    If it lists several things, each further line begins with two spaces; other line breaks come from outside, and are
    escaped like everything that a terminal obeys. Tokens and passwords are masked."""

    def __init__(self, message: str):
        # An error from a DataLoader's worker has the worker's traceback and this class's name before its message.
        message = message.rpartition(f"{__name__}.InputError: ")[2].rstrip("\n")
        super().__init__("\n  ".join(map(safe_to_print, message.split("\n  "))))


class Parser(HintingParser):
    """Raises InputError for a command line that it does not understand, and masks the values of flags like --token."""

    def error(self, message, hint=""):
        raise InputError(f"{masked_command(message)} ({hint}see --help)")

    def _print_message(self, message, file=None):
        super()._print_message(message and safe_to_print(message, keep="\n"), file)


class Problems:
    """Collects all problems of an input, so that a user does not have to find them one run at a time.

        problems = Problems()
        problems.add("data.jsonl:7", "id is [], must be a text")
        problems.raise_if_any("data.jsonl")

    Only the first `shown` problems are kept as text; `count` counts all of them. `examples` are the places of the
    examples that have one.
    """

    def __init__(self, shown: int = 10):
        self.shown = shown
        self.count = 0
        self.lines: list[str] = []
        self.examples = set()

    def __len__(self):
        return self.count

    def add(self, where: str, message: str, example=None):
        """example: tells several examples at one place apart."""
        self.count += 1
        self.examples.add((where, example))
        if len(self.lines) < self.shown:
            line = safe_to_print(f"{where}: {message}")
            self.lines.append(line if len(line) <= 400 else f"{line[:300]} … {line[-90:]}")

    def extend(self, other: "Problems"):
        self.lines = (self.lines + other.lines)[: self.shown]
        self.count += other.count
        self.examples |= other.examples

    def raise_if_any(self, source: str):
        """Raises InputError with the first problems; a single one is the whole message."""
        if self.count == 1:
            raise InputError(self.lines[0])
        if self.count:
            head = f"{source}: {self.count:,} problems"
            if self.count > len(self.lines):
                head += f"; these are the first {len(self.lines)}"
            raise InputError("\n  ".join([head, *self.lines]))


class BadExamples:
    """Decides what happens to examples that can't be used: they are an error, or with `skip` (--on_bad_example skip)
    they are left out and remembered. A reader of examples uses it for one source after the other:

        with bad.catching("data.jsonl:7"):  # an InputError is a problem of the example on this line
            …
        bad.settle("data.jsonl", used=99)

    left_out: for each example of the sources so far that was left out, a line that says where it is and what is wrong.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.left_out: list[str] = []
        self.problems = self._no_problems()

    def _no_problems(self) -> Problems:
        return Problems(shown=sys.maxsize if self.skip else 10)

    def add(self, where: str, message: str, example=None):
        """Adds a problem of an example, as `Problems.add` does. Of one that is left out, only the first is kept."""
        if not self.skip or (where, example) not in self.problems.examples:
            self.problems.add(where, message, example)

    @contextlib.contextmanager
    def catching(self, where: str):
        """Turns an InputError in the block into a problem of the example at `where`."""
        try:
            yield
        except InputError as e:
            self.add(where, str(e))

    def settle(self, source: str, used: int):
        """Ends the reading of a source from which `used` examples can be used.

        Raises InputError with the first problems. With `skip`, rank 0 prints how many examples are left out, and
        InputError is raised only if none is left.
        """
        problems, self.problems = self.problems, self._no_problems()
        if not self.skip:
            problems.raise_if_any(source)
        if not problems:
            return
        self.left_out += problems.lines
        if not used:
            raise InputError(f"none of the {len(problems):,} examples of {source} can be used; {problems.lines[0]}")
        say(f"{source}: {len(problems):,} of {used + len(problems):,} examples are left out")


def listing(left_out: list[str]) -> list[str]:
    """Lines to print about what was left out: how many examples, and the first ten of them; none if nothing was."""
    if not left_out:
        return []
    head = f"{len(left_out):,} examples were left out, as --on_bad_example skip says:"
    more = [f"  … and {len(left_out) - 10:,} more"] if len(left_out) > 10 else []
    return [head, *(f"  {line}" for line in left_out[:10]), *more]


@contextlib.contextmanager
def blaming(flag: str, value):
    """Turns an exception that a library raises for a wrong value into an InputError that names flag and value."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as e:
        raise InputError(f"--{flag} {value}: {' '.join(str(e).split())}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the accelerator or of the host did not suffice for this process."""
    if isinstance(error, InputError) or explain(error):  # such as a lack of memory in a process that prepares images
        return False
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True  # the second is torch's
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def lowering(what: str):
    """Turns a lack of memory in the block into an InputError.

    what: what was computed and what to lower, such as "generating answers: lower --max_new_tokens".
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise InputError(f"memory ran out while {what}") from None


def exit_on_input_error(main):
    """Calls `main` and ends the process with its status: 0, that of a SystemExit, 130 after Ctrl-C in a tool, or 2
    after an InputError, the death of a worker, a lack of memory or a limit of the machine, which are printed as
    `error: …` without a traceback. Other exceptions are raised."""
    outlive_readers()
    guard_output_of_libraries()
    hide_warnings()
    raise_file_limit()
    if callable(signal.getsignal(signal.SIGINT)):  # a program may have another handler while it loads the libraries
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        main()
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise
        status = e.code or 0
    except KeyboardInterrupt:  # in a tool: a run has handlers of its own
        begin_line()
        say("SIGINT: stopped", to_stderr=True)
        status = 128 + signal.SIGINT
    except Exception as e:
        message = e if isinstance(e, InputError) else explain(e)
        if is_out_of_memory(e):
            message = f"memory ran out ({' '.join(str(e).split())[:150] or type(e).__name__}): {NEEDS_LESS}"
        if message is None:
            raise
        if not is_first():
            # Most errors occur on rank 0 as well. It reports them, and torchrun ends this process while it sleeps.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            time.sleep(20)
        begin_line()
        print(f"error: {InputError(str(message))}", file=sys.stderr, flush=True)
        status = 2
    finally:
        end_workers()
    end_process(status)
