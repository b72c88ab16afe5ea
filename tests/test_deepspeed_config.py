"""A DeepSpeed json that can't be used is one error; the ZeRO stage is read in one place."""

import json
import os

import pytest
from bad_folders import DEEPSPEED
from helpers import ROOT, train

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


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_configuration_that_deepspeed_would_refuse_is_one_line(name, tmp_path):
    content, message = DEEPSPEED[name]
    path = tmp_path / "zero.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:
        read_deepspeed_config(path)
    assert str(error.value).startswith(f"--deepspeed {path}") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "zero.json")
    with pytest.raises(InputError, match="is not a regular file"):
        read_deepspeed_config(tmp_path / "zero.json")


def test_a_file_that_deepspeed_would_overwrite_is_named(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    profiler = {"flops_profiler": {"enabled": True, "output_file": str(tmp_path / "mine.txt")}}
    (tmp_path / "zero.json").write_text(json.dumps(profiler))
    with pytest.raises(InputError, match="flops_profiler would overwrite .*mine.txt"):
        read_deepspeed_config(tmp_path / "zero.json")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_config").iterdir()), ids=lambda path: path.stem)
def test_the_configurations_of_this_repository_are_accepted(path):
    assert read_deepspeed_config(path) == json.loads(path.read_text())


def test_a_json_that_contradicts_the_flags_is_named_before_the_model_is_loaded(toy_data, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 5}))
    with pytest.raises(InputError, match="the json contradicts the flags: gradient_clipping=5 vs hf max_grad_norm=1.0"):
        train(toy_data, tmp_path / "out", "--deepspeed", path)


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
