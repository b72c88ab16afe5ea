"""A page that compares runs: metrics, curves over one another, settings that differ, examples with other answers."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..files import replacing
from ..secrets import masked_rows
from .charts import CHART_AREA, draw
from .confusion import folded
from .page import MOST_EXAMPLES, filters_of, orders_of
from .page_reader import SavedPage
from .statistics import RIGHT_SCORE, paired_change, paired_rows, result_of, rows_by_id
from .templates import environment

UNKNOWN = "–"
ORDERS = {"spread -1": "Largest difference of scores first"}
NOT_COMPARED = {"written", "mode", "model", "Examples left out"}  # rows and tables of a page; the first three are shown


@dataclass
class ComparedRun:
    """One of the runs. name: unlike all others; where: the file with the evaluation `report`.

    settings: of the training, {} if they are unknown; page: what the run's page shows.
    examples: the examples of a page by their position in `report`, as `SavedPage` has them.
    """

    name: str
    where: Path
    report: dict
    settings: dict = field(default_factory=dict)
    page: SavedPage = field(default_factory=SavedPage)
    examples: dict[int, dict] = field(default_factory=dict)


def check_comparable(runs: list[ComparedRun]):
    """Raises InputError if a run has another metric than the first one, or was evaluated on other data: it shares no
    example with the first run, or an example has other right answers."""
    first = runs[0]
    known = rows_by_id(first.report)
    for run in runs[1:]:
        tasks = (first.page.task, run.page.task)
        reason = (
            f"{first.name} is of the task {tasks[0]} and {run.name} of {tasks[1]}; " if len({*tasks, None}) > 2 else ""
        )
        advice = "compare runs of one task that were evaluated on the same data"
        metrics = first.report["metric"], run.report["metric"]
        if metrics[0] != metrics[1]:
            raise InputError(f"{reason}{first.name} has the metric {metrics[0]} and {run.name} {metrics[1]}: {advice}")
        rows = rows_by_id(run.report)
        common = [key for key in rows if key in known]
        if not common:
            ids = (next(iter(of))[0] for of in (known, rows))
            raise InputError(
                f"{reason}{first.name} and {run.name} were evaluated on other data, which share no id: "
                f"{' and '.join(f'{id:.60}' for id in ids)} are the first ones; {advice}"
            )
        for key in common:
            answers = [sorted(map(str, row["answers"])) for row in (known[key], rows[key])]
            if answers[0] != answers[1]:
                texts = [", ".join(of)[:60] for of in answers]
                raise InputError(
                    f"{reason}{first.name} and {run.name} were evaluated on other data: the right answer of example "
                    f"{key[0]:.60} is {texts[0]!r} in the first and {texts[1]!r} in the second; {advice}"
                )


def write_comparison(path: Path, runs: list[ComparedRun], most: int = MOST_EXAMPLES):
    """Writes the page. Runs after the first are compared with it. Equal input gives equal bytes.

    most: at most this many examples are shown. Raises InputError as `check_comparable` does, and OSError if the file
    can't be written."""
    check_comparable(runs)
    first, metric = runs[0], runs[0].report["metric"]
    found = _disagreements(runs)
    # If there are too many, those that a run's page shows with question and pictures come first.
    shown = sorted(found, key=lambda e: e["question"] is None)[:most]
    shown.sort(key=lambda e: e["position"])
    tasks = dict.fromkeys(run.page.task for run in runs if run.page.task)
    names = ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"
    page = environment.get_template("comparison.html.jinja").stream(
        title=" · ".join([*tasks, f"comparison of {names}"]),
        metric=metric,
        runs=[_card(run) for run in runs],
        changes=[_change(first, run) for run in runs[1:]],
        first=first.name,
        charts=_charts(runs),
        chart=CHART_AREA,
        right_score=RIGHT_SCORE,
        settings=_settings_that_differ(runs),
        partly_known=_partly_known(runs),
        examples=shown,
        filters=filters_of([e["states"] for e in shown], _filters(runs)),
        orders=orders_of({"spread": [e["spread"] for e in shown]}, ORDERS),
        num_shown=len(shown),
        num_examples=len(found),
        num_common=_num_common(runs),
    )
    with replacing(path, several_writers=True) as partial:  # whose name no other file has
        page.dump(str(partial), encoding="utf-8", errors="replace")


def _card(run: ComparedRun) -> dict:
    facts = run.page.tables.get("Run", {})
    about = [facts.get(name) for name in ("mode", "model", "written")]
    return {
        "name": run.name,
        "where": str(run.where),
        "about": " · ".join(filter(None, about)),
        "result": result_of(run.report),
        "has_curves": bool(run.page.curves),
        "has_settings": bool(run.settings),
    }


def _change(first: ComparedRun, run: ComparedRun) -> dict:
    """The paired comparison with the first run; "left_out": how many examples only one of the two has."""
    paired = paired_change(paired_rows(first.report, run.report))
    sizes = [len(of.report["predictions"]) for of in (first, run)]
    return {"name": run.name, "paired": paired, "left_out": sum(sizes) - 2 * paired["n"]}


def _charts(runs: list[ComparedRun]) -> list[dict]:
    """A chart with a curve of each run that has one, for every title that a page has."""
    titles = dict.fromkeys(title for run in runs for title in run.page.curves)
    charts = []
    for title in titles:
        numbers = [i for i, run in enumerate(runs) if title in run.page.curves]
        chart = draw(title, [runs[i].page.curves[title] for i in numbers])
        for number, curve in zip(numbers, chart["curves"], strict=True):
            curve |= {"name": runs[number].name, "number": number}
        charts.append(chart)
    return charts


def _settings_that_differ(runs: list[ComparedRun]) -> list[tuple[str, list[str]]]:
    """(name, value of each run) of the settings that differ, and of what differs in the tables of the pages.

    A setting that is recorded in only some of the runs is not among them: `_partly_known` names it."""
    rows = _differing([dict(masked_rows(run.settings)) for run in runs], in_all=True)
    names = {name for name, _ in rows}
    pages = [
        {
            (name if title == "Run" else f"{title}, {name}"): value
            for title, table in run.page.tables.items()
            if title not in NOT_COMPARED
            for name, value in table.items()
            if title != "Run" or name not in NOT_COMPARED
        }
        for run in runs
    ]
    return rows + [row for row in _differing(pages, in_all=False) if row[0] not in names]


def _differing(values: list[dict[str, str]], in_all: bool) -> list[tuple[str, list[str]]]:
    """The rows of values that are not the same in all runs; a run without any values is left out of account.

    in_all: only names that all of the others have."""
    known = [of for of in values if of]
    rows = []
    for name in dict.fromkeys(name for of in known for name in of):
        found = {of.get(name) for of in known}
        if len(found) > 1 and not (in_all and None in found):
            rows.append((name, [of.get(name, UNKNOWN) for of in values]))
    return rows


def _partly_known(runs: list[ComparedRun]) -> list[str]:
    """The names of settings that are recorded in some of the runs alone, because other versions wrote the others."""
    known = [run.settings.keys() for run in runs if run.settings]
    return sorted(set().union(*known) - set.intersection(*map(set, known))) if known else []


def _by_key(runs: list[ComparedRun]) -> list[dict]:
    return [rows_by_id(run.report) for run in runs]


def _num_common(runs: list[ComparedRun]) -> int:
    """How many examples all runs have answered."""
    return len(set.intersection(*(set(rows) for rows in _by_key(runs))))


def _disagreements(runs: list[ComparedRun]) -> list[dict]:
    """What the template needs to show the examples with different answers or scores, in the order of the first run
    that has them."""
    answers = _by_key(runs)
    positions = [{key: i for i, key in enumerate(rows)} for rows in answers]
    found = []
    for key in dict.fromkeys(key for rows in answers for key in rows):
        rows = [of.get(key) for of in answers]
        there = [row for row in rows if row]
        scores = [row["score"] for row in there]
        if len({folded(row["prediction"]) for row in there}) == len(set(scores)) == 1:
            continue
        shown = (run.examples.get(of.get(key)) for run, of in zip(runs, positions, strict=True))
        content = next(filter(None, shown), {"question": None, "images": [], "num_more": 0})
        found.append(
            {
                "id": key[0],
                "position": len(found),
                "answers": list(dict.fromkeys(map(str, there[0]["answers"]))),
                "rows": rows,
                "spread": max(scores) - min(scores),
                "states": _states(rows),
                **{name: content[name] for name in ("question", "images", "num_more")},
            }
        )
    return found


def _states(rows: list[dict | None]) -> list[str]:
    """The names of the filters that an example passes. rows: the answer of each run, or None."""
    right = [i for i, row in enumerate(rows) if row and row["score"] >= RIGHT_SCORE]
    wrong = [i for i, row in enumerate(rows) if row and row["score"] < RIGHT_SCORE]
    if not (right and wrong):
        return ["all-right" if right else "all-wrong"]
    states = ["split"]
    states += [f"only-{right[0]}-right"] if len(right) == 1 else []
    states += [f"only-{wrong[0]}-wrong"] if len(wrong) == 1 and len(rows) > 2 else []
    return states


def _filters(runs: list[ComparedRun]) -> dict[str, str]:
    """The labels of the filters by their names."""
    only = {f"only-{i}-{how}": f"Only {run.name} {how}" for how in ("right", "wrong") for i, run in enumerate(runs)}
    return {"split": "Some right, some wrong", **only, "all-wrong": "All wrong", "all-right": "All right"}
