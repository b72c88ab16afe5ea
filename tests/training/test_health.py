"""A training whose loss or weights are no longer usable stops before they are saved."""

import pytest
import torch
from helpers import RESUMABLE_MODES, SHORT, train, train_resumable
from safetensors.torch import load_file

from phi3v.errors import InputError
from phi3v.training.health import unusable_weight


def test_training_stops_when_the_loss_is_no_longer_finite(toy_data, tmp_path):
    flags = "--learning_rate 1e20 --lr_scheduler_type constant --warmup_steps 0 --max_grad_norm 0".split()
    with pytest.raises(InputError, match=r"NaN or infinite in the last \d+ micro-batches up to step \d+.*1e\+20"):
        train_resumable(toy_data, tmp_path, *RESUMABLE_MODES["full"], *flags, "--optim", "sgd")
    for path in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("more", [[], ["--save_steps", "2"], ["--use_lora"], ["--eval_steps", "2", "--keep_best"]])
def test_what_the_last_update_has_ruined_is_not_saved(more, toy_data, tmp_path):
    flags = [*SHORT, "--learning_rate", "1e30", "--no_eval_before", "--max_eval_samples", "1"]
    with pytest.raises(
        InputError, match="the update of step 2 has made the weight .* larger than 65504.*no checkpoint"
    ):
        train(toy_data, tmp_path, *flags, *more)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unusable_weights_are_found(dtype):
    model = torch.nn.Linear(3, 2, dtype=dtype)
    assert unusable_weight(model) is None
    for value in (float("nan"), float("inf"), -float("inf"), -1e6):
        with torch.no_grad():
            model.weight[1, 2] = torch.tensor(value)  # which becomes infinite in fp16, also with torch 2.6
        assert unusable_weight(model) == "weight"
    model.weight.requires_grad_(False)
    assert unusable_weight(model) is None


def test_the_part_of_a_weight_that_zero3_leaves_here_is_looked_at():
    model = torch.nn.Linear(3, 2)
    model.bias.ds_tensor = torch.tensor([float("nan")])
    assert unusable_weight(model) == "bias"
