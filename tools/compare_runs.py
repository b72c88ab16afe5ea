"""Writes one page that compares runs: metrics, curves, settings that differ, examples on which they disagree.

    python tools/compare_runs.py OUT_A OUT_B OUT_C
    python tools/compare_runs.py OUT/eval_before.json OUT OUT/best/evaluation.json --output before_and_after.html

Each run is an output folder, with its evaluation after training, or a file with another evaluation in such a folder.
All runs must have been evaluated on the same data. Those after the first are compared with it.
"""

import os
from pathlib import Path

from phi3v.console import tell
from phi3v.errors import InputError, Parser, exit_on_input_error
from phi3v.files import read_json
from phi3v.report.comparison import ComparedRun, write_comparison
from phi3v.report.page import shown_positions
from phi3v.report.page_reader import SavedPage, read_page
from phi3v.report.templates import shown_text
from phi3v.training.early_stopping import OF_EARLY_STOPPING
from phi3v.training.output_folder import BEST, FINISHED
from phi3v.training.own_files import LOCK, UNFINISHED

EVALUATION, PAGE = "eval_after.json", "report.html"
OF_TRAINING = {"eval_before.json", EVALUATION}  # report.html shows these two
HELP = "give output folders of runs, or files with evaluations such as OUT/eval_before.json"
RESUME = "resume it with --resume_from_checkpoint auto"


def source_of(path: Path) -> Path:
    """The file with the evaluation that a path means. Raises InputError if there is none, or if a run is not over."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {HELP}")
    if not path.is_dir():
        return path
    source, page = path / EVALUATION, path / PAGE
    if source.is_file():
        if (path / LOCK).exists() or page.is_file() and read_page(page).ended_early:
            raise InputError(f"{path} holds a run that has not finished: it is still running or was stopped; {RESUME}")
        return source
    if others := [name for name in sorted(path.glob("*.json")) if problem_of(name) is None]:
        raise InputError(
            f"{path} has no {EVALUATION}, because its run has not finished or did not train: to compare another "
            f"evaluation in it, give its file, such as {others[0]}"
        )
    traces = (PAGE, LOCK, FINISHED, UNFINISHED, "config.json", "adapter_config.json")
    if any((path / name).exists() for name in traces) or next(path.glob("checkpoint-*"), None):
        raise InputError(
            f"{path} has no {EVALUATION}: if its run has not finished, {RESUME}, or evaluate it with --evaluate_only"
        )
    raise InputError(f"{path} is not the output folder of a run, as it has no {EVALUATION}: {HELP}")


def problem_of(path: Path) -> str | None:
    """What is wrong with a file as an evaluation; None if nothing is."""
    try:
        report = read_json(path)
    except InputError as e:
        return str(e)
    except OSError as e:
        return f"it can't be read: {e.strerror}"
    if not isinstance(report, dict) or not isinstance(report.get("metric"), str):
        return 'it has no "metric"'
    if not is_number(report.get(report["metric"])) or type(report.get("num_examples")) is not int:
        return f'it has no number for {report["metric"]!r} or "num_examples"'
    rows = report.get("predictions")
    if not isinstance(rows, list) or not rows:
        return "it has no predictions"
    wrong = next((i for i, row in enumerate(rows, 1) if not is_prediction(row)), None)
    return f"prediction {wrong:,} lacks an id, a prediction, answers or a score" if wrong else None


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # which NaN is not, either


def is_prediction(row) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("prediction"), str) or "id" not in row:
        return False
    answers = row.get("answers")
    return isinstance(answers, list) and len(answers) > 0 and is_number(row.get("score"))


def read_run(path: Path, name: str) -> ComparedRun:
    """Raises InputError as `source_of` does, and if the file is no evaluation."""
    source = source_of(path)
    if problem := problem_of(source):
        raise InputError(f"{source} is not an evaluation: {problem}; {HELP}")
    # Settings and curves are those of the training: of the folder's run, or of the run whose folder BEST this is.
    folder = source.parent.parent if source.parent.name == BEST else source.parent
    page = read_page(folder / PAGE) if (folder / PAGE).is_file() else SavedPage()
    own = page
    if source.name not in OF_TRAINING and source.parent == folder:
        file = source.with_suffix(".html")
        own = read_page(file) if file.is_file() else SavedPage()
        page.task = page.task or own.task
    report = read_json(source)
    settings = read_json(folder / FINISHED) if (folder / FINISHED).is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    settings = {name: value for name, value in settings.items() if name not in OF_EARLY_STOPPING}  # the page has them
    return ComparedRun(name, source, report, settings, page, examples_of(report, own))


def examples_of(report: dict, page: SavedPage) -> dict[int, dict]:
    """The examples of a page by their position in the report; none for a report of which the page shows nothing."""
    rows = report["predictions"]
    positions = shown_positions(len(rows), len(page.examples))
    found = dict(zip(positions, page.examples, strict=False))
    return {i: example for i, example in found.items() if shown_text(rows[i]["id"]) == example["id"]}


def names_of(paths: list[Path]) -> list[str]:
    """A name for each path: its last parts, as many as it takes to tell all of them apart; of a file at least two."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    counts = [2 if path.is_file() else 1 for path in paths]
    while True:
        names = ["/".join(of[-count:]) for of, count in zip(parts, counts, strict=True)]
        longer = [
            count + (names.count(name) > 1 and count < len(of))
            for of, count, name in zip(parts, counts, names, strict=True)
        ]
        if longer == counts:
            return names
        counts = longer


def check_given_once(paths: list[Path]):
    """Raises InputError if two paths lead to the same evaluation."""
    seen = {}
    for path in paths:
        real = os.path.realpath(source_of(path))
        if real in seen:
            other = f", also as {seen[real]}" if seen[real] != path else ""
            raise InputError(f"{path} is given twice{other}: give each run once")
        seen[real] = path


def check_output(path: Path):
    """Raises InputError if the page would overwrite anything but an earlier comparison, or can't be written."""
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: {path.parent} is not a folder")
    if path.exists() or path.is_symlink():
        is_ours = False
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                is_ours = '<meta name="generator" content="compare_runs">' in file.read(2048)
        if not is_ours:
            raise InputError(f"--output {path} is there, and is not a comparison: choose another name")


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="two or more: output folders, or files with an evaluation")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison.html"), help="the page to write (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("give at least two runs to compare")
    check_output(args.output)
    check_given_once(args.runs)
    runs = [read_run(path, name) for path, name in zip(args.runs, names_of(args.runs), strict=True)]
    try:
        write_comparison(args.output, runs)
    except OSError as e:
        raise InputError(f"--output {args.output} can't be written: {e.strerror}") from None
    metric = runs[0].report["metric"]
    values = ", ".join(f"{run.name} {run.report[metric]:.4f}" for run in runs)
    tell(f"{args.output}: {metric} of {values}")


if __name__ == "__main__":
    exit_on_input_error(main)
