"""What the start of a run spends its time on: one line for each phase that takes long."""

import time

import psutil

from .console import say

LONG = 5  # seconds
_ended = None  # when the last phase ended, in seconds since the epoch


def began(before: str):
    """A run begins. before: what this process has done since it was started, unless it has had a run before."""
    global _ended
    if _ended is None:
        _ended = psutil.Process().create_time()
        ended(before)
    _ended = time.time()


def ended(phase: str):
    """A phase of the start is over: rank 0 says how long it took, if that was more than LONG seconds."""
    global _ended
    now = time.time()
    if _ended is not None and now - _ended > LONG:
        say(f"{phase}: {now - _ended:.0f} s")
    _ended = now
