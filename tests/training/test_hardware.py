"""The published peak speeds of GPUs are found by their names."""

from phi3v.training.hardware import GPUS, published_peak


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
