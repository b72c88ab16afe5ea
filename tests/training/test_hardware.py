"""What GPUs can do: peak speeds by their names, direct links, and the attention that fits GPU and packages."""

import os

import pytest
import torch

from phi3v.errors import InputError
from phi3v.model import varlen
from phi3v.training import hardware
from phi3v.training.hardware import GPUS, choose_attention, describe_attention, disable_direct_links, published_peak


def test_names_of_gpus():
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "Tesla V100-SXM2-32GB": 125e12,
        "NVIDIA A10G": 70e12,
        "Quadro RTX 8000": 130e12,
        "NVIDIA RTX A1000": None,
        "NVIDIA GeForce RTX 4080": None,
    }
    assert {name: published_peak(name) for name in names} == names
    assert all(published_peak(name) for name in GPUS)


@pytest.mark.parametrize(
    "gpus, driver, already_set, changed",
    [
        (["NVIDIA GeForce RTX 4090"] * 2, "535.104.05", {}, {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}),
        (["NVIDIA GeForce RTX 4090"] * 2, "535.104.05", {"NCCL_P2P_DISABLE": "0"}, {"NCCL_IB_DISABLE": "1"}),
        (["NVIDIA GeForce RTX 4090"] * 2, "535.104.05", {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}, {}),
        (["NVIDIA GeForce RTX 4090"] * 2, "580.65.06", {}, {}),
        (["NVIDIA GeForce RTX 4090"], "535.104.05", {}, {}),
        (["NVIDIA A100-SXM4-80GB"] * 8, "535.104.05", {}, {}),
    ],
)
def test_cards_that_can_not_be_connected_directly(gpus, driver, already_set, changed, monkeypatch):
    """accelerate raises NotImplementedError for these, unless both variables are set."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.environment.get_gpu_info", lambda: (gpus, len(gpus)))
    monkeypatch.setattr("accelerate.utils.environment.get_driver_version", lambda: driver)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "to be deleted, and put back as it was after the test")
        monkeypatch.delenv(name)
    os.environ.update(already_set)
    lines = disable_direct_links()
    now = {name: value for name, value in os.environ.items() if name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")}
    assert now == already_set | changed
    assert len(lines) == bool(changed) and all(f"{name}=1" in lines[0] for name in changed)


def test_the_speed_is_measured_in_the_dtype_and_in_less_than_a_second(monkeypatch):
    """On a CPU without bf16, its matrix product is so slow that a large one takes many seconds."""
    seconds, used, linear = 0.0, [], torch.nn.functional.linear

    def product(flops_per_second):
        def run(rows, weight):
            nonlocal seconds
            used.append((rows.dtype, len(rows)))
            seconds += 2 * len(rows) ** 3 / flops_per_second
            return linear(rows[:1], weight)

        return run

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: seconds)
    for speed, largest in ((2e8, 256), (1e10, 1024), (1e11, 1536)):
        seconds, used[:] = 0.0, []
        monkeypatch.setattr(torch.nn.functional, "linear", product(speed))
        peak, source = hardware.peak_flops(torch.bfloat16)
        assert peak == pytest.approx(speed) and source.startswith("measured") and seconds < 1
        assert used[-1] == (torch.bfloat16, largest)


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert disable_direct_links() == []


PACKAGE, OLD_TORCH = "the package flash-attn 2.7 or newer", "torch 2.10 or newer"


@pytest.fixture
def machine(monkeypatch):
    """machine(is_ampere, lacking, flash_attention_3): what this machine has from now on."""

    def put(is_ampere=True, lacking=(), flash_attention_3=False):
        monkeypatch.setattr(hardware, "_is_ampere", lambda: is_ampere)
        monkeypatch.setattr(varlen, "_has_flash_attention_3", lambda: flash_attention_3)
        monkeypatch.setattr(varlen, "_flash_attention_3", lambda: (flash_attention_3, ""))
        for kind, name in {"flash_attention_2": PACKAGE, "varlen": OLD_TORCH}.items():
            lacks = name if kind in lacking else None
            own = varlen.KERNELS[kind]._replace(lacks=lambda lacks=lacks: lacks)
            monkeypatch.setitem(varlen.KERNELS, kind, own)

    return put


def test_the_best_attention_that_can_run_is_chosen(machine):
    both = ("flash_attention_2", "varlen")
    for has, precision, chosen in [
        ({}, "bf16", "flash_attention_2"),
        ({"lacking": ["flash_attention_2"]}, "bf16", "varlen"),
        ({"lacking": ["flash_attention_2"]}, "fp16", "varlen"),
        ({"flash_attention_3": True}, "bf16", "varlen"),
        ({"lacking": ["varlen"]}, "bf16", "flash_attention_2"),
        ({"lacking": both}, "bf16", "sdpa"),
        ({}, "fp32", "sdpa"),
        ({"is_ampere": False}, "fp16", "sdpa"),
    ]:
        machine(**has)
        assert choose_attention(None, False, precision) == chosen
        if chosen != "sdpa":
            assert choose_attention(None, True, precision) == chosen
        for asked in ("sdpa", "eager"):
            assert choose_attention(asked, False, precision) == asked


def test_flash_attention_that_cannot_run_is_an_error(machine):
    both = ("flash_attention_2", "varlen")
    for has, precision, asked, message in [
        ({"lacking": ["flash_attention_2"]}, "bf16", "flash_attention_2", f"{PACKAGE}; .* varlen runs without"),
        ({"lacking": both}, "bf16", None, OLD_TORCH),
        ({}, "fp32", None, "half precision"),
        ({}, "fp32", "varlen", "half precision"),
        ({"is_ampere": False}, "fp16", None, "an Ampere GPU or newer; .* sdpa runs without"),
        ({"is_ampere": False}, "fp16", "flash_attention_2", "an Ampere GPU or newer"),
    ]:
        machine(**has)
        with pytest.raises(InputError, match=f"flash attention needs {message}"):
            choose_attention(asked, asked is None, precision)


def test_the_code_that_computes_attention_is_named(machine):
    machine(flash_attention_3=True)
    assert "FlashAttention-3" in describe_attention("varlen")
    machine()
    assert "flash attention of torch" in describe_attention("varlen") and "scaled_dot" in describe_attention("sdpa")
    assert "scaled_dot" in describe_attention("varlen", dropout=0.1)
