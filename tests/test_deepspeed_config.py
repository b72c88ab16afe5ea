"""A DeepSpeed json that can't be used is one error; the ZeRO stage is read in one place."""

import json

import pytest
from helpers import ROOT

from phi3v.deepspeed_config import read_deepspeed_config, zero_stage
from phi3v.errors import InputError


def test_none_means_no_deepspeed():
    assert read_deepspeed_config(None) is None and read_deepspeed_config("none") is None


@pytest.mark.parametrize(
    "content, message", [("[]", "must hold a JSON object"), ("{", "is not valid JSON"), (None, "can't be read")]
)
def test_an_unusable_file_is_named(content, message, tmp_path):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"--deepspeed {path} {message}"):
        read_deepspeed_config(path)


def test_the_zero_stage(tmp_path):
    assert zero_stage({}) == zero_stage({"zero_optimization": {}}) == 0
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert zero_stage(read_deepspeed_config(tmp_path / "zero.json")) == 3


def test_the_shipped_files_differ_only_in_what_zero_does():
    files = {path.stem: read_deepspeed_config(path) for path in (ROOT / "ds_config").glob("*.json")}
    assert {name: zero_stage(config) for name, config in files.items()} == {
        "zero1": 1,
        "zero2": 2,
        "zero2_offload": 2,
        "zero3": 3,
    }
    one, two = (files[name].pop("zero_optimization") for name in ("zero1", "zero2"))
    assert one | {"stage": 2} == two and files["zero1"] == files["zero2"]
    assert files["zero2"].keys() <= files["zero3"].keys()
