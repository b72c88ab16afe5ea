"""What a process on the stand-in for a GPU finds, once for all tests in this folder."""

import json

import pytest
from nullgpu.stand_in import missing, run

ATTENTION = ("sdpa", "varlen")


@pytest.fixture(scope="session")
def on_stand_in(made_once) -> dict:
    if lacking := missing():
        pytest.skip(f"the stand-in for a GPU {lacking}")

    def make(folder):
        (folder / "data").mkdir()
        found = run(folder, "both.py", folder / "data", *ATTENTION)
        (folder / "found.json").write_text(json.dumps(found))

    return json.loads((made_once("stand_in", make) / "found.json").read_text())
