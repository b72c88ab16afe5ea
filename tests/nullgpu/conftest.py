"""What a process on the stand-in for a GPU finds, once for all tests in this folder."""

import pytest
from nullgpu.stand_in import missing, run

ATTENTION = ("sdpa", "varlen")


@pytest.fixture(scope="session")
def on_stand_in(tmp_path_factory) -> dict:
    if lacking := missing():
        pytest.skip(f"the stand-in for a GPU {lacking}")
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "data").mkdir()
    return run(folder, "both.py", folder / "data", *ATTENTION)
