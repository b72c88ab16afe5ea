"""What GPUs can do is found by their names."""

import os

import pytest

from phi3v.training.hardware import GPUS, disable_direct_links, published_peak


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


def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert disable_direct_links() == []
