"""The report of a run as one HTML file: what was learned, how training went, with what, and what the model answers."""

import base64
import hashlib
import io
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from ..files import replacing

RIGHT = 0.5  # the score from which an answer counts as right; ANLS gives none between 0 and this
Z = 1.959964  # two-sided 95% of the normal distribution
RESAMPLES = 2000
LONGEST_TEXT = 2000  # characters; more of one text is cut
MOST_IMAGES = 16  # an example
MOST_POINTS = 300  # a curve
WIDTH, HEIGHT, LEFT, RIGHT_EDGE, TOP, BOTTOM = 360, 180, 48, 340, 8, 158  # of a chart and the area in it, in SVG units

# key in the history: title, whether the axis starts at 0. Other keys follow under their own names.
CHARTS = {
    "loss": ("Loss", False),
    "learning_rate": ("Learning rate", True),
    "grad_norm": ("Gradient norm", True),
    "images_per_second": ("Images/s", True),
    "tokens_per_second": ("Tokens/s", True),
    "mfu": ("MFU", True),
    "peak_memory_gib": ("Peak memory, GiB", True),
}
NO_CHART = re.compile(r"step|epoch|total_flos|train_.*|eval_(runtime|.*_per_second)|num_input_tokens_seen")
SECRET = re.compile(r"token(?!s_|iz)|key|passw|secret|credential|auth", re.IGNORECASE)
# In a text: '--name=value', --name value, NAME=value, "name": "value"; user and password of a URL; well-known forms.
_NAME, _VALUE = rf"[\w-]*(?:{SECRET.pattern})[\w-]*", r"""(?:'[^']*'|"[^"]*"|[^\s'"])+"""
SECRET_IN_TEXT = re.compile(
    rf"""(?P<quote>['"])(?P<a>{_NAME}=)(?:(?!(?P=quote)).)*|"""
    rf"""(?P<b>{_NAME}["']?\s*[:=]\s*|(?<!\S)-{_NAME}\s+(?!-))(?P<value>{_VALUE})""",
    re.IGNORECASE | re.DOTALL,
)
SECRET_VALUE = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}|"
    r"(?<=[?&]sig=)[^&\s]+|(?<=[Ss]ignature=)[^&\s]+"  # of links that open by themselves
)
MASK = "•••"


def write_html_report(
    path: str | Path,
    *,
    title: str,
    summary: dict,
    history: list[dict] | None,
    before: dict | None,
    after: dict | None,
    examples: Callable[[int], dict],
    max_examples: int = 500,
):
    """Writes a page to `path`, whole or not at all. Equal input gives equal bytes.

    summary: what to tell of the run: the command under "command", versions, seed, data, settings. Numbers and texts
        form a first table, each dict in it one of its own. Values under names like TOKEN, KEY or PASSWORD are masked.
    history: the Trainer's `state.log_history`: dicts with "step" and numbers under any of the keys of `CHARTS`, where
        "mfu" is a share of 1 and "peak_memory_gib" in GiB. None where nothing trained; there is only `after` then.
    before, after: contents of `eval_before.json` and `eval_after.json`; None where there was no such evaluation.
    examples: called with the position of a prediction in `after`, or else in `before`; returns `{"images": […],
        "question": text}` with PIL images, paths or undecoded images of `datasets`. What it raises, and an image that
        can't be read, is said in the page.
    max_examples: show at most so many, evenly spaced over the evaluation set.
    Raises OSError where the file can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, cut=_cut, csp_hash=_csp_hash)
    results = {"before training": before, "after training": after}
    rows = _rows(before, after)
    shown = np.linspace(0, len(rows) - 1, min(max_examples, len(rows)), dtype=int).tolist() if rows else []
    page = environment.get_template("page.html.jinja").stream(
        title=title,
        metric=(after or before or {"metric": None})["metric"],
        results={name: result_of(report) for name, report in results.items() if report is not None},
        missing=[name for name, report in results.items() if report is None and history is not None],
        trained=history is not None,
        paired=_paired(rows),
        charts=_charts(history or []),
        chart={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT_EDGE, "top": TOP, "bottom": BOTTOM},
        command=masked_command(summary.get("command")),
        tables=_tables(summary),
        examples=(_example(rows[i], i, examples) for i in shown),
        num_shown=len(shown),
        num_examples=len(rows),
    )
    with replacing(path) as partial:
        page.dump(str(partial), encoding="utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------
# Numbers


def number(value: float) -> str:
    """Four significant digits, in the form that is easiest to read."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def confidence_interval(scores: list[float]) -> tuple[float, float, str]:
    """Low and high end of the 95% interval of the mean, and the method's name.

    For scores of 0 and 1 Wilson's (J. Am. Stat. Assoc. 22, 1927), else percentiles of a bootstrap with a fixed seed.
    Raises ValueError without scores.
    """
    if not scores:
        raise ValueError("there are no scores")
    n, mean = len(scores), sum(scores) / len(scores)
    if set(scores) <= {0, 1}:
        middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
        return max(middle - half, 0.0), min(middle + half, 1.0), "Wilson"
    rng = np.random.default_rng(0)
    means = [rng.choice(scores, n).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    return low, high, f"bootstrap, {RESAMPLES:,} resamples"


def sign_test(n_up: int, n_down: int) -> float:
    """p of the exact two-sided sign test, which for scores of 0 and 1 is McNemar's."""
    n = n_up + n_down
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(n_up, n_down) + 1)]
    return min(1.0, 2 * sum(math.exp(value - n * math.log(2)) for value in logs))


def result_of(report: dict) -> dict:
    """A metric with its interval, which only a mean of scores has."""
    value, scores = report[report["metric"]], [row["score"] for row in report["predictions"]]
    result = {"value": value, "n": report["num_examples"], "low": None}
    if scores and abs(sum(scores) / len(scores) - value) < 1e-6:
        result["low"], result["high"], result["method"] = confidence_interval(scores)
        result["unit"] = 0 <= result["low"] and result["high"] <= 1
    return result


def _rows(before: dict | None, after: dict | None) -> list[dict]:
    """The predictions of one example beside each other, in the order of the later evaluation."""

    def by_id(report):
        seen, rows = Counter(), {}
        for row in report["predictions"] if report is not None else ():
            seen[str(row["id"])] += 1  # an id that comes twice is paired with itself in order
            rows[str(row["id"]), seen[str(row["id"])]] = row
        return rows

    old, new = by_id(before), by_id(after)
    return [{"before": old.get(key), "after": new.get(key)} for key in (old if after is None else new)]


def _paired(rows: list[dict]) -> dict | None:
    pairs = [(row["before"]["score"], row["after"]["score"]) for row in rows if row["before"] and row["after"]]
    if not pairs:
        return None
    up, down = sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)
    return {
        "n": len(pairs),
        "change": sum(a - b for b, a in pairs) / len(pairs),
        "wrong_right": sum(b < RIGHT <= a for b, a in pairs),
        "right_wrong": sum(a < RIGHT <= b for b, a in pairs),
        "up": up,
        "down": down,
        "p": sign_test(up, down),
        "graded": not {score for pair in pairs for score in pair} <= {0, 1},
    }


# ---------------------------------------------------------------------------------------------------------------
# Charts


def _charts(history: list[dict]) -> list[dict]:
    others = dict.fromkeys(k for entry in history for k in entry if k not in CHARTS and not NO_CHART.fullmatch(k))
    charts = [_chart(history, key, *CHARTS.get(key, (key, False))) for key in [*CHARTS, *others]]
    return [chart for chart in charts if chart]


def _chart(history: list[dict], key: str, title: str, from_zero: bool) -> dict | None:
    """Coordinates and labels of one curve; None where the history has no such numbers."""
    logged = [(e["step"], e[key]) for e in history if "step" in e and isinstance(e.get(key), int | float)]
    points = [point for point in logged if math.isfinite(point[1])]
    if not points:
        return None
    note = f"{len(logged) - len(points)} values that are not finite are left out. " if len(points) < len(logged) else ""
    if len(points) > MOST_POINTS:
        parts = np.array_split(np.array(points, dtype=float), MOST_POINTS)
        points = [(round(part[-1, 0].item()), part[:, 1].mean().item()) for part in parts]
        note += f"Means over up to {len(parts[0])} logged values each."
    steps, values = zip(*points, strict=True)
    (x0, x1), (y0, y1) = _range(steps), _range(values, from_zero)

    def x(step):
        return round(LEFT + (step - x0) / (x1 - x0) * (RIGHT_EDGE - LEFT), 2)

    def y(value):
        return round(BOTTOM - (value - y0) / (y1 - y0) * (BOTTOM - TOP), 2)

    def label(value):
        return f"{value * 100:.3g}%" if key == "mfu" else number(value)

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
    """Ends of an axis that are never equal."""
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        return 0, high or 1
    margin = 0 if low < high else abs(low) / 10 or 1
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between the two."""
    span = (high - low) / 5
    step = 10 ** math.floor(math.log10(span))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= span * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# ---------------------------------------------------------------------------------------------------------------
# Texts, tables and pictures


def _tables(summary: dict) -> dict[str, list[tuple[str, str]]]:
    """Rows of name and value: those of the summary itself, then of each dict in it."""
    run = {k: v for k, v in summary.items() if k != "command" and not isinstance(v, dict)}
    tables = {"Run": list(_flat(run))}
    for name, values in summary.items():
        if isinstance(values, dict):
            tables[str(name)] = list(_flat(values, secret=bool(SECRET.search(str(name)))))
    return {name: rows for name, rows in tables.items() if rows}


def _flat(values: dict, prefix: str = "", secret: bool = False):
    """Names, with a dot for a dict in a dict, and values as texts, without what looks like a secret."""
    for key, value in values.items():
        name, hidden = f"{prefix}{key}", secret or bool(SECRET.search(str(key)))
        several = isinstance(value, list | tuple)
        if isinstance(value, dict) or several and any(isinstance(item, dict | list | tuple) for item in value):
            yield from _flat(dict(enumerate(value)) if several else value, f"{name}.", hidden)
        elif hidden and value is not None and not ("tokens" in name.lower() and isinstance(value, int | float)):
            yield name, MASK
        else:
            yield name, _masked(", ".join(map(str, value)) if several else str(value))


def _masked(text: str) -> str:
    def mask(match):
        if match["a"]:
            return f"{match['quote']}{match['a']}{MASK}"
        count = "tokens" in match["b"].lower() and match["value"].isdigit()
        return match[0] if count else f"{match['b']}{MASK}"

    return SECRET_VALUE.sub(MASK, SECRET_IN_TEXT.sub(mask, text))


def masked_command(command: str | list | None) -> str | None:
    if command is None:
        return None
    return _masked(command if isinstance(command, str) else shlex.join(map(str, command)))


def _example(row: dict, index: int, examples: Callable[[int], dict]) -> dict:
    """What the page shows of one example, and by which filters."""
    old, new = row["before"], row["after"]
    last = new or old
    states = ["right" if last["score"] >= RIGHT else "wrong"]
    if old and new and old["score"] != new["score"]:
        states += ["changed", "improved" if new["score"] > old["score"] else "worsened"]
    try:
        content = examples(index)
        question, images = content["question"], content["images"]
    except Exception as e:  # a run of hours must not end without its report for one example that can't be loaded
        question, images = f"This example can't be loaded: {e}", []
    size = 160 if len(images) <= 2 else 96  # pixels; a video's frames are many
    return {
        **row,
        "id": last["id"],
        "answers": list(dict.fromkeys(map(str, last["answers"]))),
        "states": " ".join(states),
        "question": question,
        "images": [_thumbnail(image, size) for image in images[:MOST_IMAGES]],
        "num_more": max(0, len(images) - MOST_IMAGES),
    }


def _thumbnail(image, size: int) -> dict | None:
    """An image as a data URI of a JPEG, at most `size` pixels wide and high; None for what can't be read."""
    try:
        if not isinstance(image, Image.Image):
            if isinstance(image, dict):
                image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
            image = Image.open(image)
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded at about the size that is needed
        small = image.convert("RGB")
        small.thumbnail((size, size))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=75)
    except Exception:  # what PIL raises for damaged files, and what absent ones are, has no class in common
        return None
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"uri": uri, "width": small.width, "height": small.height}


def _cut(text) -> str:
    text = str(text)
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters)"


def _csp_hash(script: str) -> str:
    """The one script that the page may run, as its content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
