"""The optimizer and the schedule of learning rates: checks of their flags, and separate rates for parts of a model."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler

from ..errors import InputError
from ..number_limits import check_finite


def check_optimizer(args: TrainingArguments):
    """Raises InputError if the optimizer or the schedule that the flags ask for can't be made. It makes them for a
    single weight, so that a wrong value is said before data and model are loaded."""
    weight, kwargs = nn.Parameter(torch.zeros(1)), args.lr_scheduler_kwargs or {}
    check_finite(kwargs, "--lr_scheduler_kwargs")
    try:
        if not (args.optim_target_modules or "lomo" in args.optim.value):  # these need the model
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            check_finite(options, "--optim_args")
            if getattr(kind, "__module__", "").startswith("torch.optim"):
                kind([weight], **options)
    except InputError:
        raise
    except Exception as e:  # every optimizer has its own way to refuse values
        raise InputError(f"--optim {args.optim.value}, --optim_args {args.optim_args}: {_in_one_line(e)}") from None
    steps = args.max_steps if args.max_steps > 0 else 10**6
    warmup = min(args.get_warmup_steps(steps), steps)
    try:
        made = get_scheduler(
            args.lr_scheduler_type, torch.optim.SGD([weight], args.learning_rate), warmup, steps, dict(kwargs)
        )
        for step in (0, warmup, (warmup + steps) // 2, steps) if isinstance(made, LambdaLR) else ():
            check_finite(float(made.lr_lambdas[0](step)), "the learning rate")
    except Exception as e:  # every schedule has its own way to refuse values
        raise InputError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value}, --lr_scheduler_kwargs {kwargs}: {_in_one_line(e)}"
        ) from None


def _in_one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]


def set_part_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, vision_lr: float | None, projector_lr: float | None
):
    """Splits the optimizer's parameter groups, so that parts of the model have learning rates of their own.

    vision_lr: for the vision tower; projector_lr: for the projector and the separators; None leaves a part as it is.
    The new groups keep the other settings, such as the weight decay, of the group that they come from.
    """
    if vision_lr is None and projector_lr is None:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}

    def rate(parameter):
        if ".img_processor." in names[parameter]:
            return vision_lr
        return projector_lr if ".vision_embed_tokens." in names[parameter] else None

    for group in list(optimizer.param_groups):
        for own_rate in sorted({rate(p) for p in group["params"]} - {None}):
            own = [p for p in group["params"] if rate(p) == own_rate]
            group["params"] = [p for p in group["params"] if rate(p) != own_rate]
            optimizer.add_param_group({**group, "params": own, "lr": own_rate})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
