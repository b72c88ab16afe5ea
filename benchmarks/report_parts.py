"""What the stages of gpu_report.py are given and what they return. Needs only Python's standard library."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Check:
    """Something that was tried, and whether it is right.

    name: what was tried, in a few words. value: what was measured; limit: what it may be at most, or what it must be.
    wrong: a sentence that names what is wrong if the check has not passed.
    """

    name: str
    value: float | int | str | None
    limit: float | int | str | None
    passed: bool
    wrong: str


@dataclass(frozen=True)
class Row:
    """A line of a table. table: the table's title; cells: by column, in the columns' order."""

    table: str
    cells: dict


@dataclass(frozen=True)
class LeftOut:
    """Something that a stage did not try. why: a sentence's second half, as in "it needs an Ampere GPU or newer"."""

    name: str
    why: str


def at_most(name: str, value: float, limit: float, wrong: str) -> Check:
    """A check that a number, or a tensor of one number, is at most `limit`; NaN is not."""
    value = float(value.detach() if hasattr(value, "detach") else value)
    return Check(name, value if math.isfinite(value) else str(value), limit, value <= limit, wrong)


def must_be(name: str, value, wanted, wrong: str) -> Check:
    """A check that what was found is exactly what is wanted."""
    return Check(name, value, wanted, value == wanted, wrong)


@dataclass(frozen=True)
class Setting:
    """On what a stage runs.

    device: the device's type, as torch names it. tiny: whether models are small.
    folder: an empty folder for the stage's files, which is deleted after it.
    facts: what the stage `machine` has found out about this machine.
    """

    device: str
    tiny: bool
    folder: Path
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A part of the report, which runs in a process of its own.

    function: "module:function" in this folder; it takes a Setting, and returns a list of Check, Row and LeftOut.
    proves: one sentence without its full stop. minutes: expected on an H100.
    importance: 1 for what matters most. Under --minutes the least important stages are left out.
    needs: names of NEEDS, or of packages.
    """

    name: str
    group: str
    function: str
    proves: str
    minutes: float
    importance: int
    needs: tuple[str, ...] = ()

    def expected(self, tiny: bool) -> float:
        """Minutes that it takes."""
        return min(self.minutes, 0.5) if tiny else self.minutes

    def limit(self, tiny: bool) -> float:
        """Minutes after which it is stopped."""
        return 10.0 if tiny else 4 * self.minutes + 2


def _cuda(facts: dict) -> str | None:
    return None if facts["device"] == "cuda" else "a CUDA GPU"


def _bf16(facts: dict) -> str | None:
    old = facts["device"] == "cuda" and facts["capability"] < [8, 0]
    return "an Ampere GPU or newer, for bf16" if old else None


def _gpus(facts: dict) -> str | None:
    return None if facts["device_count"] >= 2 else "2 GPUs or more"


# For each need of a stage: (facts) → what this machine lacks, None if nothing. Other needs are names of packages.
NEEDS: dict[str, Callable[[dict], str | None]] = {"cuda": _cuda, "bf16": _bf16, "2 gpus": _gpus}


def lacks(needs: tuple[str, ...], facts: dict) -> str | None:
    """The first of these needs that this machine does not meet, in words."""
    for need in needs:
        if need in NEEDS:
            if what := NEEDS[need](facts):
                return what
        elif need not in facts["packages"]:
            return f"the package {need}"
    return None


PATH = re.compile(r"(?<![\w.:/~-])(?:[A-Za-z]:\\|~?/)(?:[^\s'\"`:,;()\[\]<>]+[/\\])*([^\s'\"`:,;()\[\]<>/\\]+)[/\\]?")


def without_private(text: str, words: tuple[str, ...] = ()) -> str:
    """The text with the last name alone of every absolute path, and without these words.

    words: for example the names of host and user.
    """
    text = PATH.sub(r"…/\1", text)
    for word in words:
        text = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", "…", text)
    return text
