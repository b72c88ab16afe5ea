"""benchmarks/annotations.py with few lines."""

import sys

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import annotations  # noqa: E402


@pytest.mark.slow
def test_ranks_load_the_data_as_the_script_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["annotations.py", "--lines", "50", "--ranks", "2", "--repetitions", "1"])
    annotations.main()
    assert "| 2 | now | " in capsys.readouterr().out
