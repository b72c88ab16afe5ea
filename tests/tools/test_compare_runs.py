"""tools/compare_runs.py: what it takes, what it reads, and its errors."""

import json
import os
import re
from pathlib import Path

import pytest
from html_pages import Page, evaluation, example

from phi3v.errors import InputError
from phi3v.report.page import write_html_report
from tools import compare_runs


def make_run(folder: Path, scores=(1.0, 0.0, 1.0), task="ucf101", ending=(), metric="accuracy", **changes) -> Path:
    """An output folder as a run leaves it."""
    folder.mkdir(parents=True)
    before, after = evaluation([0.0] * len(scores), metric), evaluation(list(scores), metric, **changes)
    history = [{"step": s, "loss": 2.0 - s / 10} for s in (1, 2)]
    write_html_report(
        folder / "report.html", title="x", summary={"mode": "LoRA"}, history=history, before=before, after=after,
        examples=example, task=task, ending=ending,
    )  # fmt: skip
    for name, content in (
        ("eval_before", before),
        ("eval_after", after),
        ("finished", {"learning_rate": len(folder.name)}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def compare(*paths, output: Path) -> Page:
    compare_runs.main([*map(str, paths), "--output", str(output)])
    return Page(output.read_text(encoding="utf-8"))


def test_two_runs_with_pictures_from_their_pages(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "bb", (1.0, 1.0, 1.0))
    page = compare(a, b, output=tmp_path / "c.html")
    assert f"{tmp_path}/c.html: accuracy of a 0.6667, bb 1.0000" in capsys.readouterr().out
    assert "bb minus a +0.3333" in page.text and "learning_rate 1 2" in page.text and "ucf101 · comparison" in page.text
    assert [line["data-name"] for line in page.all("polyline")] == ["a", "bb"] * 2
    (shown,) = page.all("article")
    assert (
        len(page.all("img")) == 1
        and "What is shown in 1?" in page.text
        and shown["data-states"] == "split only-1-right"
    )
    compare(b, a, output=tmp_path / "c.html")  # an earlier comparison is replaced


def test_a_run_that_stopped_early_has_no_settings_that_the_other_lacks(tmp_path):
    early, other = make_run(tmp_path / "early"), make_run(tmp_path / "other")
    settings = {"early_stopping_patience": 4, "early_stopping_on": "metric", "stopped_early_at": 2, "learning_rate": 5}
    (early / "finished.json").write_text(json.dumps(settings))
    assert "early_stopping" not in compare(early, other, output=tmp_path / "c.html").text


def test_files_with_other_evaluations(tmp_path):
    out = make_run(tmp_path / "out")
    (out / "best").mkdir()
    best = {"step": 3, **evaluation([1.0, 1.0, 1.0])}
    (out / "best" / "evaluation.json").write_text(json.dumps(best))
    (out / "evaluation-test.json").write_text(json.dumps(evaluation([1.0, 1.0, 1.0])))
    page = compare(out / "eval_before.json", out, out / "best" / "evaluation.json", output=tmp_path / "c.html")
    for name in ("out/eval_before.json 0.0000", "out 0.6667", "best/evaluation.json 1.0000"):
        assert name in page.text
    assert len(page.all("img")) == 3 and len(page.all("polyline")) == 6
    page = compare(out, out / "evaluation-test.json", output=tmp_path / "d.html")  # whose page is missing
    assert "out/evaluation-test.json 1.0000" in page.text


def test_a_page_of_another_evaluation_gives_no_pictures(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", (0.0, 1.0, 1.0))
    for folder in (a, b):
        other = evaluation([1.0, 1.0, 1.0], **{f"v{i}": {"id": f"other-{i}"} for i in range(3)})
        write_html_report(
            folder / "report.html", title="x", summary={}, history=[], before=None, after=other, examples=example
        )
    page = compare(a, b, output=tmp_path / "c.html")
    assert len(page.all("article")) == 2 and not page.all("img") and "do not show this example" in page.text


def test_names_tell_runs_apart(tmp_path):
    for name in ("x/a/out", "y/a/out", "y/b/out", "z"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "z" / "eval_before.json").touch()
    paths = [tmp_path / name for name in ("x/a/out", "y/a/out", "y/b/out", "z", "z/eval_before.json")]
    assert compare_runs.names_of(paths) == ["x/a/out", "y/a/out", "b/out", "z", "z/eval_before.json"]


def broken(folder: Path, **content) -> Path:
    (make_run(folder) / "eval_after.json").write_text(json.dumps(evaluation([1.0]) | content))
    return folder


def with_file(folder: Path, name: str, content: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    return folder


def before_only(folder: Path) -> Path:
    (make_run(folder) / "eval_after.json").unlink()
    return folder


BAD = {
    "once": (lambda t: [], "give at least two runs to compare"),
    "twice": (lambda t: [t / "good/../good/"], "is given twice, also as .*good: give each run once"),
    "twice by a link": (lambda t: [(t / "l").symlink_to(t / "good") or t / "l"], "l is given twice, also as .*good"),
    "a run and its file": (lambda t: [t / "good/eval_after.json"], "is given twice, also as"),
    "missing": (lambda t: [t / "none"], "none does not exist: give output folders"),
    "no run": (lambda t: [with_file(t / "x", "notes.txt")], "x is not the output folder of a run"),
    "a model": (lambda t: [with_file(t / "x", "config.json", "{}")], "x has no eval_after.json: if its run has not"),
    "before only": (lambda t: [before_only(t / "x")], "x has no eval_after.json, .* such as .*x/eval_before.json"),
    "checkpoints only": (lambda t: [with_file(t / "x", "report.html")], "not finished, resume it with --resume_from"),
    "running": (lambda t: [with_file(make_run(t / "x"), ".locked-by-a-run")], "x holds a run that has not finished"),
    "stopped": (lambda t: [make_run(t / "x", ending=["Stopped"])], "not finished: it is still running or was stopped"),
    "no JSON": (lambda t: [with_file(make_run(t / "x"), "eval_after.json", "{")], "is not valid JSON"),
    "other JSON": (lambda t: [t / "good/finished.json"], 'finished.json is not an evaluation: it has no "metric"'),
    "a list": (lambda t: [with_file(make_run(t / "x"), "eval_after.json", "[]")], "is not an evaluation"),
    "NaN": (lambda t: [broken(t / "x", accuracy=float("nan"))], "no number for 'accuracy'"),
    "no predictions": (lambda t: [broken(t / "x", predictions=[])], "it has no predictions"),
    "no score": (lambda t: [broken(t / "x", predictions=[{"id": 1, "prediction": ""}])], "prediction 1"),
    "other task": (lambda t: [make_run(t / "x", task="docvqa", metric="anls")], "task ucf101 and x of docvqa"),
    "other data": (lambda t: [make_run(t / "x", (1.0,), v0={"id": "t"})], "on other data, which share no id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_an_error_of_one_line(name, tmp_path):
    make_run(tmp_path / "good")
    make, said = BAD[name]
    with pytest.raises(InputError) as error:
        compare(tmp_path / "good", *make(tmp_path), output=tmp_path / "c.html")
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)
    assert not (tmp_path / "c.html").exists()


def test_the_output_overwrites_nothing_else(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for path in (a / "report.html", tmp_path, a / "eval_after.json"):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(InputError, match="is there, and is not a comparison"):
            compare(a, b, output=path)
        assert before is None or path.read_bytes() == before
    with pytest.raises(InputError, match="nowhere is not a folder"):
        compare(a, b, output=tmp_path / "nowhere" / "c.html")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a comparison"):
        compare(a, b, output=tmp_path / "pipe")
