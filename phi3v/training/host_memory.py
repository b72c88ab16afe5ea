"""How much main memory processes may use: the machine's, or less where a container or a job has a limit.

Linux keeps limits in control groups: files in folders below /sys/fs/cgroup, in version 1 and version 2 with different
names. A process belongs to one group, and the limits of all groups around that one hold too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # a line for each hierarchy: its number, its controllers, the process's group


class Names(NamedTuple):
    """Names of the files with a group's limit and its use, and in memory.stat of the copies of files, which the kernel
    drops when memory is short."""

    limit: str
    used: str
    file_copies: tuple[str, str]


V1 = Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
V2 = Names("memory.max", "memory.current", ("active_file", "inactive_file"))


def memory_limit(root: Path | None = None, own: Path | None = None) -> int:
    """Bytes of main memory that this process and all others in its container or on its machine can have at most.

    Swap space is not counted: an optimizer's step reads and writes all of its states, which takes hours from a disk.
    root, own: in place of CONTROL_GROUPS and OWN_GROUPS.
    """
    limits = (limit for limit, _ in _groups(root or CONTROL_GROUPS, own or OWN_GROUPS))
    return min([psutil.virtual_memory().total, *limits])


def free_memory(root: Path | None = None, own: Path | None = None) -> int:
    """Bytes of these that are free now. What the kernel uses for copies of files counts as free."""
    free = (limit - used for limit, used in _groups(root or CONTROL_GROUPS, own or OWN_GROUPS))
    return max(min([psutil.virtual_memory().available, *free]), 0)


def _groups(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes for each control group around this process that has a limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, names = root, V2
        elif "memory" in controllers.split(","):
            base, names = root / "memory", V1
        else:
            continue
        # A container often sees its own group as `base`, while `path` is named as outside of it and is not there.
        parts = [part for part in path.split("/") if part]
        for depth in range(0 if ".." in parts else len(parts), -1, -1):
            if found := _read(base.joinpath(*parts[:depth]), names):
                yield found


def _read(folder: Path, names: Names) -> tuple[int, int] | None:
    """None if the group has no limit. Version 1 writes a number of 2**63 or a little less for that."""
    try:
        limit = int((folder / names.limit).read_text())
        used = int((folder / names.used).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not every sandbox has them; the limit holds nevertheless
        statistics = {}
    return limit, used - sum(int(statistics.get(name, 0)) for name in names.file_copies)
