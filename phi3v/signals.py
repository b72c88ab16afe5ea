"""Signals that ask a run to stop: Ctrl-C (SIGINT), SIGTERM and SIGUSR1.

A thread of its own reads them, because Python's handlers run only when the main thread comes back from whatever library
it is in, and a wait for other processes or for a GPU can be long.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

import psutil

from .ranks import is_first
from .workers import STOP_SIGNALS

PREEMPTED = 75  # exit status of a run that was stopped by a signal: EX_TEMPFAIL of sysexits.h, "try again"
SAME_SIGNAL = 5.0  # seconds: torchrun passes on a signal that the whole job, or the terminal's, has received already


class StopSignals:
    """What this process does when a signal asks it to stop.

    until: when it will stop, as the end of the notice "SIGINT: stopping …"; whoever sets it looks at `count` from time
    to time. None: it leaves at once, with status PREEMPTED, because there is nothing to save.

    A second signal, SAME_SIGNAL seconds or more after the first, ends the process at once in any case.
    """

    def __init__(self):
        self.count, self.last, self.until, self.pid = 0, 0.0, None, None
        self.lock = threading.RLock()  # a handler may interrupt the main thread inside of `take`

    def install(self):
        """From now on this process notices the signals. Forgets those of an earlier run. Call it in the main thread."""
        self.count, self.last, self.until = 0, 0.0, None
        if self.pid != os.getpid():
            self.pid = os.getpid()
            self.reader, self.writer = socket.socketpair()
            for end in (self.reader, self.writer):
                end.setblocking(False)
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.take())

    def _watch(self):
        while True:
            select.select([self.reader], [], [])
            self.take()

    def take(self):
        """Acts on the signals that have come and that nobody has acted on."""
        if os.getpid() != self.pid:  # a process of a DataLoader that does not ignore signals yet
            return
        with self.lock:
            try:
                numbers = self.reader.recv(4096)
            except BlockingIOError:
                return
            for number in numbers:  # of all signals that have a handler in Python
                if number in STOP_SIGNALS:
                    self._on_signal(signal.Signals(number))

    def _on_signal(self, number: signal.Signals):
        now = time.monotonic()
        if self.count and now - self.last < SAME_SIGNAL:
            return
        self.count += 1
        self.last = now
        if self.count > 1:
            _notice(f"{number.name} again: leaving at once")
            leave(128 + number)
        elif self.until is None:
            _notice(f"{number.name}: leaving at once, because there is nothing to save yet")
            leave(PREEMPTED)
        else:
            again = f"the same again, after {SAME_SIGNAL:.0f} seconds or more, leaves at once"
            _notice(f"{number.name}: stopping {self.until}; {again}")

    @contextlib.contextmanager
    def stopping(self, until: str):
        """While the block runs, a signal lets this process go on `until` then, as the block itself sees to."""
        before, self.until = self.until, until
        try:
            yield
        finally:
            self.until = before


def _notice(text: str):
    """Prints on rank 0 alone, with nothing but a system call: the main thread may be in the middle of printing."""
    if is_first():
        raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
        # A terminal shows ^C where the cursor is.
        begun = os.isatty(2) or not getattr(raw, "at_line_start", True)
        with contextlib.suppress(OSError):
            os.write(2, f"{chr(10) * begun}{text}\n".encode())


def leave(status: int):
    """Ends this process and those that it has started, at once. They may ignore the signals that end this one."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(status)


stop_signals = StopSignals()  # of this process
