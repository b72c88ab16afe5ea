"""Which kernels torch's compiler makes of the fused functions for a GPU."""

import pytest

pytestmark = pytest.mark.slow


def test_each_function_is_one_kernel(on_stand_in):
    """The gradients of a norm's weight and bias leave it as sums over some rows each. For each of them there are two
    more kernels, which add these up and round the result: benchmarks/one_kernel.py counts them so."""
    found = on_stand_in["kernels"]
    assert len(found) == 10
    sums = {"add_rms_norm_backward": 1, "add_layer_norm_backward": 2}
    for name, of in found.items():
        assert (of["kernels"], of["sums"]) == (1 + sums.get(name, 0), sums.get(name, 0)), name


def test_one_graph_serves_all_lengths(on_stand_in):
    assert {of["graphs"] for of in on_stand_in["kernels"].values()} == {1}
