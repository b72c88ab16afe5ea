"""How much main memory a process may use, from control groups as Linux writes them."""

from pathlib import Path

import psutil
import pytest

from phi3v.training.host_memory import free_memory, memory_limit

GIB = 2**30
UNLIMITED_V1 = 2**63 - 4096


def group(folder: Path, version: int, limit, used=0, active=0, inactive=0):
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    of_limit, of_use, prefix = names[version]
    (folder / of_limit).write_text(f"{limit}\n")
    (folder / of_use).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\n{prefix}active_file {active}\n{prefix}inactive_file {inactive}\n")


@pytest.mark.parametrize(
    ("own", "groups", "limit"),
    [
        ("0::/\n", [("", 2, GIB)], GIB),  # a container, which sees its group as the root
        ("0::/job/step\n", [("job", 2, GIB), ("job/step", 2, "max")], GIB),  # the limit of a group around it
        ("0::/job/step\n", [("job", 2, 2 * GIB), ("job/step", 2, GIB)], GIB),
        ("0::/job/step\n", [("other", 2, GIB)], None),
        ("0::/../outside\n", [("", 2, GIB), ("../outside", 2, 5)], GIB),
        ("0::/\n", [("", 2, "max")], None),
        ("5:cpu:/a\n4:memory:/a/b\n0::/\n", [("memory/a/b", 1, GIB), ("memory", 1, UNLIMITED_V1)], GIB),
        ("4:cpu,memory:/docker/0123\n", [("memory", 1, GIB)], GIB),  # named as outside of the container
        ("4:memory:/\n", [("memory", 1, UNLIMITED_V1)], None),
        ("", [("", 2, GIB)], None),
        (None, [], None),  # no Linux
    ],
)
def test_the_smallest_limit_around_a_process_holds(own, groups, limit, tmp_path):
    for name, *values in groups:
        group(tmp_path / "groups" / name, *values)
    if own is not None:
        (tmp_path / "own").write_text(own)
    machine = psutil.virtual_memory().total
    assert memory_limit(tmp_path / "groups", tmp_path / "own") == (limit or machine)


@pytest.mark.parametrize("version", [1, 2])
def test_copies_of_files_count_as_free(version, tmp_path):
    (tmp_path / "own").write_text("4:memory:/\n0::/\n")
    folder = tmp_path / "memory" if version == 1 else tmp_path
    mib = 2**20
    group(folder, version, 64 * mib, used=40 * mib, active=5 * mib, inactive=20 * mib)
    assert free_memory(tmp_path, tmp_path / "own") == 49 * mib
    group(folder, version, 64 * mib, used=65 * mib)
    assert free_memory(tmp_path, tmp_path / "own") == 0


def test_a_limit_holds_where_nothing_says_what_the_memory_is_used_for(tmp_path):
    (tmp_path / "own").write_text("0::/\n")
    group(tmp_path, 2, GIB, used=GIB // 4)
    for statistics in ("", "no pairs\nat all\n"):
        (tmp_path / "memory.stat").write_text(statistics)
        assert memory_limit(tmp_path, tmp_path / "own") == GIB
    (tmp_path / "memory.stat").unlink()
    assert memory_limit(tmp_path, tmp_path / "own") == GIB and free_memory(tmp_path, tmp_path / "own") <= 3 * GIB // 4
