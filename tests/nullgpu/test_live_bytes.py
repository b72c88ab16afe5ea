"""Memory, devices and kernels of a training step of the real width, on fake tensors of the stand-in for a GPU.

`benchmarks/results.md` has the same figures for the model of the real depth.
"""

import pytest

pytestmark = pytest.mark.slow
MODES = ("full, ZeRO-2", "full, DDP", "frozen vision, ZeRO-2", "LoRA", "QLoRA")
KINDS = ("none", "decoder", "all")
# For each attention implementation, the operations that compute attention in the decoder's layers and in the tower's.
KERNELS = {
    "sdpa": {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"},
    "varlen": {"aten::_scaled_dot_product_flash_attention", "aten::_flash_attention_forward"},
}


@pytest.fixture
def found(on_stand_in) -> dict:
    """found[attention][mode][kind of activation checkpointing]: what `live_bytes.measure` returns."""
    return on_stand_in["live bytes"]


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_estimate_is_what_lives(found, mode, kind, attention):
    one = found[attention][mode][kind]
    parts = ("weights", "gradients", "passes")
    assert one["expected"]["passes"] == pytest.approx(one["passes"], rel=0.05)
    assert one["expected"]["weights"] == pytest.approx(one["weights"], rel=0.01)
    assert one["expected"]["gradients"] == pytest.approx(one["gradients"], rel=0.01)
    assert sum(one["expected"][part] for part in parts) == pytest.approx(sum(one[part] for part in parts), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_keep_no_fp32_tensors_under_autocast(found, kind):
    """LoRA, which runs under autocast, keeps hardly more than full fine-tuning in bf16 without autocast."""
    adapters, full = found["sdpa"]["LoRA"][kind], found["sdpa"]["full, ZeRO-2"][kind]
    assert adapters["kept"] < 1.05 * full["kept"]


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_everything_is_computed_on_the_device(found, mode, attention):
    """torch itself fails if an operation mixes devices. Nothing but the row's structure comes from the host."""
    for one in found[attention][mode].values():
        assert one["to_host"] == {}
        assert set(one["to_device"]) <= {"aten::_to_copy"} and sum(one["to_device"].values()) <= 8


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_attention_takes_a_fused_kernel(found, mode, attention):
    for one in found[attention][mode].values():
        own = {name for name in one["operations"] if "attention" in name and "backward" not in name}
        assert own == KERNELS[attention]
        assert not any("softmax" in name and "log" not in name for name in one["operations"])
