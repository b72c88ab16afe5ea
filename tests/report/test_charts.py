"""The curves of a report."""

import math

import pytest
from html_pages import report

from phi3v.report.charts import Curve, charts_of, draw


def test_curves(tmp_path):
    history = [{"step": s, "loss": 1 / s, "mfu": 0.3, "grad_norm": math.nan if s == 2 else 1.0} for s in range(1, 11)]
    history += [{"step": 5, "eval_accuracy": 0.5, "eval_runtime": 3.0}, {"step": 10, "train_loss": 0.1}, {"epoch": 1}]
    html, page = report(tmp_path, history=history)
    titles = [a["aria-label"].partition(" over")[0] for a in page.all("svg", role="img")]
    assert titles == ["Loss", "Loss", "Gradient norm", "MFU", "eval_accuracy"]  # the loss has two axes
    assert "1 values are NaN or infinite and are left out" in page.text and "30% at step 10" in page.text
    for line in page.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(points) == len(line["data-steps"].split()) == len(line["data-values"].split())
        assert all(48 <= x <= 340 and 8 <= y <= 158 for x, y in points)
    long = [{"step": s, "loss": 2.0, "learning_rate": 0.0} for s in range(5000)]
    html, page = report(tmp_path / "long", history=long)
    assert len(page.all("polyline")[0]["points"].split()) == 300 and "up to 17 logged values" in page.text


def heights(chart: dict, axis: int) -> list[list[float]]:
    return [[float(point.split(",")[1]) for point in line.split()] for line in chart["axes"][axis]["points"]]


def test_the_loss_can_have_a_logarithmic_axis():
    (chart,) = charts_of([{"step": s, "loss": 10.0**-s} for s in range(4)])
    assert [axis["logarithmic"] for axis in chart["axes"]] == [True, False]
    assert heights(chart, 0) == [[8, 58, 108, 158]]  # equal ratios are equally far apart
    assert [label for _, label in chart["axes"][0]["y_ticks"]] == ["0.001", "0.01", "0.1", "1"]
    (narrow,) = charts_of([{"step": s, "loss": 2 - s / 4} for s in range(4)])
    assert [axis["logarithmic"] for axis in narrow["axes"]] == [False, True]  # the linear one is shown first
    (other,) = charts_of([{"step": s, "grad_norm": 10.0**-s} for s in range(4)])
    assert len(other["axes"]) == 1


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -2.0], [1.0, 1.0 + 2**-52]])
def test_a_logarithmic_axis_that_would_change_nothing_is_not_there(values):
    (chart,) = charts_of([{"step": s, "loss": value} for s, value in enumerate(values)])
    assert len(chart["axes"]) == 1


def test_a_loss_of_0_on_a_logarithmic_axis():
    (chart,) = charts_of([{"step": s, "loss": value} for s, value in enumerate([1.0, 0.01, 0.0])])
    assert heights(chart, 0) == [[8, 158, 158]] and "not above 0" in chart["note"]


@pytest.mark.parametrize("low, high", [(0.41, 0.47), (1e-9, 1e9), (0.9, 11), (3, 4), (5e-324, 1e308), (1, 1.00001)])
def test_ticks_of_a_logarithmic_axis(low, high):
    axis = next(a for a in draw("Loss", [Curve("Loss", [1, 2], [low, high])])["axes"] if a["logarithmic"])
    assert 2 <= len(axis["y_ticks"]) <= 7 and all(7.9 <= y <= 158.1 for y, _ in axis["y_ticks"])


def test_the_validation_loss_stands_in_the_chart_of_the_loss(tmp_path):
    history = [{"step": s, "loss": 2.0 - s / 10} for s in range(1, 11)]
    history += [{"step": s, "eval_loss": 3.0 - s / 10, "eval_accuracy": 0.5} for s in (5, 10)]
    _, page = report(tmp_path, history=history)
    lines = page.all("polyline")
    assert [line["data-name"] for line in lines] == ["Loss", "Validation loss"] * 2 + ["eval_accuracy"]
    assert lines[1]["data-steps"] == "5 10" and lines[1]["data-values"] == "2.5 2"
    assert "Loss 1 at step 10 Validation loss 2 at step 10" in page.text
    low, high = [[float(p.split(",")[1]) for p in line["points"].split()] for line in lines[:2]]
    assert high[0] < low[4]  # on one axis the validation loss is above the loss of the same step
    _, page = report(tmp_path, history=[{"step": 5, "eval_loss": 1.0}, {"step": 6, "eval_loss": math.nan}])
    (drawing,) = page.all("svg", role="img")
    assert drawing["aria-label"] == "Validation loss over steps: 1 at step 5"
