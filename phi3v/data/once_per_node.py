"""Data are loaded by one process of each node, and shared with the others. Converters, which have one process and must
not load accelerate, use `StoredLines` without this module."""

import hashlib
from collections.abc import Callable

from accelerate.utils import gather_object

from .. import phases
from ..console import say
from ..errors import InputError
from ..ranks import is_first_of_node, local_rank, rank
from .stored_lines import StoredLines


def load_once_per_node(load: Callable[..., tuple], args, *others) -> tuple:
    """What `load(args, *others)` returns, on every rank.

    The first process of each node loads, before the others. If the parts are StoredLines, processes with equal `args`
    share its files; otherwise they load too, and read the caches that it has filled. If a process raises InputError,
    all of them raise it: otherwise the others would go on, and end with a traceback when they miss that process.
    """

    def loaded() -> tuple[tuple | None, str | None]:
        try:
            return load(args, *others), None
        except InputError as e:
            return None, str(e)

    asked = hashlib.sha256(repr(args).encode("utf-8", "surrogatepass")).digest()
    parts, failure = loaded() if is_first_of_node() else (None, None)
    shared = [part for part in parts or () if isinstance(part, StoredLines) and part.in_memory is None]
    answers = gather_object([(asked, shared if parts and len(shared) == len(parts) else None, failure)])
    _raise_first([failure for _, _, failure in answers])
    cannot_open = False
    if not is_first_of_node():
        of_first, parts, _ = answers[rank() - local_rank()]
        parts = parts if of_first == asked else None
        cannot_open = parts is not None and not all([part.open() for part in parts])
        if parts is None or cannot_open:
            parts, failure = loaded()
    phases.ended("reading the data")
    answers = gather_object([(cannot_open, failure)])
    _raise_first([failure for _, failure in answers])
    if any(cannot_open for cannot_open, _ in answers):
        say("processes of a node can't open one another's files through /proc, so each reads the examples itself")
    return tuple(parts)


def _raise_first(failures: list[str | None]):
    if failures := [failure for failure in failures if failure]:
        raise InputError(failures[0])
