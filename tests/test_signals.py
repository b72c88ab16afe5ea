"""Ctrl-C and other signals: what a process says and does, at every phase of a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, environment

from phi3v import signals
from phi3v.signals import PREEMPTED, SAME_SIGNAL, stop_signals


@pytest.fixture
def noticing(monkeypatch):
    """Signals are noticed. A list of the statuses with which this process would have left."""
    left = []
    monkeypatch.setattr(signals, "leave", left.append)
    stop_signals.install()
    return left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_process_with_nothing_to_save_leaves_at_once(noticing, number, capfd):
    os.kill(os.getpid(), number)
    stop_signals.take()
    assert noticing == [PREEMPTED]
    said = f"{signal.Signals(number).name}: leaving at once, because there is nothing to save yet\n"
    assert capfd.readouterr().err.lstrip("\n") == said


def test_signals_within_seconds_count_as_one_and_a_later_one_leaves_at_once(noticing, capfd):
    with stop_signals.stopping("after this step"):
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # of the terminal, of torchrun, of a scheduler
            os.kill(os.getpid(), number)
            stop_signals.take()
        assert stop_signals.count == 1 and not noticing
        stop_signals.last -= SAME_SIGNAL
        os.kill(os.getpid(), signal.SIGINT)
        stop_signals.take()
        assert noticing == [128 + signal.SIGINT]
    lines = capfd.readouterr().err.split("\n")
    assert [line for line in lines if line] == [
        "SIGINT: stopping after this step; the same again, after 5 seconds or more, leaves at once",
        "SIGINT again: leaving at once",
    ]
    assert stop_signals.until is None


def test_only_rank_0_says_so(noticing, monkeypatch, capfd):
    monkeypatch.setattr(signals, "is_first", lambda: False)
    os.kill(os.getpid(), signal.SIGINT)
    stop_signals.take()
    assert noticing == [PREEMPTED] and capfd.readouterr().err == ""


def test_a_signal_is_noticed_while_the_main_thread_is_in_a_library(noticing):
    """A wait for another rank, in C, runs none of Python's handlers."""
    released, seen = threading.Event(), []

    def send():
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 200
        while not noticing and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(list(noticing))
        released.set()

    sender = threading.Thread(target=send)
    handler = signal.signal(signal.SIGINT, lambda *_: None)  # as if the main thread never came to it
    try:
        sender.start()
        released.wait(300)
    finally:
        signal.signal(signal.SIGINT, handler)
        sender.join()
    assert seen == [[PREEMPTED]]


@pytest.mark.slow
def test_its_children_end_with_it():
    """They may ignore the signal, as the processes that prepare images do."""
    reading, writing = os.pipe()
    own = os.fork()
    if not own:
        stop_signals.install()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.write(writing, str(os.getpid()).encode())
        time.sleep(600)
        os._exit(1)
    child = int(os.read(reading, 20))
    os.kill(own, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]) == PREEMPTED
    end = time.monotonic() + 300
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, number, rank, status, said",
    [
        ("finetune_hf_trainer_nlvr2.py", signal.SIGINT, "0", PREEMPTED, "SIGINT: leaving at once, because there is "),
        ("finetune_hf_trainer_nlvr2.py", signal.SIGTERM, "0", PREEMPTED, "SIGTERM: leaving at once, because there is "),
        ("finetune_hf_trainer_nlvr2.py", signal.SIGUSR1, "1", PREEMPTED, ""),
        ("tools/ask.py", signal.SIGINT, "0", 130, "SIGINT: stopped\n"),
        ("tools/merge_adapter.py", signal.SIGINT, "0", 130, "SIGINT: stopped\n"),
    ],
)
def test_a_signal_while_the_libraries_load(program, number, rank, status, said):
    with subprocess.Popen(
        [sys.executable, program, "--help"], cwd=ROOT, env=environment(RANK=rank), stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.02)
        process.send_signal(number)
        stderr = process.communicate(timeout=100)[1]
    assert process.returncode == status and stderr.startswith(said) and stderr.count("\n") == bool(said)
