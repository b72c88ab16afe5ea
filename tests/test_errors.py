"""Messages about wrong input are collected and printed once, and the process ends with status 2."""

import signal

import pytest
import torch
from helpers import COMMON, ROOT, torchrun

from phi3v.errors import (
    BadExamples,
    InputError,
    Problems,
    exit_on_input_error,
    is_out_of_memory,
    listing,
    lowering,
)


def test_problems_are_counted_and_the_first_shown():
    problems = Problems(shown=2)
    problems.raise_if_any("x")
    problems.add("x:1", "bad\x1b[31m\n")
    with pytest.raises(InputError) as error:
        problems.raise_if_any("x")
    assert str(error.value) == "x:1: bad\\x1b[31m\\n"
    problems.add("x:2", "worse")
    others = Problems()
    others.add("y:3", "z" * 5000)
    problems.extend(others)
    assert len(problems) == 3
    with pytest.raises(InputError) as error:
        problems.raise_if_any("x")
    assert str(error.value) == ("x: 3 problems; these are the first 2\n  x:1: bad\\x1b[31m\\n\n  x:2: worse")


def test_bad_examples_are_an_error_or_left_out(capsys):
    for skip in (False, True):
        bad = BadExamples(skip)
        with bad.catching("a:1"):
            raise InputError("bad")
        bad.add("a:1", "worse")
        bad.add("a:2", "bad\n")
        if not skip:
            with pytest.raises(InputError, match="a: 3 problems\n  a:1: bad\n  a:1: worse\n  a:2: bad"):
                bad.settle("a", used=1)
            assert bad.left_out == []
    bad.settle("a", used=1)
    bad.settle("b", used=0)
    assert bad.left_out == ["a:1: bad", "a:2: bad\\n"]
    assert capsys.readouterr().out == "a: 2 of 3 examples are left out\n"
    bad.add("c:1", "bad")
    with pytest.raises(InputError, match="none of the 1 examples of c can be used; c:1: bad"):
        bad.settle("c", used=0)


def test_a_long_list_is_cut():
    assert listing([]) == []
    lines = listing([f"a:{i}: bad" for i in range(1234)])
    assert lines[0] == "1,234 examples were left out, as --on_bad_example skip says:" and len(lines) == 12
    assert lines[10] == "  a:9: bad" and lines[11] == "  … and 1,224 more"


@pytest.mark.parametrize("prefix", ["", "Caught InputError in worker\nTraceback:\n  line\nphi3v.errors.InputError: "])
def test_several_problems_end_the_process_with_all_their_lines(prefix, capsys):
    def main():
        raise InputError(prefix + "data: 2 problems\n  a\n  b\n")

    with pytest.raises(SystemExit) as status:
        exit_on_input_error(main)
    assert status.value.code == 2 and capsys.readouterr().err == "error: data: 2 problems\n  a\n  b\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as status:
        exit_on_input_error(main)
    printed = capsys.readouterr().err
    assert status.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("error: memory ran out (") and "docs/hardware.md" in printed
    with pytest.raises(InputError, match="^memory ran out while answers were generated: lower --max_new_tokens$"):
        with lowering("answers were generated: lower --max_new_tokens"):
            main()


def test_ctrl_c_in_a_tool_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        exit_on_input_error(lambda: signal.raise_signal(signal.SIGINT))
    assert end.value.code == 130 and capsys.readouterr().err == "SIGINT: stopped\n"


def test_what_is_no_lack_of_memory():
    of_a_worker = MemoryError("Caught MemoryError in DataLoader worker process 0.")  # which has its own line
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    for error in (RuntimeError("out of range"), ValueError("out of memory"), InputError("bad"), of_a_worker, killed):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), lowering("answers were generated"):
            raise error
    with pytest.raises(RuntimeError, match="out of range"):
        exit_on_input_error(lambda: (_ for _ in ()).throw(RuntimeError("out of range")))


@pytest.mark.slow
def test_rank_0_alone_reports_and_torchrun_ends(toy_data, tmp_path):
    flags = ["--data_dir", toy_data, "--output_dir", tmp_path, *COMMON, "--batch_size", "3"]
    run = torchrun(ROOT / "finetune_hf_trainer_ucf101.py", *flags)
    assert run.returncode == 1  # torchrun's own status
    assert run.stderr.count("error: --batch_size 3 must be a multiple of processes") == 1
    assert "exitcode  : 2" in run.stderr
