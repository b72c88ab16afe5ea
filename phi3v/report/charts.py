"""The curves of a run's report: the coordinates and labels that the template draws."""

import math
import re

import numpy as np

from .templates import format_number

MOST_POINTS = 300  # of one curve
# A chart, and the edges of the area for the curve in it, in SVG units.
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
NO_CHART = re.compile(r"step|epoch|total_flos|train_.*|eval_(runtime|examples|.*_per_second)|num_input_tokens_seen")


def charts_of(history: list[dict]) -> list[dict]:
    """A chart for every key of the history that has numbers; those of `CHARTS` come first."""
    others = dict.fromkeys(k for entry in history for k in entry if k not in CHARTS and not NO_CHART.fullmatch(k))
    charts = [_chart(history, key, *CHARTS.get(key, (key, False))) for key in [*CHARTS, *others]]
    return [chart for chart in charts if chart]


def _chart(history: list[dict], key: str, title: str, from_zero: bool) -> dict | None:
    """Coordinates and labels of one curve; None if the history has no finite numbers under `key`."""
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
    steps, values = zip(*points, strict=True)
    (x0, x1), (y0, y1) = _range(steps), _range(values, from_zero)

    def x(step):
        return round(LEFT + (step - x0) / (x1 - x0) * (RIGHT - LEFT), 2)

    def y(value):
        return round(BOTTOM - (value - y0) / (y1 - y0) * (BOTTOM - TOP), 2)

    def label(value):
        return f"{value * 100:.3g}%" if key == "mfu" else format_number(value)

    return {
        "title": title,
        "note": note,
        "points": " ".join(f"{x(step)},{y(value)}" for step, value in points),
        "end": (x(steps[-1]), y(values[-1])),
        "steps": " ".join(map(str, steps)),
        "values": " ".join(map(label, values)),
        "last": f"{label(values[-1])} at step {steps[-1]}",
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in _ticks(x0, x1) if tick == round(tick)],
        "y_ticks": [(y(tick), label(tick)) for tick in _ticks(y0, y1)],
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
