"""Settings beyond all reason are a ValueError that names the setting, in a file and in Python."""

import json
import shutil

import pytest
import torch
from bad_models import SETTINGS
from helpers import CHECKPOINT, TINY_MODEL
from transformers import CLIPVisionConfig

from phi3v import Phi3VConfig, Phi3VImageProcessor
from phi3v.errors import InputError
from phi3v.model.limits import check, one_of
from phi3v.model.loading import find_saved

DEMO = json.loads((CHECKPOINT / "config.json").read_text())


@pytest.mark.parametrize(("values", "message"), SETTINGS, ids=[str(values)[:40] for values, _ in SETTINGS])
def test_a_config_that_cannot_be(values, message, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(DEMO | values))
    with pytest.raises(InputError) as error:
        find_saved(str(tmp_path / "model"))
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    if "vocab_size" not in values or values["vocab_size"] > 10**6:  # the model refuses a small one
        with pytest.raises(ValueError) as error:
            Phi3VConfig(**DEMO | values)
        assert message in str(error.value)


def test_a_type_that_only_transformers_checks_is_an_error_too(tmp_path):
    vision = DEMO["vision_config"] | {"initializer_factor": 1}
    (tmp_path / "config.json").write_text(json.dumps(DEMO | {"vision_config": vision}))
    with pytest.raises(InputError, match="config.json: .*'initializer_factor' expected float, got int"):
        Phi3VConfig.from_pretrained(tmp_path)


def test_real_configs_and_those_of_users_are_accepted():
    factors = {"short_factor": [1.05] * 48, "long_factor": [1.08 + i for i in range(48)]}
    for values in (
        {},
        TINY_MODEL,
        {"rope_scaling": {"type": "su"} | factors, "dtype": torch.bfloat16, "max_position_embeddings": 131072},
        {"rope_scaling": {"rope_type": "longrope"} | factors, "eos_token_id": [1, 2], "my_note": "x"},
        {"vision_config": CLIPVisionConfig(image_size=56, patch_size=14), "num_key_value_heads": None},
        {"_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True, "sliding_window": None},
    ):
        config = Phi3VConfig(**values)
        assert Phi3VConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert Phi3VConfig(**json.loads(config.to_json_string())).to_diff_dict() == config.to_diff_dict()


def test_a_folder_does_not_choose_the_attention(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEMO | {"attn_implementation": "someone/kernel"}))
    assert Phi3VConfig.from_pretrained(tmp_path)._attn_implementation is None
    assert Phi3VConfig.from_pretrained(tmp_path, attn_implementation="eager")._attn_implementation == "eager"


@pytest.mark.parametrize(
    "values",
    [
        {"num_crops": 0},
        {"num_crops": True},
        {"image_std": [1, 1]},
        {"image_mean": [float("nan")] * 3},
        {"do_convert_rgb": "no"},
        {"crops": 1},
        {"image_size": 70},
    ],
)
def test_an_image_processor_that_cannot_be(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Phi3VImageProcessor(**values)


def test_true_is_not_one():
    check({"a": 1}, {"a": one_of(1)})
    with pytest.raises(ValueError, match="^a is True, must be 1$"):
        check({"a": True}, {"a": one_of(1)})
