"""What is printed goes through one module, which escapes what a terminal obeys. A run outlives its readers."""

import ast
import io
import logging
import os
import subprocess
import sys
import warnings

import pytest
from bad_texts import NAME, UNSEEN
from helpers import ROOT, environment
from tqdm import tqdm

from phi3v import secrets
from phi3v.console import _Output, say, tell
from phi3v.errors import BadExamples, InputError, Parser, Problems, blaming

# These print what is safe already: `error: …` with the message of an InputError, and tracebacks. installed.py runs
# before packages are imported, which may be too old for the console.
PRINT_THEMSELVES = {"console.py", "errors.py", "secrets.py", "installed.py"}


def test_everything_is_printed_through_the_console():
    for path in [*(ROOT / "phi3v").rglob("*.py"), ROOT / "tools" / "merge_adapter.py"]:
        if path.name not in PRINT_THEMSELVES:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {getattr(call.func, "id", getattr(call.func, "attr", None)) for call in calls}
            assert "print" not in names, f"{path}: print with say() or tell() of phi3v.console"


def is_safe(text: str) -> bool:
    return not set(UNSEEN) - {"\n"} & set(text) and not any(
        line.startswith(("PWNED", "error:")) for line in text.split("\n")
    )


def test_names_can_not_command_the_terminal(capsys):
    say(f"example {NAME}, 3 tokens")
    tell(NAME, to_stderr=True)
    problems, bad = Problems(), BadExamples(skip=True)
    problems.add(NAME, NAME)
    problems.add(NAME, NAME)
    errors = [InputError(NAME), InputError(f"2 problems\n  {NAME}")]
    for raising in (lambda: problems.raise_if_any(NAME), lambda: blame(NAME), lambda: Parser().error(NAME)):
        with pytest.raises(InputError) as error:
            raising()
        errors.append(error.value)
    bad.add("a", NAME)
    bad.settle(NAME, 1)
    Parser(description=NAME).print_help()
    out, err = capsys.readouterr()
    assert is_safe(out) and is_safe(err) and out.count("PWNED") >= 9 and "\\x1b[2J" in out and "\\nerror: PWNED" in out
    assert all(is_safe(str(error)) and "\\x1b[2J" in str(error) for error in errors)


def blame(name):
    with blaming(name, name):
        raise OSError(name)


def test_what_libraries_print_is_guarded(monkeypatch, capsys):
    for owner, name in ((sys, "excepthook"), (warnings, "formatwarning"), (tqdm, "status_printer")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    factory, thread_hook = logging.getLogRecordFactory(), secrets.threading.excepthook
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    token = "hf_" + "a1" * 12
    try:
        secrets.guard_output_of_libraries()
        logger = logging.getLogger("library")
        logger.addHandler(handler)
        logger.warning("\x1b[1mreads\x1b[0m\n  %s %s", NAME, token)
        try:
            raise ValueError(NAME + token)
        except ValueError as e:
            logger.exception("failed")
            sys.excepthook(ValueError, e, e.__traceback__)
            secrets.threading.excepthook(secrets.threading.ExceptHookArgs((ValueError, e, e.__traceback__, None)))
        list(tqdm([1], desc=NAME.replace("\n", "") + token, file=text))
        print(warnings.formatwarning(NAME + token, UserWarning, "file.py", 1, ""), file=text)
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
        secrets.threading.excepthook = thread_hook
    shown = text.getvalue() + capsys.readouterr().err
    assert token not in shown and "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert shown.startswith("reads\n  \\x07\\x1b[2J") and shown.count("PWNED") >= 10


PROGRAM = """
import os, sys
from phi3v.console import say
from phi3v.errors import exit_on_input_error

def main():
    for i in range(20_000):
        say(f"line {i} of a long run, which nobody reads → \\u2603")
    print("a library prints too", flush=True)
    with open(sys.argv[1], "w") as file:
        file.write("all was saved")

exit_on_input_error(main)
"""


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "saved")]
    shell = ["bash", "-c", 'PYTHONIOENCODING=ascii "$@" | head -1; exit ${PIPESTATUS[0]}', "bash", *command]
    run = subprocess.run(shell, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert run.stdout == "line 0 of a long run, which nobody reads \\u2192 \\u2603\n"
    assert run.stderr.count("nobody reads the standard output any more") == 1
    assert (tmp_path / "saved").read_text() == "all was saved"


@pytest.mark.parametrize("fault", ["no reader", "full disk"])
def test_what_can_not_be_written_is_dropped(fault):
    if fault == "full disk":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, number = os.pipe()
        os.close(reader)
    try:
        with io.TextIOWrapper(io.BufferedWriter(_Output(number, "w", closefd=False))) as stream:
            for _ in range(3):
                print("a line", file=stream, flush=True)
    finally:
        os.close(number)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_is_shown_before_what_is_printed_next(unbuffered):
    """With PYTHONUNBUFFERED, which images of containers often set, even the beginning of a line is."""
    code = """
import os, sys
from phi3v.console import outlive_readers
outlive_readers()
sys.stderr.write("a bar")
if not sys.argv[1]:
    sys.stderr.write("\\n")
os.write(2, b"another line")
"""
    given = environment() | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", code, unbuffered], env=given, capture_output=True, text=True)
    assert done.stderr == ("a baranother line" if unbuffered else "a bar\nanother line")


@pytest.mark.slow
def test_the_model_alone_does_not_load_what_reads_tables():
    """They take 80 MB."""
    code = (
        "import sys, phi3v; print([name for name in ('datasets', 'torch._inductor.compile_fx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]
