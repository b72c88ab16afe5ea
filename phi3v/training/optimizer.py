"""Learning rates of their own for parts of the model."""

import torch
from torch import nn


def set_part_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, vision_lr: float | None, projector_lr: float | None
):
    """Moves the tower's parameters into groups with `vision_lr`, and the projector's and separators' into groups with
    `projector_lr`; None leaves them where they are. All other settings of a group are kept."""
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
