"""The flags of every program are those of the frozen list in flags.json, with the same defaults.

A user's command line must work with every later version, so a flag never disappears from the list. Someone who adds a
flag adds it to flags.json too.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from transformers import HfArgumentParser, TrainingArguments

from phi3v.command_line import REFUSED
from phi3v.number_limits import LIMITS, WITHOUT_LIMITS

FROZEN = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
PROGRAMS = [name for name in FROZEN if name != "Trainer"]
DEPENDS_ON_THE_MACHINE = {"dataloader_num_workers", "num_workers"}


class Found(Exception):
    """Ends a program that was asked for --help, and carries its parser."""


def parser_of(program: str, root: Path = ROOT) -> argparse.ArgumentParser:
    """The parser that prints the --help of a program."""

    def stop(self, parser, namespace, values, option_string=None):
        raise Found(parser)

    path = root / program
    spec = importlib.util.spec_from_file_location(f"flags_of_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(path.parent))
            patch.setattr(argparse._HelpAction, "__call__", stop)
            spec.loader.exec_module(module)
            module.main(["--help"])
    except Found as found:
        return found.args[0]
    finally:
        del sys.modules[spec.name]
    raise AssertionError(f"{program} did not look at --help")


def names_of(action: argparse.Action) -> list[str]:
    """The names of an argument on the command line; a positional argument has its plain name. The scripts also take
    every flag with hyphens (--batch-size for --batch_size), and the list leaves those out."""
    names = [name for name in action.option_strings if "-" not in name[2:]]
    for name in names:
        hyphenated = "--" + name[2:].replace("_", "-")
        assert len(action.option_strings) == len(names) or hyphenated in action.option_strings
    return [] if action.dest == "help" else names or [action.dest]


def flags_of_the_trainer() -> dict[str, object]:
    """All flags of the Trainer in the installed version of transformers → their defaults there."""
    return {
        name: action.default for action in HfArgumentParser(TrainingArguments)._actions for name in names_of(action)
    }


def flags_of(program: str, root: Path = ROOT) -> tuple[dict[str, object], set[str]]:
    """(the program's own flags → their defaults, the flags that it takes from the Trainer unchanged). A Trainer's flag
    to which the program gives another default is one of its own."""
    trainer = flags_of_the_trainer() if program.startswith("finetune_") else {}
    parser = parser_of(program, root)
    own, unchanged = {}, set()
    for action in parser._actions:
        default = action.default.name if isinstance(action.default, Path) else action.default
        if action.dest in DEPENDS_ON_THE_MACHINE:
            default = "depends on the machine"
        for name in names_of(action):
            if name in trainer and default == trainer[name]:
                unchanged.add(name)
            else:
                own[name] = json.loads(json.dumps(default, default=str))
    return own, unchanged


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_has_the_flags_and_defaults_of_the_frozen_list(program):
    frozen = FROZEN[program]
    own, from_the_trainer = flags_of(program)
    assert own.keys() == frozen.keys(), "a flag disappeared, or a new flag is not yet in tests/scripts/flags.json"
    assert own == frozen, "a default has changed"
    if program.startswith("finetune_"):
        # Another version of transformers may have other flags.
        installed = flags_of_the_trainer().keys() - own.keys()
        assert set(FROZEN["Trainer"]) & installed <= from_the_trainer <= installed


def test_the_list_has_every_program():
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("demo/make_*.py")]
    without_flags = {"tools/shared_blocks.py", "tools/ask_server.py"}
    assert {str(path.relative_to(ROOT)) for path in programs} - without_flags == set(PROGRAMS)


def test_every_script_takes_all_flags_of_the_trainer():
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for program in PROGRAMS:
        if program.startswith("finetune_"):
            assert fields <= {action.dest for action in parser_of(program)._actions}


# Numbers of the programs beside the scripts, each of which has few of them and checks them itself.
CHECKED_BY_THE_PROGRAM = {
    "tools/ask.py": {"num_crops", "max_new_tokens", "port"},
    "tools/convert_conversations.py": {"val_share"},
    "convert_ucf101.py": {"num_frames", "num_workers", "max_members", "max_unpacked_gib", "max_seconds_per_video"},
    "demo/make_data.py": {"videos", "rows"},
    "demo/make_base.py": {"tower_steps", "decoder_steps"},
}


def numbers_of(program: str) -> set[str]:
    """The names of a program's flags that are numbers: by their type, or by their default."""
    found = set()
    for action in parser_of(program)._actions:
        refused = action.dest in REFUSED or action.dest.startswith("hub_")
        is_number = action.type in (int, float) or getattr(action.type, "__name__", "") == "positive"
        default = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        if (is_number or default) and not (program.startswith("finetune_") and refused):
            found.add(action.dest)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_flag_of_every_program_has_limits(program):
    known = LIMITS.keys() | WITHOUT_LIMITS if program.startswith("finetune_") else CHECKED_BY_THE_PROGRAM.get(program)
    assert numbers_of(program) <= (known or set()), "add the new flag to LIMITS in phi3v/number_limits.py"


def test_the_table_has_no_other_flags():
    names = set().union(*(numbers_of(program) for program in PROGRAMS if program.startswith("finetune_")))
    assert LIMITS.keys() | WITHOUT_LIMITS == names and not LIMITS.keys() & WITHOUT_LIMITS
