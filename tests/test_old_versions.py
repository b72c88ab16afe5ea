"""That the code uses nothing that only the newest of the allowed versions of packages have.

`make test-oldest` runs this with the oldest ones. It also finds names where no test comes, as on a GPU.
"""

import ast
import importlib
import inspect
from functools import cache
from types import ModuleType

import pytest
import torch
from helpers import ROOT
from huggingface_hub import get_session

from phi3v import old_versions

PACKAGES = {"torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "huggingface_hub"}
PACKAGES |= {"safetensors", "tokenizers", "regex", "PIL", "numpy", "pyarrow", "pandas", "psutil", "av", "rapidfuzz"}
# What only some versions have, in files that ask first whether it is there.
ASKED_FOR = {
    ("phi3v/model/varlen.py", "torch.nn.attention.activate_flash_attention_impl"),
    ("phi3v/old_versions.py", "huggingface_hub.utils._http.httpx"),
}
FILES = sorted(ROOT.glob("*.py")) + [
    path for part in ("phi3v", "tools", "demo") for path in (ROOT / part).rglob("*.py")
]


def full_name(node: ast.expr, imported: dict[str, str]) -> str | None:
    """For an expression that names something of a package, its name from the package on: torch.cuda.is_available."""
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, imported)
        return owner and f"{owner}.{node.attr}"
    return imported.get(node.id) if isinstance(node, ast.Name) else None


@cache
def find(name: str):
    """What has this name; None if only the running program knows. Raises AttributeError if there is none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        owner, _, last = name.rpartition(".")
    holder = find(owner) if owner else None
    return getattr(holder, last) if isinstance(holder, ModuleType | type) and holder is not torch.ops else None


def lacking(source: str) -> list[tuple[str, str]]:
    """Names and keyword arguments in a program that the installed versions lack, as (name, what is wrong)."""
    tree, imported, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            imported |= {name: name for alias in node.names if not alias.asname for name in [alias.name.split(".")[0]]}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    imported = {name: full for name, full in imported.items() if full.split(".")[0] in PACKAGES}
    named = [name for node in ast.walk(tree) if (name := full_name(node, imported))]
    for name in [*imported.values(), *named]:
        try:
            find(name)
        except AttributeError as e:
            found.append((name, str(e)))
    lost = {name for name, _ in found}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = full_name(call.func, imported)
        if name and name not in lost and callable(function := find(name)):
            found += [(name, f"it does not take {key}") for key in unknown_keywords(function, call)]
    return found


def unknown_keywords(function, call: ast.Call) -> list[str]:
    try:
        taken = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return []
    if any(own.kind is own.VAR_KEYWORD for own in taken.values()):
        return []
    return [own.arg for own in call.keywords if own.arg and own.arg not in taken]


def starts_processes(path) -> bool:
    """Parts of DeepSpeed look for compilers while they are imported."""
    return "deepspeed" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * starts_processes(path)) for path in FILES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_installed_versions_have_all_that_the_code_names(path):
    file = str(path.relative_to(ROOT))
    found = [(name, why) for name, why in lacking(path.read_text(encoding="utf-8")) if (file, name) not in ASKED_FOR]
    assert not found


def test_what_is_lacking_is_found():
    program = """
import torch.nn.functional as F
from torch import accelerator
def later():
    from transformers import Trainor
    accelerator.forget(torch.zeros(1))
    accelerator.current_accelerator(politely=True)
    F.linear(x).sum().anything()
"""
    names = {name for name, _ in lacking(program)}
    assert names == {"transformers.Trainor", "torch.accelerator.forget", "torch.accelerator.current_accelerator"}


def test_the_http_client_is_the_one_that_huggingface_hub_uses():
    assert isinstance(get_session(), old_versions.httpx.Client)


def test_memory_of_the_accelerator(monkeypatch):
    names = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache")
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cuda)
    assert all(hasattr(old_versions.accelerator_memory(), name) for name in names)
    monkeypatch.delattr(torch.accelerator, "max_memory_allocated", raising=False)  # as before torch 2.9
    assert old_versions.accelerator_memory() is torch.cuda
