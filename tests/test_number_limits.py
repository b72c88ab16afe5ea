"""A number outside of the limits of its flag is one error line. scripts/test_flags.py: every such flag has limits."""

import math

import pytest

from phi3v.errors import InputError
from phi3v.number_limits import LIMITS, check_finite, check_numbers, most_workers

WRONG = [math.nan, math.inf, -math.inf, -1e9, -0.5, 10**400]


@pytest.mark.parametrize("name", LIMITS)
def test_values_outside_of_the_limits_are_one_line(name):
    for value in WRONG:
        if value == 10**400 and LIMITS[name].most == math.inf:
            continue  # finite
        with pytest.raises(InputError, match=f"^--{name} is .*, (must be|but) .*$"):
            check_numbers({name: value})


DEFAULTS_AND_USUAL = {
    "batch_size": 64, "num_crops": 16, "lora_rank": 128, "lora_alpha_ratio": 0.5, "lora_dropout": 0.0, "wd": 0.0,
    "learning_rate": 5e-6, "num_train_epochs": 0.1, "max_steps": -1, "warmup_steps": 0.03, "adam_beta1": 0.0,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 0, "seed": 2**32 - 1, "logging_steps": 0.1,
    "save_total_limit": 10**9, "eval_delay": 0, "dataloader_num_workers": 0, "ddp_timeout": 7200,
    "max_new_tokens": None, "neftune_noise_alpha": 5,
}  # fmt: skip


def test_usual_values_pass():
    check_numbers(DEFAULTS_AND_USUAL)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("seed", 2**32, "must be at least 0 and at most 4294967295"),
        ("wd", -5.0, "must be at least 0 and finite"),
        ("adam_beta2", 1.5, "must be at least 0 and below 1"),
        ("adam_beta1", 1.0, "must be at least 0 and below 1"),
        ("max_steps", 0, "must be at least 1 and at most 1000000000, or -1 to leave it out"),
        ("num_crops", 17, "but the model was trained with at most 16"),
        ("learning_rate", 0.0, "must be above 0 and finite"),
    ],
)
def test_the_message_says_what_is_allowed(name, value, said):
    with pytest.raises(InputError) as error:
        check_numbers({name: value})
    assert str(error.value) == f"--{name} is {value}, {said}"


def test_any_usual_number_of_workers_is_allowed():
    assert most_workers(1) == 64 and most_workers(96) == 384


def test_numbers_inside_of_lists_and_objects_must_be_finite():
    check_finite({"a": [1, 2.5, {"b": "nan"}], "c": None}, "--flag")
    with pytest.raises(InputError, match="--flag: a: b is nan, must be a finite number"):
        check_finite({"a": [1, {"b": math.nan}]}, "--flag")
    with pytest.raises(InputError, match="is inf"):
        check_finite((1.0, (math.inf,)), "--flag")
