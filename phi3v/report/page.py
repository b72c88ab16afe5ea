"""The report of a run as one HTML file: what was learned, how training went, with what, and what the model answers."""

import base64
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import replacing
from .charts import CHART_AREA, charts_of
from .secrets import SECRET, masked_command, masked_rows
from .statistics import RIGHT, paired_change, paired_rows, result_of
from .summary import versions
from .templates import environment

MOST_IMAGES = 16  # an example


def write_page(
    training_args,
    before: dict | None,
    after: dict | None,
    about: dict,
    examples: Callable[[int], dict],
    state=None,
    name: str = "report.html",
):
    """Writes the page of a run to its output folder. Only rank 0 calls it.

    training_args: the run's TrainingArguments.
    before, after, examples: as `write_html_report` takes them.
    about: more facts about the run, which become rows and tables of the page.
    state: the Trainer's state; None if nothing was trained.
    """
    summary = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        **({"steps": f"{state.global_step} of {state.max_steps}"} if state else {}),
        "processes": training_args.world_size,
        "seed": training_args.seed,
        **about,
        "versions": versions(),
    }
    write_html_report(
        Path(training_args.output_dir) / name,
        title=Path(sys.argv[0]).stem.replace("_", " "),
        summary=summary,
        history=state.log_history if state else None,
        before=before,
        after=after,
        examples=examples,
    )


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
    results = {"before training": before, "after training": after}
    rows = paired_rows(before, after)
    shown = np.linspace(0, len(rows) - 1, min(max_examples, len(rows)), dtype=int).tolist() if rows else []
    page = environment.get_template("page.html.jinja").stream(
        title=title,
        metric=(after or before or {"metric": None})["metric"],
        results={name: result_of(report) for name, report in results.items() if report is not None},
        missing=[name for name, report in results.items() if report is None and history is not None],
        trained=history is not None,
        paired=paired_change(rows),
        charts=charts_of(history or []),
        chart=CHART_AREA,
        command=masked_command(summary.get("command")),
        tables=_tables(summary),
        examples=(_example(rows[i], i, examples) for i in shown),
        num_shown=len(shown),
        num_examples=len(rows),
    )
    with replacing(path) as partial:
        page.dump(str(partial), encoding="utf-8", errors="replace")


def _tables(summary: dict) -> dict[str, list[tuple[str, str]]]:
    """Rows of name and value: those of the summary itself, then of each dict in it."""
    run = {k: v for k, v in summary.items() if k != "command" and not isinstance(v, dict)}
    tables = {"Run": list(masked_rows(run))}
    for name, values in summary.items():
        if isinstance(values, dict):
            tables[str(name)] = list(masked_rows(values, secret=bool(SECRET.search(str(name)))))
    return {name: rows for name, rows in tables.items() if rows}


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
