"""How often the host waits for the device in training, counted on the stand-in for a GPU."""

import pytest

pytestmark = pytest.mark.slow
MODES = (
    "full",
    "full, SDPA attention",
    "full, fp16",
    "frozen",
    "LoRA",
    "QLoRA",
    "everything recomputed",
    "filled by tokens",
)


@pytest.fixture
def waits(on_stand_in) -> dict:
    """waits[mode]: what `waits.train` returns."""
    return on_stand_in["waits"]


@pytest.mark.parametrize("mode", MODES)
def test_no_micro_batch_makes_the_host_wait(waits, mode):
    found = waits[mode]
    assert len(found["forward"]) >= 2 and set(found["forward"]) == {0}
    assert set(found["backward"]) == {0}


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_step_makes_the_host_wait_once(waits, mode):
    """When the ranks agree whether one of them has received a signal."""
    assert len(waits[mode]["step"]) == 2 and set(waits[mode]["step"]) == {1}


def test_deepspeed_alone_waits_in_a_micro_batch(waits):
    """With `overlap_comm`, DeepSpeed waits at the end of every backward pass. What else it does in an optimizer step
    depends on values that the stand-in does not compute."""
    found = waits["ZeRO-2"]
    assert set(found["forward"]) == {0} and set(found["backward"][::2]) == {1} and min(found["step"]) == 1
