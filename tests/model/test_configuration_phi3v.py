"""The configuration: what it refuses, and what other programs read in config.json."""

import json

import pytest
from helpers import TINY_MODEL

from phi3v import Phi3VConfig


def test_default_vision_config_is_left_out_as_on_the_hub():
    config = Phi3VConfig()
    assert (config.vision_config.image_size, config.vision_config.num_hidden_layers) == (336, 24)
    assert "vision_config" not in json.loads(config.to_json_string())
    assert "vision_config" in json.loads(Phi3VConfig(vision_config=TINY_MODEL["vision_config"]).to_json_string())


def test_crop_side_must_hold_whole_merged_patches():
    with pytest.raises(ValueError, match="not a multiple of 2 x patch_size"):
        Phi3VConfig(vision_config={"image_size": 70, "patch_size": 14})


def test_keys_of_config_json_that_vllm_and_mlx_vlm_read():
    """vLLM and mlx-vlm assume that the tower is ViT-L/14-336 and read the rest from these keys; vLLM finds its class by
    the architecture."""
    rope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    saved = json.loads(Phi3VConfig(rope_scaling=rope, architectures=["Phi3VForCausalLM"]).to_json_string())
    assert saved["model_type"] == "phi3_v" and saved["architectures"] == ["Phi3VForCausalLM"]
    assert saved["img_processor"] == {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    }
    layer = saved["embd_layer"]
    assert layer["use_hd_transform"] and layer["with_learnable_separator"] and layer["hd_transform_order"] == "sub_glb"
    assert saved["rope_scaling"] == rope and saved["rope_theta"] == 10000.0
    assert saved["original_max_position_embeddings"] == 4096 and saved["max_position_embeddings"] == 131072
    assert saved["num_key_value_heads"] == 32
