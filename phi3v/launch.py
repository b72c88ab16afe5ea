"""The command that started this run, and the commands that go on with it."""

import os
import re
import sys
from pathlib import Path

import psutil

from .secrets import masked_command

PYTHON = re.compile(r"python[\d.]*$")


def launcher() -> list[str]:
    """What stood before the script in the command: ["torchrun", "--nproc_per_node=8"], or ["python"].

    The command is that of the process which started this one. If that can't be read, it is made from torchrun's
    variables."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ["python"]
    try:
        words = psutil.Process().parent().cmdline()
        words = words[: words.index(sys.argv[0])]
    except (psutil.Error, AttributeError, ValueError):
        words = []
    if words and PYTHON.match(Path(words[0]).name):  # torchrun is a Python program
        words = words[1:] if words[1:2] and not words[1].startswith("-") else ["python", *words[1:]]
    if len(words) > 1:
        return [Path(words[0]).name, *words[1:]]
    nodes = int(environment.get("GROUP_WORLD_SIZE", 1))
    several = []
    if nodes > 1:
        several = [f"--nnodes={nodes}", f"--node_rank={environment['GROUP_RANK']}"]
        several += [f"--master_addr={environment['MASTER_ADDR']}", f"--master_port={environment['MASTER_PORT']}"]
    return ["torchrun", f"--nproc_per_node={environment['LOCAL_WORLD_SIZE']}", *several]


def command(without: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> str:
    """The command of this run for a shell, in one line, with tokens and passwords masked.

    without: names of flags to leave out, with their values; more: words to add.
    """
    words, values = [], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            values = word[2:].partition("=")[0].replace("-", "_") in without
        if not values:
            words.append(word)
    return masked_command([*launcher(), sys.argv[0], *words, *more])


def command_to_resume() -> str:
    return command(("resume_from_checkpoint",), ("--resume_from_checkpoint", "auto"))


def command_to_evaluate(folder: Path) -> str:
    """The command that evaluates the model in a folder."""
    left_out = ("model_name_or_path", "model_revision", "resume_from_checkpoint", "resume_anyway")
    return command(left_out, ("--model_name_or_path", str(folder), "--evaluate_only"))
