"""The curves of a report."""

import math

from html_pages import report


def test_curves(tmp_path):
    history = [{"step": s, "loss": 1 / s, "mfu": 0.3, "grad_norm": math.nan if s == 2 else 1.0} for s in range(1, 11)]
    history += [{"step": 5, "eval_accuracy": 0.5, "eval_runtime": 3.0}, {"step": 10, "train_loss": 0.1}, {"epoch": 1}]
    html, page = report(tmp_path, history=history)
    titles = [a["aria-label"].partition(" over")[0] for a in page.all("svg", role="img")]
    assert titles == ["Loss", "Gradient norm", "MFU", "eval_accuracy"]
    assert "1 values are NaN or infinite and are left out" in page.text and "30% at step 10" in page.text
    for line in page.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(points) == len(line["data-steps"].split()) == len(line["data-values"].split())
        assert all(48 <= x <= 340 and 8 <= y <= 158 for x, y in points)
    long = [{"step": s, "loss": 2.0, "learning_rate": 0.0} for s in range(5000)]
    html, page = report(tmp_path / "long", history=long)
    assert len(page.all("polyline")[0]["points"].split()) == 300 and "up to 17 logged values" in page.text
