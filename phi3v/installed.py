"""Importing this module checks the versions of Python and of the installed packages, before one that is too old fails
in a way that nobody understands.

requirements.txt and pyproject.toml say which versions are needed. The packages are not imported for this.
"""

import functools
import importlib.metadata
import os
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml, which an older Python has no module to read


def requirements() -> list[Requirement]:
    """What this checkout needs. If phi3v was installed without a checkout, what it was installed with."""
    if (ROOT / "pyproject.toml").is_file():
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    else:
        try:
            lines = importlib.metadata.requires("phi3v") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
    every = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return [own for own in every if own.marker is None or own.marker.evaluate({"extra": ""})]


def misfits(wanted: list[Requirement]) -> list[str]:
    """For each installed package of another version than needed, a text that says so. A package that is missing is not
    a misfit, because some are needed only for some flags.

    A version like 2.6.0a0+nv25.1, as vendors give their builds, counts as 2.6.0.
    """
    found = []
    for own in wanted:
        try:
            version = importlib.metadata.version(own.name)
            if not own.specifier.contains(Version(version).base_version):
                found.append(f"{own.name} {version} is installed, and {own.name}{own.specifier} is needed")
        except (importlib.metadata.PackageNotFoundError, InvalidVersion, TypeError):  # TypeError: it has no version
            continue
    return found


def check():
    """Raises ImportError if a version does not fit. If no caller handles that, the program ends with one line that
    begins with `error:`, and with status 2, as after every wrong input."""
    if sys.version_info < OLDEST_PYTHON:
        python, oldest = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        message = f"this is Python {python}, and Python {oldest} or newer is needed"
    elif found := misfits(requirements()):
        message = (
            f"{'; '.join(found)}: run `pip install -e {ROOT}`, after torch if docs/hardware.md names one for your GPU"
        )
    else:
        return
    error = ImportError(message)
    sys.excepthook = functools.partial(_end, error, sys.excepthook)
    raise error


def _end(error: ImportError, usual, kind, value, trace):
    """Reports `error` as one line, and other exceptions as usual."""
    if value is not error:
        return usual(kind, value, trace)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(20)  # the first process of this node says it, and torchrun then ends this one
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)


check()
