"""Two runs never write to the same output folder at once."""

import errno
import fcntl
import os
import re
import signal
import socket
import time

import pytest
from helpers import arguments, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import folder_lock
from phi3v.training.folder_lock import lock_folder, unlock_folder
from phi3v.training.own_files import LOCK

IN_USE = r"is in use by a run on {host}, process {pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \w+.*: wait until"


@pytest.fixture
def other(tmp_path):
    """other(folder, dry_run): a process that holds the lock of a folder, as another run would; killed at the end."""
    started = []

    def start(*args):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            lock_folder(*args)
            if not os.fork():  # as a process that prepares images, which outlives it
                os.write(writing, b"1")
                time.sleep(60)
            time.sleep(60)
            os._exit(1)
        started.append(pid)
        assert os.read(reading, 1)
        return pid

    yield start
    for pid in started:
        with_children = [pid, *children(pid)]
        for one in with_children:
            os.kill(one, signal.SIGKILL)
        os.waitpid(pid, 0)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_the_second_run_is_refused_before_it_loads_anything_and_kill_9_frees_the_folder(toy_data, tmp_path, other):
    pid = other(tmp_path)
    said = IN_USE.format(host=re.escape(socket.gethostname()), pid=pid)
    with pytest.raises(InputError, match=said):
        script.main(arguments(toy_data, tmp_path))
    orphans = children(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    lock_folder(tmp_path)  # although a process that it had started lives on
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    assert (tmp_path / LOCK).is_file()
    unlock_folder()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_needs_the_lock(toy_data, tmp_path, other):
    other(tmp_path)
    for flags in (["--estimate"], ["--check_data"], ["--evaluate_only"], ["--dry_run"]):
        parse_command(script, arguments(toy_data, tmp_path, *flags))
    unlock_folder()
    other(tmp_path / "dry_run", True)
    with pytest.raises(InputError, match="dry_run is in use by a run on"):
        parse_command(script, arguments(toy_data, tmp_path, "--dry_run"))


def test_other_ranks_hold_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "is_first", lambda: False)
    lock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock_folder(tmp_path)
    assert re.fullmatch(f"warning: {tmp_path} is on a file system that can't lock files .*\n", capsys.readouterr().out)


def test_a_lock_file_that_the_run_before_deletes_meanwhile(tmp_path, monkeypatch):
    real, calls = fcntl.lockf, []

    def lock(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        return real(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock)
    lock_folder(tmp_path)
    assert len(calls) == 2 and (tmp_path / LOCK).is_file()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
def test_something_in_the_way_of_the_lock_file(tmp_path, make):
    make(tmp_path / LOCK)
    with pytest.raises(InputError, match=re.escape(LOCK)):
        lock_folder(tmp_path)
