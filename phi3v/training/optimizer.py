"""Separate learning rates for the vision tower and the projector."""

import torch
from torch import nn


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
