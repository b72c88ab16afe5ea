"""Whether packages that are too old are found before they are imported, and said in one line."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from phi3v import installed


def test_every_package_has_a_lower_bound_and_what_is_installed_fits():
    wanted = installed.requirements()
    assert {"torch", "transformers", "numpy"} <= {own.name for own in wanted}
    assert not [own.name for own in wanted if not any(bound.operator == ">=" for bound in own.specifier)]
    assert installed.misfits(wanted) == []


def test_docs_name_the_lower_bounds():
    rows = [row.split("|") for row in (ROOT / "docs" / "hardware.md").read_text().splitlines() if row.startswith("| ")]
    documented = {row[1].strip(): row[2].strip() for row in rows}
    for own in installed.requirements():
        (oldest,) = [bound.version for bound in own.specifier if bound.operator == ">="]
        assert documented.get(own.name) == oldest


def test_oldest_python_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={installed.OLDEST_PYTHON[0]}.{installed.OLDEST_PYTHON[1]}"


@pytest.mark.parametrize(
    "version, said",
    [
        ("5.22.2", "somelib 5.22.2 is installed, and somelib<6,>=5.23 is needed"),
        ("6.0.1", "somelib 6.0.1 is installed, and somelib<6,>=5.23 is needed"),
        ("5.23.0", None),
        ("5.100", None),  # newer than 5.23, though not in the order of the alphabet
        ("5.23.0a0+vendor.25.1", None),  # a vendor's build
        ("5.24.0+cu124", None),
        ("", None),  # a leftover folder that says nothing
        (None, None),
    ],
)
def test_versions_that_do_not_fit_are_named(monkeypatch, version, said):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert installed.misfits([Requirement("somelib>=5.23,<6")]) == [said] * (said is not None)


def test_a_missing_package_is_no_misfit():
    assert installed.misfits([Requirement("no-such-package-of-phi3v>=1")]) == []


def test_an_older_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ImportError, match="^this is Python 3.10, and Python 3.11 or newer is needed$"):
        installed.check()


def test_without_a_checkout_what_was_installed_counts(monkeypatch, tmp_path):
    lines = ["torch>=2.6", 'pytest>=999; extra == "test"']
    monkeypatch.setattr(installed, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert [str(own) for own in installed.requirements()] == ["torch>=2.6"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune_hf_trainer_docvqa.py", "tools/ask.py"])
def test_a_script_ends_with_one_line_before_it_imports_the_package(tmp_path, script):
    (tmp_path / "peft-0.9.1.dist-info").mkdir()
    (tmp_path / "peft-0.9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.9.1\n")
    (tmp_path / "peft.py").write_text("raise RuntimeError('imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, ROOT / script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: peft 0.9.1 is installed, and peft>=") and "pip install -e" in line


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_first_process_of_a_node_says_it_and_the_others_wait(monkeypatch, capsys, local_rank):
    calls, usual, error = [], [], ImportError("too old")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(installed.time, "sleep", lambda seconds: calls.append("waits"))
    monkeypatch.setattr(installed.os, "_exit", calls.append)
    installed._end(error, lambda *args: usual.append(args), ImportError, error, None)
    assert calls == ([2] if local_rank == "0" else ["waits", 2]) and not usual
    assert capsys.readouterr().err == ("error: too old\n" if local_rank == "0" else "")


def test_other_exceptions_are_reported_as_usual():
    usual, other = [], ValueError("another")
    installed._end(ImportError("too old"), lambda *args: usual.append(args), ValueError, other, None)
    assert usual == [(ValueError, other, None)]
