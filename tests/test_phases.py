"""The start of a run says which of its phases take long."""

import pytest

from phi3v import phases


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): lets time pass. The process was started three seconds ago."""
    now = [1000.0]
    monkeypatch.setattr(phases, "_ended", None)
    monkeypatch.setattr(phases.time, "time", lambda: now[0])
    monkeypatch.setattr(phases.psutil.Process, "create_time", lambda process: 997.0)

    def passes(seconds):
        now[0] += seconds

    return passes


def test_a_phase_of_more_than_five_seconds_has_one_line(clock, capsys):
    clock(9)
    phases.began("loading the libraries")
    clock(4)
    phases.ended("finding the data")
    clock(7)
    phases.ended("loading the model")
    assert capsys.readouterr().out == "loading the libraries: 12 s\nloading the model: 7 s\n"


def test_the_time_between_two_runs_of_a_process_is_no_phase(clock, capsys):
    phases.began("loading the libraries")
    clock(100)
    phases.began("loading the libraries")
    phases.ended("finding the data")
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    clock(9)
    phases.began("loading the libraries")
    assert capsys.readouterr().out == ""
