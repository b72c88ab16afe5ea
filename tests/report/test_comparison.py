"""The page that compares runs."""

from pathlib import Path

import pytest
from html_pages import Page, evaluation

from phi3v.errors import InputError
from phi3v.report.charts import Curve
from phi3v.report.comparison import ComparedRun, check_comparable, write_comparison
from phi3v.report.page_reader import SavedPage

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \" ' \x1b[2J"


def run(name: str, scores: list[float], *, task="ucf101", metric="accuracy", settings=None, page=None, **changes):
    made = evaluation(scores, metric)
    for i, row in enumerate(made["predictions"]):
        row["prediction"] = "yes" if row["score"] >= 0.5 else "no"
        row |= changes.get(f"v{i}", {})
    page = page or SavedPage(task=task, curves={"Loss": Curve("Loss", [1, 2], [3.0, 1.0])})
    return ComparedRun(name, Path(name) / "eval_after.json", made, settings or {}, page)


def compare(folder, *runs, **options) -> Page:
    write_comparison(folder / "comparison.html", list(runs), **options)
    return Page((folder / "comparison.html").read_text(encoding="utf-8"))


def test_metrics_with_intervals_and_paired_differences(tmp_path):
    page = compare(
        tmp_path, run("A", [1.0] * 8 + [0.0] * 2), run("B", [1.0] * 7 + [0.0, 0.0, 1.0]), run("C", [1.0] * 10)
    )
    assert "A 0.8000 95% confidence interval 0.4902 to 0.9433 Wilson; 10 examples A/eval_after.json" in page.text
    # B: one better, one worse; (2 - 2) / 12 -+ 1.96 sqrt((4 / 12 - 0) / 12)
    assert "B minus A +0.0000 95% confidence interval -0.3267 to +0.3267 1 wrong → right, 1 right → wrong" in page.text
    assert "C minus A +0.2000" in page.text and "(McNemar): p = 0.5000; mean change" in page.text
    assert "of twenty such comparisons" in page.text
    assert "of twenty" not in compare(tmp_path, run("A", [1.0]), run("B", [1.0])).text


def test_runs_with_and_without_a_validation_loss(tmp_path):
    runs = run("A", [1.0]), run("B", [1.0])
    runs[1].report["loss"] = 1.5
    page = compare(tmp_path, *runs)
    assert (
        page.text.count("Validation loss") == 1 and "1 examples Validation loss 1.5000 B/eval_after.json" in page.text
    )


def test_curves_of_all_runs_in_one_chart(tmp_path):
    other = SavedPage(curves={"Validation loss": Curve("", [5], [0.5]), "Loss": Curve("", [5, 10], [9.0, 0.1])})
    page = compare(tmp_path, run("A", [1.0]), run("B", [1.0], page=other), run("C", [1.0], page=SavedPage(task="x")))
    lines = page.all("polyline")
    assert [(line["data-name"], line["data-steps"]) for line in lines] == [
        ("A", "1 2"), ("B", "5 10"), ("A", "1 2"), ("B", "5 10"), ("B", "5"),
    ]  # fmt: skip
    assert "10 A 1 at step 2 B 0.1 at step 10" in page.text
    groups = [g["class"] for g in page.all("g")]
    assert groups == ["c0", "c1", "c0", "c1", "c1"]  # a run has one colour on the whole page
    assert page.text.count("There are no curves of this run") == 1


def test_many_runs_have_lines_that_differ(tmp_path):
    page = compare(tmp_path, *(run(f"run-{i}", [1.0, 0.0]) for i in range(17)))
    styles = [(g["class"], line["class"]) for g, line in zip(page.all("g"), page.all("polyline"), strict=True)]
    assert len(set(styles[:17])) == 17 and "ucf101 · comparison of 17 runs" in page.text


def test_settings_that_differ(tmp_path):
    def table(**more):
        return SavedPage(tables={"Run": {"written": "now", "steps": "3 of 3", **more}, "Versions": {"torch": "2.14"}})

    a = {"learning_rate": 1e-4, "seed": 1, "new_flag": 3, "api_key": "a", "nested": {"x": [1, 2]}}
    b = a | {"learning_rate": 2e-4, "api_key": "b", "nested": {"x": [1, 3]}}
    del b["new_flag"]
    runs = (
        run("A", [1.0], settings=a, page=table(seed="1")),
        run("B", [1.0], settings=b, page=table(seed="1", memory="9")),
    )
    page = compare(tmp_path, *runs, run("C", [1.0]))
    assert "learning_rate 0.0001 0.0002 – nested.x 1, 2 1, 3 – memory – 9 –" in page.text
    assert "Recorded in only some of the runs, and not compared: new_flag" in page.text
    assert "Its flags are unknown" in page.text and "api_key" not in page.text and "steps –" not in page.text
    assert "No recorded setting differs" in compare(tmp_path, run("A", [1.0]), run("B", [1.0])).text


def test_examples_on_which_the_runs_disagree(tmp_path):
    a = run("A", [1.0, 1.0, 0.0, 0.0, 0.0], v4={"prediction": "maybe"})
    b = run("B", [1.0, 0.0, 1.0, 0.0, 0.0], v3={"prediction": "No. "}, v4={"prediction": "other"})
    image = {"uri": "data:image/jpeg;base64,AAAA", "width": 9, "height": 8}
    b.examples[1] = {"id": "v-1", "question": "What?", "images": [image, None], "num_more": 2}
    page = compare(tmp_path, a, b)
    found = page.all("article")
    assert [e["data-states"] for e in found] == ["split only-0-right", "split only-1-right", "all-wrong"]
    assert [e["data-spread"] for e in found] == ["1.0", "1.0", "0.0"]
    assert page.all("img") == [
        {"src": image["uri"], "width": "9", "height": "8", "alt": "image 1", "loading": "lazy", "decoding": "async"}
    ]
    assert "What? Answer yes A ✓ yes B ✗ no v-1" in page.text and "and 2 more" in page.text
    assert page.text.count("The runs' reports do not show this example") == 2
    assert "3 of 3 examples with different answers" in page.text and "all runs have answered 5 examples" in page.text
    assert [b["data-filter"] for b in page.all("button") if "data-filter" in b] == [
        "all", "split", "only-0-right", "only-1-right", "all-wrong"
    ]  # fmt: skip
    assert not page.all("option")  # the largest difference comes first already


def test_three_runs_and_an_example_that_one_of_them_lacks(tmp_path):
    c = run("C", [1.0, 0.0, 1.0])
    c.report["predictions"][2]["id"] = "v-9"
    page = compare(tmp_path, run("A", [1.0, 0.0, 1.0]), run("B", [0.0, 1.0, 1.0]), c)
    states = [e["data-states"] for e in page.all("article")]
    assert states == ["split only-1-wrong", "split only-1-right"]
    assert "2 examples were evaluated in only one of the two runs" in page.text
    assert "all runs have answered 2 examples" in page.text


def test_no_disagreement_and_too_many(tmp_path):
    same = compare(tmp_path, run("A", [1.0, 0.0]), run("B", [1.0, 0.0]))
    assert "all runs give the same answers to the 2 examples" in same.text
    assert not same.all("div", id="toolbar") and not same.all("article")
    b = run("B", [1.0] * 600)
    b.examples[599] = {"id": "v-599", "question": "shown", "images": [], "num_more": 0}
    many = compare(tmp_path, run("A", [0.0] * 600), b)
    assert len(many.all("article")) == 500 and "500 of 600 examples" in many.text and "shown Answer" in many.text
    assert [b for b in many.all("button") if "data-filter" in b] == []  # all are alike


@pytest.mark.parametrize(
    "other, said",
    [
        (
            run("B", [1.0], task="docvqa", metric="anls"),
            "A is of the task ucf101 and B of docvqa; A has the metric acc",
        ),
        (run("B", [1.0], task=None, metric="anls"), "^A has the metric accuracy and B anls"),
        (run("B", [1.0], v0={"id": "t-0"}), "on other data, which share no id: v-0 and t-0 are the first ones"),
        (
            run("B", [1.0], v0={"answers": ["no"]}),
            "the right answer of example v-0 is 'yes' in the first and 'no' in the",
        ),
        (run("B", [1.0], task="nlvr2", v0={"id": 7}), "ucf101 and B of nlvr2; A and B were evaluated on other data"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, other, said):
    with pytest.raises(InputError, match=said) as error:
        compare(tmp_path, run("A", [1.0, 0.0]), other)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_changed_script_with_the_same_data_is_compared():
    check_comparable([run("A", [1.0], task="ucf101"), run("B", [0.0], task="my_script")])


def test_texts_are_escaped_and_nothing_is_fetched(tmp_path):
    def evil(name):
        page = SavedPage(EVIL, False, {EVIL: Curve(EVIL, [1], [1.0])}, {"Run": {"mode": EVIL, EVIL: name + EVIL}})
        made = run(name + EVIL, [1.0 if name == "A" else 0.0], page=page, settings={EVIL: name + EVIL})
        made.report["predictions"][0] |= {"id": EVIL, "answers": [EVIL], "prediction": name + EVIL}
        made.examples[0] = {"id": EVIL, "question": EVIL, "images": [], "num_more": 0}
        return made

    page = compare(tmp_path, evil("A"), evil("B"))
    assert len(page.all("script")) == 1 and not page.all("img") and page.text.count("<script>alert(1)") > 20
    assert "\x1b" not in (tmp_path / "comparison.html").read_text()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    first = (tmp_path / "comparison.html").read_bytes()
    compare(tmp_path, evil("A"), evil("B"))
    assert (tmp_path / "comparison.html").read_bytes() == first
