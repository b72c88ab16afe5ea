"""Weights that are not those of the configuration are an error that names the tensor, before memory is allocated."""

import shutil

import pytest
import torch
from bad_models import WEIGHTS, index
from helpers import CHECKPOINT
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM
from phi3v.errors import InputError
from phi3v.model.loading import find_saved, load_saved, nf4_config
from phi3v.model.weights import check_shapes


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name, copy):
    change, message = WEIGHTS[name]
    change(copy)
    with pytest.raises(InputError) as error:
        find_saved(str(copy))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_index_of_shards_is_read(copy):
    index(lambda content: content)(copy)
    assert load_saved(find_saved(str(copy)), dtype=torch.float32).dtype == torch.float32


def test_what_older_checkpoints_hold_beside_the_models_weights(copy):
    weights = load_file(copy / "model.safetensors")
    position = "model.vision_embed_tokens.img_processor.vision_model.embeddings.position_ids"
    weights |= {"model.vision_embed_tokens.wte.weight": torch.zeros(512, 128), position: torch.arange(17)}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    load_saved(find_saved(str(copy)), dtype=torch.float32)


def test_a_model_in_four_bits_is_read(copy):
    model = Phi3VForCausalLM.from_pretrained(
        copy, dtype=torch.float32, quantization_config=nf4_config(torch.float32), device_map={"": "cpu"}
    )
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy)
    again = load_saved(find_saved(str(copy)), dtype=torch.float32, device="cpu")
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_all_that_is_wrong_stands_in_one_line():
    found = {"a": (1,), "b": (2,), "c.inv_freq": (3,), "x": (1,)}
    with pytest.raises(InputError) as error:
        check_shapes(found, {"a": (1,), "b": (3,), "d": (1,)}, "F", "!")
    assert str(error.value) == (
        "F lacks the weights d; it holds weights that the model does not have, x; it holds b of shape [2], must be [3]!"
    )
