"""The command of a run, for its model card and for what a user is told when it stops."""

import sys
from pathlib import Path

import pytest

from phi3v import launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}


@pytest.fixture
def started(monkeypatch):
    """started(cmdline of the process that started this one, **variables of the environment)"""

    def set_up(words, argv=("a b/script.py", "--data_dir", "my data"), **variables):
        class Process:
            def parent(self):
                return self

            def cmdline(self):
                return list(words)

        monkeypatch.setattr(launch.psutil, "Process", Process)
        monkeypatch.setattr(sys, "argv", list(argv))
        for name in ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", *TORCHRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_up


SCRIPT = ("a b/script.py", "--data_dir", "my data")


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["/v/bin/python3", "/v/bin/torchrun", "--nproc_per_node=8", "--log-dir", "a b"],
         "torchrun --nproc_per_node=8 --log-dir 'a b'"),
        (["/v/python3.12", "-m", "torch.distributed.run", "--max-restarts=1"],
         "python -m torch.distributed.run --max-restarts=1"),
        (["/v/python", "/v/bin/accelerate", "launch", "--num_processes", "8"],
         "accelerate launch --num_processes 8"),
        (["/usr/bin/torchrun", "--nnodes=2"], "torchrun --nnodes=2"),
    ],
)  # fmt: skip
def test_the_command_is_the_one_that_was_used(started, words, wanted):
    started([*words, *SCRIPT], **TORCHRUN)
    assert launch.command() == f"{wanted} 'a b/script.py' --data_dir 'my data'"


def test_torchrun_in_a_process_that_cannot_be_read(started):
    started(["sshd"], **TORCHRUN)
    assert launch.launcher() == ["torchrun", "--nproc_per_node=8"]
    nodes = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    started([], **TORCHRUN | nodes)
    several = ["--nnodes=2", "--node_rank=1", "--master_addr=node0", "--master_port=29500"]
    assert launch.launcher() == ["torchrun", "--nproc_per_node=8", *several]


def test_a_run_without_torchrun(started):
    started(["/bin/bash"])
    assert launch.command() == "python 'a b/script.py' --data_dir 'my data'"


def test_flags_are_left_out_with_their_values_and_secrets_are_masked(started):
    argv = "s.py --a 1 2 --resume-from-checkpoint=x --b --resume_from_checkpoint y --token hf_x --lr -1".split()
    started([], argv)
    assert launch.command_to_resume() == "python s.py --a 1 2 --b --token ••• --lr -1 --resume_from_checkpoint auto"
    started([], "s.py --model_name_or_path OWNER/M --model_revision main --fp32".split())
    evaluate = launch.command_to_evaluate(Path("my out"))
    assert evaluate == "python s.py --fp32 --model_name_or_path 'my out' --evaluate_only"
