"""How many tokens a micro-batch has by default, with what is measured on the stand-in for a GPU."""

import pytest

pytestmark = pytest.mark.slow
LIMIT = 1500  # of limits.py
FILLED = ("little memory", "estimate too low by 30%", "another rank needs more", "LoRA with dropout", "recomputed")


@pytest.fixture
def limits(on_stand_in) -> dict:
    """limits[case]: what `limits.try_case` returns."""
    return on_stand_in["limits"]


def test_micro_batches_are_filled_by_default(limits):
    found = limits["enough memory"]
    assert found["tokens"] == found["planned"] and found["accumulation"] == 1  # all examples of a step at once
    assert found["said"][0].startswith(
        f"limit      up to {found['tokens']:,} tokens in a micro-batch, as many as fit; "
    )


def test_a_number_of_examples_that_is_given_stays(limits):
    found = limits["a number of examples"]
    assert (found["tokens"], found["accumulation"], found["measured"], found["said"]) == (None, 12, [], [])


@pytest.mark.parametrize("case", FILLED)
def test_the_fullest_micro_batch_is_measured_and_fits(limits, case):
    """It has all crops of its examples, because the measured bytes are what training will take."""
    found = limits[case]
    assert found["measured"][-1]["tokens"] == found["fullest"] <= found["tokens"] < LIMIT
    more = 1.5 if case == "another rank needs more" else 1
    assert 0.5 * found["room"] < more * found["measured"][-1]["bytes"] <= found["room"]
    assert all(one["kind"] == found["kind"] for one in found["measured"])


@pytest.mark.parametrize("case", FILLED)
def test_a_measurement_changes_nothing(limits, case):
    assert limits[case]["unchanged"]


def test_a_measurement_lowers_a_limit_that_is_too_high(limits):
    found = limits["estimate too low by 30%"]
    first, last = found["measured"][0], found["measured"][-1]
    assert found["planned"] > LIMIT and first["bytes"] > found["room"] and len(found["measured"]) <= 3
    assert found["tokens"] <= limits["little memory"]["tokens"] and last["tokens"] < first["tokens"]


def test_the_rank_that_needs_most_decides(limits):
    assert limits["another rank needs more"]["tokens"] < 0.75 * limits["little memory"]["tokens"]


def test_memory_that_runs_out_names_a_lower_limit(limits):
    found = limits["out of memory"]
    lower = int(0.8 * found["fullest"])
    assert found["error"] == (
        f"memory ran out in optimizer step 1: start again with --max_tokens_per_gpu {lower}; there is no checkpoint yet"
    )
