"""Rules on flags are pure functions: they look at nothing but the flags, change nothing, and say one line."""

from types import SimpleNamespace

import pytest

from phi3v.errors import InputError
from phi3v.flag_rules import check_flags

DEFAULTS = {
    "num_crops": 16, "lora_dropout": 0.0, "lora_alpha_ratio": 2.0, "lora_rank": 64, "vision_lr": None,
    "projector_lr": None, "cache_vision_gib": 100.0, "cache_vision_features": None, "on_bad_example": "error",
    "loss_on": "all",
    "freeze_vision_model": False, "train_projector": False, "use_lora": False, "use_qlora": False, "use_dora": False,
    "quantize_vision": False, "train_separators": False, "batch_size": 16, "batch_size_per_gpu": 1,
    "max_tokens_per_gpu": None, "estimate": False, "estimate_gpus": None, "evaluate_only": False, "dry_run": False,
    "keep_best": False, "resume_anyway": False, "max_length": None, "max_new_tokens": 64, "data_dir": None,
    "data_revision": None, "early_stopping_patience": None, "early_stopping_on": "metric",
    "vision_training": "default", "adapter": None,
}  # fmt: skip
TRAINER = {
    "learning_rate": 4e-5, "num_train_epochs": 1, "save_steps": 500, "eval_steps": None, "save_total_limit": None,
    "per_device_eval_batch_size": 8, "dataloader_num_workers": 1, "seed": 42, "deepspeed": None,
    "resume_from_checkpoint": None,
}  # fmt: skip
ZERO3 = {"zero_optimization": {"stage": 3}}


def check(world_size=1, has_accelerator=True, launcher=None, cores=None, **flags):
    args = SimpleNamespace(**DEFAULTS | {name: value for name, value in flags.items() if name in DEFAULTS})
    trainer = TRAINER | {name: value for name, value in flags.items() if name in TRAINER}
    before = dict(vars(args)), dict(trainer)
    try:
        check_flags(args, trainer, set(flags), world_size, has_accelerator, launcher or {}, cores)
    finally:
        assert (vars(args), trainer) == before


@pytest.mark.parametrize(
    "message, flags",
    [
        ("--lora_rank is 0, must be at least 1", {"use_lora": True, "lora_rank": 0}),
        ("--num_crops is 17, but the model was trained with at most 16", {"num_crops": 17}),
        ("--lora_dropout is 1.0, must be at least 0 and below 1", {"use_lora": True, "lora_dropout": 1.0}),
        ("--learning_rate is nan, must be above 0", {"learning_rate": float("nan")}),
        ("--learning_rate is inf, must be above 0", {"learning_rate": float("inf")}),
        ("--save_steps is 0, must be above 0", {"save_steps": 0}),
        ("--save_total_limit is 0, must be at least 1", {"save_total_limit": 0}),
        ("--seed is -1, must be at least 0", {"seed": -1}),
        ("--seed is 4294967296, must be at least 0 and at most 4294967295", {"seed": 2**32}),
        ("--max_tokens_per_gpu must be auto, or a whole number", {"max_tokens_per_gpu": "9" * 5000}),
        ("--max_tokens_per_gpu must be auto, or a whole number", {"max_tokens_per_gpu": str(2**31)}),
        (
            "--dataloader_num_workers is 5000, must be at most 64 on this machine, which has 2 CPU cores",
            {"dataloader_num_workers": 5000, "cores": 2},
        ),
        ("--on_bad_example is drop, must be error or skip", {"on_bad_example": "drop"}),
        ("--loss_on is first, must be all or last", {"loss_on": "first"}),
        ("--use_dora has no effect without --use_lora", {"use_dora": True}),
        ("--resume_anyway has no effect without --resume_from_checkpoint", {"resume_anyway": True}),
        ("--vision_lr contradicts --freeze_vision_model", {"vision_lr": 1e-5, "freeze_vision_model": True}),
        (
            "--train_projector contradicts --use_lora",
            {"train_projector": True, "use_lora": True, "freeze_vision_model": True},
        ),
        ("--adapter has no effect without --use_lora", {"adapter": "a"}),
        (
            "--model_revision is of --model_name_or_path: give that too",
            {"adapter": "a/b", "use_lora": True, "model_revision": "v1"},
        ),
        (
            "--freeze_vision_model contradicts --vision_training tower",
            {"vision_training": "tower", "freeze_vision_model": True},
        ),
        (
            "--train_projector contradicts --vision_training projector",
            {"vision_training": "projector", "train_projector": True},
        ),
        (
            "--quantize_vision contradicts --vision_training all, because weights in 4 bits can't train",
            {"vision_training": "all", "use_lora": True, "use_qlora": True, "quantize_vision": True},
        ),
        (
            "--cache_vision_features contradicts --vision_training projector, which changes the cached features",
            {"vision_training": "projector", "cache_vision_features": "x"},
        ),
        (
            "--vision_lr has no effect with --vision_training projector",
            {"vision_training": "projector", "vision_lr": 1.0},
        ),
        ("--projector_lr has no effect with --vision_training tower", {"vision_training": "tower", "projector_lr": 1}),
        (
            "--vision_training all with adapters can't run under DeepSpeed",
            {"vision_training": "all", "use_lora": True, "deepspeed": ZERO3},
        ),
        ("--use_qlora can't run under ZeRO-3", {"use_qlora": True, "use_lora": True, "deepspeed": ZERO3}),
        (
            "--cache_vision_features can't run under ZeRO-3",
            {"cache_vision_features": "x", "freeze_vision_model": True, "deepspeed": ZERO3},
        ),
        ("--vision_lr and --projector_lr need the Trainer's", {"vision_lr": 1e-5, "deepspeed": {"optimizer": {}}}),
        ("leave out --use_fsdp", {"launcher": {"ACCELERATE_USE_FSDP": "true"}}),
        ("give --mixed_precision no", {"launcher": {"ACCELERATE_MIXED_PRECISION": "bf16"}}),
        ("leave out --dynamo_backend", {"launcher": {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}}),
        ("--max_tokens_per_gpu must be auto, or a whole number", {"max_tokens_per_gpu": "-5"}),
        ("--max_tokens_per_gpu must be auto, or a whole number", {"max_tokens_per_gpu": "many"}),
        (
            "there is no GPU here: give a number",
            {"max_tokens_per_gpu": "auto", "estimate": True, "has_accelerator": False},
        ),
        ("contradict each other", {"max_tokens_per_gpu": "4096", "batch_size_per_gpu": 2}),
        ("--batch_size 16 must be a multiple of processes x --batch_size_per_gpu, 3 x 1", {"world_size": 3}),
        ("--evaluate_only and --dry_run contradict each other", {"evaluate_only": True, "dry_run": True}),
    ],
)
def test_a_broken_rule_is_one_line(message, flags):
    with pytest.raises(InputError) as error:
        check(**flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_lora": True, "lora_rank": 1, "use_dora": True},
        {"vision_training": "all", "vision_lr": 1e-5, "projector_lr": 1e-4, "deepspeed": ZERO3},
        {"vision_training": "tower", "use_lora": True, "train_separators": True, "projector_lr": 1e-4},
        {"adapter": "a", "evaluate_only": True},
        {"freeze_vision_model": True, "train_projector": True, "projector_lr": 1e-3},
        {"max_tokens_per_gpu": "4096"},
        {"evaluate_only": True, "world_size": 3},
        {"dataloader_num_workers": 64, "cores": 1},
        {"freeze_vision_model": True, "cache_vision_features": "x", "cache_vision_gib": 5.0},
    ],
)
def test_flags_that_go_together_pass(flags):
    check(**flags)
