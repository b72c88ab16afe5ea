"""The report of a run as one HTML file: results, curves of the training, settings, and examples with the answers."""

import base64
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import replacing
from ..image_files import open_image_file
from ..inside import open_file
from ..launch import command
from ..secrets import SECRET, masked_command, masked_rows, without_secrets
from .charts import CHART_AREA, charts_of
from .confusion import confusion_matrix
from .statistics import RIGHT_SCORE, paired_change, paired_rows, result_of
from .summary import versions
from .templates import environment

MOST_LEFT_OUT = 1000  # examples that are listed
MOST_IMAGES = 16  # shown of one example
MOST_EXAMPLES = 500  # shown on a page
FILTERS = {name: name.capitalize() for name in ("wrong", "right", "changed", "improved", "worsened")}
ORDERS = {
    "score 1": "Lowest score first",
    "score -1": "Highest score first",
    "change 1": "Largest loss first",
    "change -1": "Largest gain first",
}


def write_page(
    training_args,
    before: dict | None,
    after: dict | None,
    about: dict,
    examples: Callable[[int], dict],
    state=None,
    name: str = "report.html",
    left_out: Sequence[str] = (),
    stopped: Sequence[str] | None = None,
    error: BaseException | None = None,
):
    """Writes the page of a run to its output folder. Only rank 0 calls it.

    training_args: the run's TrainingArguments.
    before, after, examples: as `write_html_report` takes them.
    about: more facts about the run, which become rows and tables of the page. The title holds its "model", and its
        "mode" if the run trains.
    state: the Trainer's state; None if nothing was trained.
    left_out: a line about each example that could not be used.
    stopped: if a signal has stopped the run, lines that say how to go on; otherwise None.
    error: the exception that has ended the run, if one has.
    """
    task, now = Path(sys.argv[0]).stem.removeprefix("finetune_hf_trainer_"), time.strftime("%Y-%m-%d %H:%M %Z")
    summary = {
        "command": command(),
        "written": now,
        **({"steps": f"{state.global_step} of {state.max_steps}"} if state else {}),
        "processes": training_args.world_size,
        "seed": training_args.seed,
        **about,
        **_left_out_table(left_out),
        "versions": versions(),
    }
    write_html_report(
        Path(training_args.output_dir) / name,
        title=title_of(task, about.get("mode", "evaluation"), about.get("model"), now),
        task=task,
        ending=_ending(state, now, stopped, error),
        summary=summary,
        history=state.log_history if state else None,
        before=before,
        after=after,
        examples=examples,
    )


def title_of(task: str, mode: str, model: str | None, written: str) -> str:
    """The title of a run's page: task, mode, the name of the model without its folders, and the date."""
    name = without_secrets(str(model or ""))
    if model and Path(model).exists():
        name = Path(model).resolve().name or name
    return " · ".join(filter(None, (task, mode, name, written.partition(" ")[0])))


def _ending(state, now: str, stopped: Sequence[str] | None, error: BaseException | None) -> list[str]:
    """What the page says about a run that has not come to its end: a headline and more lines; nothing if it has.

    state: the Trainer's state, or None; the others are as for `write_page`."""
    where = f" at step {state.global_step:,} of {state.max_steps:,}, {now}" if state else f", {now}"
    if stopped is not None:
        return [
            f"Stopped by a signal{where}.",
            "The exit status was 75: nothing is wrong, and the run can go on.",
            *stopped,
        ]
    if error is not None:
        text = str(error) or type(error).__name__
        return [f"Ended by an error{where}.", *without_secrets(text).splitlines()]
    return []


def write_html_report(
    path: str | Path,
    *,
    title: str,
    summary: dict,
    history: list[dict] | None,
    before: dict | None,
    after: dict | None,
    examples: Callable[[int], dict],
    max_examples: int = MOST_EXAMPLES,
    task: str | None = None,
    ending: Sequence[str] = (),
):
    """Writes the page to `path`; if that fails, an older page stays as it was. Equal input gives equal bytes.

    summary: facts about the run. "command" is shown on its own, other numbers and texts form a first table, and each
        dict becomes a table of its own. Values under names like TOKEN, KEY or PASSWORD are masked.
    history: the Trainer's `state.log_history`: dicts with "step" and numbers under the keys of `CHARTS` or others;
        "mfu" is a fraction of 1. None if nothing was trained; then only `after` is given.
    before, after: contents of `eval_before.json` and `eval_after.json`; None if there was no such evaluation.
    examples: returns `{"images": […], "question": text}` for the position of a prediction in `after`, or in `before` if
        there is no `after`. Images are PIL images, paths, or undecoded images of `datasets`. If it raises an exception
        or an image can't be read, the page says so.
    max_examples: at most this many are shown, evenly spaced over the evaluation set.
    task: the name of the task, for programs that read the page.
    ending: for a run that was stopped or has failed: a headline that says so, and further lines.
    Raises OSError if the file can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"before training": before, "after training": after}
    rows = paired_rows(before, after)
    shown = shown_positions(len(rows), max_examples)
    found = {name: report for name, report in results.items() if report is not None}
    page = environment.get_template("page.html.jinja").stream(
        title=title,
        metric=(after or before or {"metric": None})["metric"],
        task=task,
        ending=ending,
        results={name: result_of(report) for name, report in found.items()},
        matrices={name: matrix for name, report in found.items() if (matrix := confusion_matrix(report))},
        missing=[name for name, report in results.items() if report is None and history is not None],
        trained=history is not None,
        paired=paired_change(rows),
        charts=charts_of(history or []),
        chart=CHART_AREA,
        right_score=RIGHT_SCORE,
        command=masked_command(summary.get("command")),
        tables=_tables(summary),
        examples=(_example(rows[i], i, examples) for i in shown),
        filters=filters_of([_states(rows[i]) for i in shown], FILTERS),
        orders=orders_of(
            {"score": [_score(rows[i]) for i in shown], "change": [_change(rows[i]) for i in shown]}, ORDERS
        ),
        num_shown=len(shown),
        num_examples=len(rows),
    )
    with replacing(path, several_writers=True) as partial:  # whose name no other file has
        page.dump(str(partial), encoding="utf-8", errors="replace")


def shown_positions(n: int, most: int = MOST_EXAMPLES) -> list[int]:
    """The positions of the examples that a page shows of n examples: all of them, or `most` that are evenly spaced."""
    return np.linspace(0, n - 1, min(most, n), dtype=int).tolist() if n else []


def filters_of(states: list[list[str]], labels: dict[str, str]) -> list[tuple[str, str, int]]:
    """(name, label, number of examples) of each filter that shows some examples and hides others, and of "all".

    states: of each example, the names of the filters that it passes; labels: of the filters, by name."""
    counts = {name: sum(name in found for found in states) for name in labels}
    useful = [(name, labels[name], n) for name, n in counts.items() if 0 < n < len(states)]
    return [("all", "All", len(states)), *useful] if useful else []


def orders_of(values: dict[str, list[float]], labels: dict[str, str]) -> list[tuple[str, str]]:
    """(value, label) of each order of the examples that is not the one in which they stand, and of that one.

    values: of each example, by the name of an attribute; labels: of the orders, by attribute and direction: "score -1"
    is the one in which the score falls."""
    useful = []
    for order, label in labels.items():
        name, direction = order.split()
        sorted_values = sorted(values[name], reverse=direction == "-1")
        if sorted_values != values[name]:
            useful.append((order, label))
    return [("position 1", "In the order of the evaluation"), *useful] if useful else []


def _score(row: dict) -> float:
    return (row["after"] or row["before"])["score"]


def _change(row: dict) -> float:
    """How much the score of an example has risen; 0 if it was evaluated once."""
    return row["after"]["score"] - row["before"]["score"] if row["before"] and row["after"] else 0


def _states(row: dict) -> list[str]:
    """The names of the filters that an example passes."""
    states = ["right" if _score(row) >= RIGHT_SCORE else "wrong"]
    if change := _change(row):
        states += ["changed", "improved" if change > 0 else "worsened"]
    return states


def _left_out_table(left_out: Sequence[str]) -> dict[str, dict[str, str]]:
    """A table of the examples that were left out, by its title; nothing if none were."""
    if not left_out:
        return {}
    rows = {f"{i:,}": line for i, line in enumerate(left_out[:MOST_LEFT_OUT], 1)}
    more = {"…": f"and {len(left_out) - MOST_LEFT_OUT:,} more"} if len(left_out) > MOST_LEFT_OUT else {}
    return {"Examples left out": {"number": f"{len(left_out):,}"} | rows | more}


def _tables(summary: dict) -> dict[str, list[tuple[str, str]]]:
    """Rows of (name, value) by the table's title: one table of the plain values, and one of each dict in `summary`."""
    run = {k: v for k, v in summary.items() if k != "command" and not isinstance(v, dict)}
    tables = {"Run": list(masked_rows(run))}
    for name, values in summary.items():
        if isinstance(values, dict):
            tables[str(name)] = list(masked_rows(values, secret=bool(SECRET.search(str(name)))))
    return {name: rows for name, rows in tables.items() if rows}


def _example(row: dict, index: int, examples: Callable[[int], dict]) -> dict:
    """What the template needs to show one example, with the filters that it passes in "states"."""
    last = row["after"] or row["before"]
    try:
        content = examples(index)
        question, images = content["question"], content["images"]
    except Exception as e:  # a long run must get its report even if one example can't be loaded
        question, images = f"This example can't be loaded: {e}", []
    size = 160 if len(images) <= 2 else 96  # pixels; a video has many frames
    return {
        **row,
        "id": last["id"],
        "answers": list(dict.fromkeys(map(str, last["answers"]))),
        "states": " ".join(_states(row)),
        "score": _score(row),
        "change": _change(row),
        "question": question,
        "images": [_thumbnail(image, size) for image in images[:MOST_IMAGES]],
        "num_more": max(0, len(images) - MOST_IMAGES),
    }


def _thumbnail(image, size: int) -> dict | None:
    """The image as a JPEG in a data URI, at most `size` pixels wide and high; None if it can't be read."""
    try:
        if isinstance(image, Image.Image):
            small = image.convert("RGB")
        else:
            content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
            with io.BytesIO(content) if content else open_file(path) as opened:
                image = open_image_file(opened)
                image.draft("RGB", (2 * size, 2 * size))  # decodes a JPEG at about the needed size, which is faster
                small = image.convert("RGB")
        small.thumbnail((size, size))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=75)
    except Exception:  # the errors for damaged and for missing files have no class in common
        return None
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"uri": uri, "width": small.width, "height": small.height}
