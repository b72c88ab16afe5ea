"""Parts of the model train with learning rates of their own; wrong flags of optimizer and schedule are said early."""

import pytest
import torch
from helpers import TINY_MODEL, arguments, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.errors import InputError
from phi3v.training.optimizer import set_part_rates


@pytest.fixture(scope="module")
def model():
    return Phi3VForCausalLM(Phi3VConfig(**TINY_MODEL))


def rates(model, **part_rates) -> dict[str, float]:
    """The learning rate of every parameter, with AdamW in two groups of different weight decay as the Trainer has."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in named if (p.dim() > 1) == decays], "weight_decay": 0.1 if decays else 0.0}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    set_part_rates(optimizer, model, **{"vision_lr": None, "projector_lr": None} | part_rates)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(found[id(p)]["weight_decay"] == (0.1 if p.dim() > 1 else 0.0) for _, p in named)
    return {name: found[id(p)]["lr"] for name, p in named}


@pytest.mark.parametrize(
    "part_rates", [{}, {"vision_lr": 1e-5}, {"projector_lr": 1e-2}, {"vision_lr": 1e-5, "projector_lr": 1e-2}]
)
def test_each_part_has_its_rate_and_keeps_its_weight_decay(part_rates, model):
    for name, rate in rates(model, **part_rates).items():
        part = None
        if "vision_embed_tokens" in name:
            part = "vision_lr" if "img_processor" in name else "projector_lr"
        assert rate == part_rates.get(part, 1e-3), name


WRONG = [
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr, .*min_lr"),
    ('--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":NaN}', "min_lr is nan, must be a finite"),
    ('--lr_scheduler_kwargs {"x":1}', "--lr_scheduler_type linear, .*unexpected keyword argument 'x'"),
    ('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":"x"}', "--lr_scheduler_type polynomial"),
    ("--lr_scheduler_kwargs [1]", r"--lr_scheduler_kwargs is \[1\], must be a JSON object"),
    ("--lr_scheduler_kwargs {", "--lr_scheduler_kwargs is {, must be a JSON object"),
    ('--lr_scheduler_kwargs {"a":' + "[" * 200_000, "--lr_scheduler_kwargs is .*, must be a JSON object"),
    ("--optim_args beta", "--optim adamw_torch_fused, --optim_args beta: ValueError"),
    ("--optim adamw_anyprecision", "--optim adamw_anyprecision"),
]


@pytest.mark.parametrize("flags, said", WRONG, ids=lambda text: text[:60])
def test_an_optimizer_or_schedule_that_cannot_be_made_is_one_line(flags, said, toy_data, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        parse_command(script, arguments(toy_data, tmp_path, *flags.split()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}',
        '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":10} --warmup_steps 5',
        "--lr_scheduler_type constant --warmup_steps 500 --max_steps 100",
        "--optim sgd",
        "--optim adafactor",
    ],
)
def test_usual_optimizers_and_schedules_are_accepted(flags, toy_data, tmp_path):
    parse_command(script, arguments(toy_data, tmp_path, *flags.split()))
