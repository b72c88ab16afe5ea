"""The curves of a report: the coordinates and labels that the template draws."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .templates import format_number

MOST_POINTS = 300  # of one curve
# A chart, and the edges of the area for the curves in it, in SVG units.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 180, 48, 340, 8, 158
CHART_AREA = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}

# Key in the history: (title, whether the axis starts at 0). Charts of other keys come after these, titled by their key.
CHARTS = {
    "loss": ("Loss", False),
    "learning_rate": ("Learning rate", True),
    "grad_norm": ("Gradient norm", True),
    "images_per_second": ("Images/s", True),
    "tokens_per_second": ("Tokens/s", True),
    "mfu": ("MFU", True),
    "peak_memory_gib": ("Peak memory, GiB", True),
}
VALIDATION = "eval_loss"  # drawn in the chart of the loss
VALIDATION_TITLE = "Validation loss"
FROM_ZERO = {title for title, from_zero in CHARTS.values() if from_zero}
LOGARITHMIC = {CHARTS["loss"][0], VALIDATION_TITLE}  # charts that can have a logarithmic axis
LOG_FROM = 10  # and have it from the start if the largest value is this many times the smallest
NO_CHART = re.compile(r"step|epoch|total_flos|train_.*|eval_(runtime|examples|.*_per_second)|num_input_tokens_seen")


@dataclass
class Curve:
    """One line of a chart. steps: ascending; values: finite; note: what is left out or averaged, or ""."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    note: str = ""


def charts_of(history: list[dict]) -> list[dict]:
    """A chart for every key of the history that has numbers; those of `CHARTS` come first."""
    known = {*CHARTS, VALIDATION}
    others = dict.fromkeys(k for entry in history for k in entry if k not in known and not NO_CHART.fullmatch(k))
    charts = []
    for key in [*CHARTS, *others]:
        title = CHARTS.get(key, (key,))[0]
        curves = [curve_of(history, key, title)]
        if key == "loss":
            curves.append(curve_of(history, VALIDATION, VALIDATION_TITLE))
        if curves := [curve for curve in curves if curve]:
            if curves[0].name == VALIDATION_TITLE:
                title = VALIDATION_TITLE
            charts.append(draw(title, curves))
    return charts


def curve_of(history: list[dict], key: str, name: str) -> Curve | None:
    """The finite numbers under `key`, averaged to at most MOST_POINTS; None if there are none."""
    logged = [(e["step"], e[key]) for e in history if "step" in e and isinstance(e.get(key), int | float)]
    points = [point for point in logged if math.isfinite(point[1])]
    if not points:
        return None
    note = (
        f"{len(logged) - len(points)} values are NaN or infinite and are left out. "
        if len(points) < len(logged)
        else ""
    )
    if len(points) > MOST_POINTS:
        parts = np.array_split(np.array(points, dtype=float), MOST_POINTS)
        points = [(round(part[-1, 0].item()), part[:, 1].mean().item()) for part in parts]
        note += f"Each point is the mean of up to {len(parts[0])} logged values."
    return Curve(name, *zip(*points, strict=True), note)


def draw(title: str, curves: list[Curve]) -> dict:
    """Coordinates and labels of one chart.

    "axes" has one drawing for each axis that the chart can have, the one to show first at the front: the linear axis,
    and for the titles in LOGARITHMIC, if there are positive values that differ, the logarithmic one.
    """
    is_share = title == CHARTS["mfu"][0]

    def label(value):
        return f"{value * 100:.3g}%" if is_share else format_number(value)

    values = [value for curve in curves for value in curve.values]
    x_range = _range([step for curve in curves for step in curve.steps])
    axes = [_axis(curves, x_range, _range(values, title in FROM_ZERO), label)]
    positive = [value for value in values if value > 0]
    notes = list(dict.fromkeys(curve.note for curve in curves if curve.note))
    if title in LOGARITHMIC and positive and max(positive) > 1.000001 * min(positive):
        axes.append(_axis(curves, x_range, (min(positive), max(positive)), label, logarithmic=True))
        if len(positive) < len(values):
            notes.append("On the logarithmic axis, values that are not above 0 lie at its lower end.")
        if max(positive) >= LOG_FROM * min(positive):
            axes.reverse()
    return {
        "title": title,
        "note": " ".join(notes),
        "curves": [
            {
                "name": curve.name,
                "steps": " ".join(f"{step:.15g}" for step in curve.steps),
                "values": " ".join(map(label, curve.values)),
                "last": f"{label(curve.values[-1])} at step {curve.steps[-1]:.15g}",
            }
            for curve in curves
        ],
        "axes": axes,
    }


def _axis(curves: list[Curve], x_range, y_range, label, logarithmic: bool = False) -> dict:
    """The points of each curve as texts, and the ticks as pairs of a coordinate and a label."""
    (x0, x1), (y0, y1) = x_range, map(math.log10, y_range) if logarithmic else y_range

    def x(step):
        return round(LEFT + (step - x0) / (x1 - x0) * (RIGHT - LEFT), 2)

    def y(value):
        if logarithmic:
            value = math.log10(value) if value > 0 else y0
        return round(BOTTOM - (value - y0) / (y1 - y0) * (BOTTOM - TOP), 2)

    ticks = _log_ticks(*y_range) if logarithmic else _ticks(y0, y1)
    points = [[(x(step), y(value)) for step, value in zip(c.steps, c.values, strict=True)] for c in curves]
    return {
        "logarithmic": logarithmic,
        "points": [" ".join(f"{a},{b}" for a, b in line) for line in points],
        "ends": [line[-1] for line in points],
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in _ticks(x0, x1) if tick == round(tick)],
        "y_ticks": [(y(tick), label(tick)) for tick in ticks],
    }


def _range(values, from_zero: bool = False) -> tuple[float, float]:
    """The lower and upper end of an axis for these values; the two are never equal."""
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        return 0, high or 1
    margin = 0 if low < high else abs(low) / 10 or 1
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers from `low` to `high`."""
    span = (high - low) / 5
    step = 10 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= span * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Two to six numbers from `low` to `high`: powers of ten, or 1, 2 and 5 times them, or else those of `_ticks`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high]
        if len(ticks) <= 6:
            break
    every = -(-len(ticks) // 6) or 1
    return ticks[::every] if len(ticks) >= 2 else _ticks(low, high)
