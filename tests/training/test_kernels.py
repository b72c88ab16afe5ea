"""At the start of a run on an accelerator, its attention kernel is compared with SDPA attention."""

from types import SimpleNamespace

import pytest
import torch
from flash_kernels import reference

from phi3v.errors import InputError
from phi3v.model import varlen
from phi3v.training import kernels

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, attention_dropout=0.0)


def planted(monkeypatch, change_output=None, change_gradients=None):
    """Puts the reference kernel in the place of torch's, with what it returns changed."""
    kernel = reference(torch.float32, torch.bfloat16)
    if change_output:
        right = kernel.forward
        kernel = kernel._replace(forward=lambda *args: (change_output(right(*args)[0]), right(*args)[1]))
    if change_gradients:
        right_gradients = kernel.backward
        kernel = kernel._replace(backward=lambda *args: change_gradients(*right_gradients(*args)))
    monkeypatch.setitem(varlen.KERNELS, "varlen", kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["varlen", "eager"])
def test_right_kernels_pass(monkeypatch, kind, dtype):
    planted(monkeypatch)
    kernels.check_attention(CONFIG, kind, CPU, dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"change_output": lambda x: x.roll(1, 0)},
        {"change_output": lambda x: x * float("nan")},
        {"change_gradients": lambda q, k, v: (q, k, 0 * v)},
        {"change_gradients": lambda q, k, v: (q, 1.3 * k, v)},
    ],
    ids=["output", "NaN", "no gradient", "gradient"],
)
def test_a_wrong_kernel_ends_the_run(monkeypatch, changes):
    planted(monkeypatch, **changes)
    with pytest.raises(
        InputError, match="the reference of the tests differs by .* --attn_implementation sdpa"
    ) as found:
        kernels.check_attention(CONFIG, "varlen", CPU, torch.bfloat16)
    assert "\n" not in str(found.value)


def test_a_kernel_that_fails_ends_the_run(monkeypatch):
    def fails(x):
        raise RuntimeError("no kernel image\nis available")

    planted(monkeypatch, change_output=fails)
    with pytest.raises(InputError, match=r"fails \(no kernel image is available\) on rank 0: use --attn"):
        kernels.check_attention(CONFIG, "varlen", CPU, torch.float32)


def test_all_ranks_end_if_one_has_a_wrong_kernel(monkeypatch):
    def gather(found, own):
        found[:] = [own, "differs by 1.0 from SDPA attention"]

    planted(monkeypatch)
    monkeypatch.setattr(kernels, "dist", SimpleNamespace(is_initialized=lambda: True, all_gather_object=gather))
    monkeypatch.setattr(kernels, "world_size", lambda: 2)
    with pytest.raises(InputError, match="differs by 1.0 from SDPA attention on rank 1"):
        kernels.check_attention(CONFIG, "varlen", CPU, torch.float32)


def test_nothing_is_checked_on_a_cpu(monkeypatch):
    planted(monkeypatch, change_output=lambda x: 0 * x)
    kernels.check_kernels(CONFIG, SimpleNamespace(no_fuse=False, attn_implementation="varlen"), CPU, torch.float32)
