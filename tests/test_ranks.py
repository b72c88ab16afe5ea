"""Which of the training processes this one is."""

import subprocess
import sys

import helpers
import pytest

from phi3v import ranks

# What has to run when a process ends does run. Python is not taken down: a thread of gloo could still ask for it.
ENDING = """
import atexit, os, threading, time
from phi3v import errors

class TakenDown:
    def __del__(self):
        print("Python was taken down")

def main():
    atexit.register(print, "handler ran")
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread ran"))).start()
    raise SystemExit(status)

for status in (0, 75):  # a new process for each, which need not import all again
    if (process := os.fork()) == 0:
        object_of_the_module = TakenDown()
        errors.exit_on_input_error(main)
    print("status", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture
def no_group(monkeypatch):
    """Without the process group and the variables that an earlier training in this process has set."""
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that the variable is restored after the test, even if it was not set before
        monkeypatch.delenv(name)


def test_a_process_that_torchrun_did_not_start_is_alone(no_group):
    assert (ranks.rank(), ranks.world_size(), ranks.local_world_size(), ranks.is_first()) == (0, 1, 1, True)


def test_before_there_is_a_process_group_the_variables_of_torchrun_count(no_group, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.world_size(), ranks.local_world_size(), ranks.is_first()) == (3, 8, 4, False)


def test_the_process_group_counts_where_there_is_one(no_group, monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("RANK", "5")
    assert (ranks.rank(), ranks.world_size(), ranks.is_first()) == (1, 2, False)


def test_start_alone_sets_what_torchrun_would_set_and_keeps_what_it_has_set(no_group, monkeypatch):
    ranks.start_alone()
    environment = dict(ranks.os.environ)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("0", "0", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"] == "0"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.start_alone()
    assert (ranks.rank(), ranks.world_size()) == (1, 2)


@pytest.mark.slow
def test_a_process_ends_with_its_status_and_without_taking_python_down(tmp_path):
    (tmp_path / "ending.py").write_text(ENDING)
    command = [sys.executable, tmp_path / "ending.py"]
    done = subprocess.run(command, env=helpers.environment(), capture_output=True, text=True, timeout=900)
    said = "thread ran\nhandler ran\nstatus {}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said.format(0) + said.format(75), "")
