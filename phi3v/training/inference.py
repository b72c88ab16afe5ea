"""The state in which a model is evaluated."""

import contextlib

import torch


@contextlib.contextmanager
def evaluating(model, device: torch.device, compute_dtype: torch.dtype):
    """A context without gradients in which a model is on its device, in evaluation mode, and can be called on every
    rank. Afterwards it is in the mode that it was in before.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    compute_dtype: if this is half precision, autocast computes in it, whatever the dtype of the weights is.
    """
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]  # by ZeRO-3, on the right device already
    if not partitioned:
        model.to(device)
    was_training = model.training
    model.eval()
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    try:
        with torch.no_grad(), _gathered_parameters(model, partitioned), autocast:
            yield
    finally:
        model.train(was_training)


def _gathered_parameters(model, partitioned: list):
    """A context in which every rank has all of the parameters that ZeRO-3 partitions. A DeepSpeed engine gathers them
    itself, layer by layer, through hooks of the modules."""
    if not partitioned or any(module._forward_pre_hooks for module in model.modules()):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
