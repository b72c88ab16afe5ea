"""Measures what a micro-batch takes on the accelerator, before training begins."""

import contextlib
import gc

import torch

from ..errors import is_out_of_memory
from ..old_versions import accelerator_memory
from .activation_checkpointing import switched_on


def measured_passes(model, batch: dict, device: torch.device, dtype: torch.dtype | None, checkpointing: str) -> float:
    """Bytes that the forward and backward pass of a micro-batch take at most, in addition to the weights, to the
    micro-batch itself and to gradients that are complete. Infinite if the memory does not suffice.

    Afterwards the weights, the random generators and everything else are as before: a training that follows computes
    the same bits as without the measurement.

    model: a Phi3VForCausalLM, or a PeftModel around one, which nothing else holds yet; it is moved to `device`.
    batch: as `PackingCollator` makes it, without `problems`.
    dtype: in which autocast computes, as it will in training; None if training does not use autocast.
    checkpointing: the kind of activation checkpointing.
    """
    model.to(device)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    release()
    try:
        with _restored(model, device), switched_on(model, checkpointing):
            before = memory_in_use()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = model(**inputs, num_items_in_batch=max(len(inputs["shift_labels"]), 1)).loss
            loss.backward()
            return max(peak_memory_since_release() - before, 0)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        failed = True
    finally:
        loss = inputs = None
    assert failed
    release()  # after the exception, which has held the tensors of the forward pass
    return float("inf")


@contextlib.contextmanager
def _restored(model, device: torch.device):
    """A context in which the model is in training mode, every gradient is dropped as soon as it is complete, and the
    random generators may be used. All is as before when it ends."""
    was_training = model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    state = accelerator and accelerator.get_rng_state()
    try:
        with torch.random.fork_rng([]):
            yield model.train()
    finally:
        if accelerator:
            accelerator.set_rng_state(state)
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.grad = None
        model.train(was_training)


def _drop_gradient(parameter: torch.Tensor):
    parameter.grad = None


def memory_in_use() -> int:
    """Bytes that tensors take on the accelerator now."""
    return accelerator_memory().memory_allocated()


def peak_memory_since_release() -> int:
    """Bytes: the most that tensors have taken on the accelerator since `release` was called."""
    return accelerator_memory().max_memory_allocated()


def release():
    """Gives memory that no tensor uses back to the device, and begins to look for the peak anew."""
    gc.collect()
    if torch.accelerator.is_available():
        accelerator_memory().empty_cache()
        accelerator_memory().reset_peak_memory_stats()
