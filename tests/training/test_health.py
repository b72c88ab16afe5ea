"""A training whose loss is no longer a finite number stops."""

import pytest
from helpers import RESUMABLE_MODES, train_resumable
from safetensors.torch import load_file

from phi3v.errors import InputError


def test_training_stops_when_the_loss_is_no_longer_finite(toy_data, tmp_path):
    flags = "--learning_rate 1e20 --lr_scheduler_type constant --warmup_steps 0 --max_grad_norm 0".split()
    with pytest.raises(InputError, match=r"NaN or infinite in the last \d+ micro-batches up to step \d+.*1e\+20"):
        train_resumable(toy_data, tmp_path, *RESUMABLE_MODES["full"], *flags, "--optim", "sgd")
    for path in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
