"""What the training processes do one after another."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from phi3v import process_group
from phi3v.errors import InputError
from phi3v.process_group import first_of_node


@pytest.mark.parametrize("failing", ["nobody", "this process", "another"])
def test_what_fails_in_one_process_fails_in_all(failing, monkeypatch):
    args = SimpleNamespace(main_process_first=lambda desc: nullcontext())
    others = ["no such file"] if failing == "another" else [None]
    monkeypatch.setattr(process_group, "gather_object", lambda own: own + others)
    with nullcontext() if failing == "nobody" else pytest.raises(InputError, match="no such file"):
        with first_of_node(args, "data"):
            if failing == "this process":
                raise InputError("no such file")
