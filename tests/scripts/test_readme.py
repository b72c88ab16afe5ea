"""README.md and the other pages hold true: programs accept the commands, links lead somewhere, named files exist."""

import argparse
import importlib.util
import re
import shlex
import sys

import pytest
from helpers import CHECKPOINT, ROOT, parse_command

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PROGRAM = re.compile(r"finetune_hf_trainer_\w+\.py|convert_ucf101\.py|(tools|demo)/\w+\.py")
FOLDERS = "tools|tests|ds_config|demo|benchmarks|docs|phi3v"


def commands(text: str) -> list[list[str]]:
    """The words of each command in the blocks that are marked as shell."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


COMMANDS = [(page, words) for page, text in TEXTS.items() for words in commands(text)]
OF_PROGRAMS = [
    pytest.param(words[place], words[place + 1 :], id=f"{page}: {' '.join(words)}")
    for page, words in COMMANDS
    for place, word in enumerate(words)
    if PROGRAM.fullmatch(word)
]


class Parsed(Exception):
    """Raised in place of what a program does after it has parsed its command line."""


def stop_after(parse):
    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    return parse_and_stop


def load(path, monkeypatch):
    """The program at `path` as a module, with its own folder on the path, as when it is started."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_there_are_commands_to_look_at():
    assert len(OF_PROGRAMS) >= 25
    assert {program for page, words in COMMANDS for program in words if PROGRAM.fullmatch(program)} >= {
        *(path.name for path in ROOT.glob("finetune_hf_trainer_*.py")),
        *("convert_ucf101.py", "tools/ask.py", "tools/convert_conversations.py", "tools/merge_adapter.py"),
        "tools/compare_runs.py",
    }


@pytest.mark.parametrize("program, words", OF_PROGRAMS)
def test_a_command_is_accepted(program, words, tmp_path, monkeypatch):
    module = load(ROOT / program, monkeypatch)
    if not program.startswith("finetune_hf_trainer_"):
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)
            monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(parse))
        with pytest.raises(Parsed):
            module.main(words)
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_config").symlink_to(ROOT / "ds_config")
    (tmp_path / "DATA").mkdir()
    if words[:1] == ["OUT"]:  # tools/slurm.sh takes the output folder first
        words = ["--output_dir", *words]
    if "--model_name_or_path" in words:
        words = [str(CHECKPOINT) if word == "OUT" else word for word in words]
    else:
        words = [*words, "--model_name_or_path", str(CHECKPOINT)]
    parse_command(module, words)


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^make ([\w-]+)|`make ([\w-]+)", TEXTS[page], re.MULTILINE)
    assert {first or second for first, second in named} <= set(targets)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", TEXTS)
def test_named_files_exist(page):
    names = set(re.findall(rf"(?<![\w./*-])(?:{FOLDERS})/[\w./]*\w", TEXTS[page]))
    names |= {match[0] for match in PROGRAM.finditer(TEXTS[page]) if "/" not in match[0]}
    assert not [name for name in sorted(names) if not (ROOT / name).exists()]


def test_every_page_is_linked_from_the_readme():
    assert not [page for page in TEXTS if page not in ("README.md", *re.findall(r"\]\(([^)]+)\)", TEXTS["README.md"]))]


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert (ROOT / "docs" / "report.png").stat().st_size <= 200_000
