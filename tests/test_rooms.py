"""The order of the code: which module may import which, how long files may get, and that each module has its tests."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "phi3v"
SCRIPTS = sorted(ROOT.glob("finetune_hf_trainer_*.py"))
ROOMS = ("model", "data", "training", "report")
# Modules at the top of phi3v that every other module may import.
FOUNDATION = {
    "console",
    "errors",
    "files",
    "hub",
    "hub_faults",
    "hub_names",
    "ranks",
    "secrets",
    "workers",
    "deepspeed_config",
    "text",
    "number_limits",
    "image_files",
    "inside",
    "old_versions",
    "signals",
    "launch",
    "process_group",
    "libraries",
    "phases",
    "run_libraries",
    "quiet",
    "flag_hints",
}
# For each room, the other rooms that it may import.
ARROWS = {"model": set(), "data": {"model"}, "training": {"model", "data"}, "report": set()}
MAY_IMPORT_ROOMS = {"run", "arguments"}  # of the modules at the top of phi3v; __init__ only model and installed
MAY_BE_LONG = {"model.modeling_phi3v"}

WITHOUT_A_TEST_FILE = {
    "quiet": "training/test_two_ranks.py reads all that two ranks print",
    "run_libraries": "test_libraries.py looks at what is loaded",
    "data.image_folder": "data/test_annotations.py reads files that name images inside and outside of a folder",
    "data.seen_images": "data/test_tables.py reads tables whose splits share images",
    "data.preview": "report/test_summary.py trains, and reads the example that is printed before the first step",
    "data.texts": "data/test_annotations.py, data/test_tables.py and tools/test_ask.py give texts that can not be used",
    "report.templates": "report/test_page.py and report/test_card.py read what the templates render",
    "training.dry_run": "test_run.py makes dry runs",
    "training.finding": "training/test_memory_check.py reads when it refuses a run, and test_hub.py what it fetches",
    "training.forecast": "training/test_estimate.py reads what it prints",
    "training.inference": "test_evaluation.py and test_answer_loss.py in training/ evaluate models in it",
    "training.meter": "it measures speed; training/test_trackers.py checks that its numbers are logged",
    "training.outline": "training/test_estimate.py compares what it estimates",
    "training.peak": "nullgpu/test_live_bytes.py compares it with what lives on a stand-in for a GPU",
    "training.steps": "data/test_sampler.py tests the sampler, and training/test_trainer.py counts the steps of runs",
    "training.workload": "training/test_costs.py compares costs of its workloads with what torch counts",
}
TESTS_OF_SEVERAL_MODULES = {
    "tests/test_rooms.py": "it looks at the code of all modules",
    "tests/training/test_two_ranks.py": "ranks and nodes as users start them; they share a launch",
    "tests/training/test_checkpoint_of_801afc1.py": "it runs the whole script",
}


def name_of(path: Path) -> str:
    """The name of a module inside of phi3v: "training.meter" for training/meter.py, and "" for __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str | None:
    first = module.partition(".")[0]
    return first if first in ROOMS else None


def imported_by(module: str) -> set[str]:
    """The modules of phi3v that a module imports, also inside its functions."""
    path = MODULES[module]
    package = ["phi3v", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from .model import packing` imports the module phi3v.model.packing; other names belong to the source.
            found |= {f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}"[6:] in MODULES}
            if any(f"{source}.{alias.name}"[6:] not in MODULES for alias in node.names):
                found.add(source)
    own = {name.removeprefix("phi3v").removeprefix(".") for name in found if name.split(".")[0] == "phi3v"}
    assert own <= MODULES.keys(), f"{path} imports {own - MODULES.keys()}, which is not a module of phi3v"
    return own


GRAPH = {module: imported_by(module) for module in MODULES}


def test_the_graph_of_imports_is_found():
    assert {"model.packing", "model.functional"} <= GRAPH["model.modeling_phi3v"] and "errors" in GRAPH["data.images"]
    assert "model.modeling_phi3v" in GRAPH[""]


def test_no_import_goes_in_a_circle():
    def circle(module, trail):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        return next((found for other in sorted(GRAPH[module]) if (found := circle(other, [*trail, module]))), None)

    for module in GRAPH:
        assert (found := circle(module, [])) is None, " imports ".join(name or "phi3v" for name in found)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_one_way(module):
    room, imported = room_of(module), GRAPH[module]
    other_rooms = {room_of(name) for name in imported} - {None, room}
    if module == "":
        assert {room_of(name) or name for name in imported} == {"model", "installed", "libraries"}
    elif room:
        assert other_rooms <= ARROWS[room]
        assert {name for name in imported if not room_of(name)} <= FOUNDATION
    elif module in FOUNDATION:
        assert imported <= FOUNDATION
    elif module not in MAY_IMPORT_ROOMS:
        assert not other_rooms


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_import_no_other_script(script):
    source = script.read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= 320
    tree = ast.parse(source)
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= 50
    others = {other.stem for other in SCRIPTS}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not others & {getattr(node, "module", None), *(alias.name for alias in node.names)}


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= 300 or module in MAY_BE_LONG


def file_of_tests(module: str) -> Path:
    *folders, name = module.split(".")
    return ROOT.joinpath("tests", *folders, f"test_{name}.py")


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_each_module_has_a_test_file_of_its_name_or_a_reason_not_to(module):
    assert file_of_tests(module).is_file() != (module in WITHOUT_A_TEST_FILE)


def test_reasons_are_given_for_modules_and_test_files_that_exist():
    assert WITHOUT_A_TEST_FILE.keys() <= MODULES.keys()
    files = [*ROOT.glob("tests/test_*.py"), *(path for room in ROOMS for path in ROOT.glob(f"tests/{room}/test_*.py"))]
    of_one_module = {file_of_tests(module) for module in MODULES}
    others = {str(path.relative_to(ROOT)) for path in files if path not in of_one_module}
    assert others == TESTS_OF_SEVERAL_MODULES.keys()
