"""The confusion matrix: when there is one, what it counts, and how the page shows it."""

import pytest
from html_pages import evaluation, report

from phi3v.report.confusion import confusion_matrix


def answers(*rows) -> dict:
    """An evaluation of (right answer, prediction, score)."""
    made = evaluation([score for *_, score in rows])
    for row, (right, prediction, _) in zip(made["predictions"], rows, strict=True):
        row |= {"answers": [right], "prediction": prediction}
    return made


ROWS = [("Yes", "yes.", 1.0), ("Yes", "no", 0.0), ("yes", " NO", 0.0), ("no", "No", 1.0), ("no", "<b>maybe", 0.0)]


def test_what_it_counts():
    matrix = confusion_matrix(answers(*ROWS))
    assert matrix["classes"] == ["no", "Yes"]
    assert [(row["name"], row["total"]) for row in matrix["rows"]] == [("no", 2), ("Yes", 3)]
    counts = [[(cell["count"], cell["share"], cell["right"]) for cell in row["cells"]] for row in matrix["rows"]]
    assert counts == [
        [(1, 0.5, True), (0, 0, False), (1, 0.5, False)],
        [(2, 0.6667, False), (1, 0.3333, True), (0, 0, False)],
    ]
    assert matrix["others"] == 1 and matrix["examples_of_others"] == [("<b>maybe", 1)]


def test_the_diagonal_is_what_the_metric_counts_as_right():
    matrix = confusion_matrix(answers(("a", "A!", 1.0), ("a", "a", 0.0), ("b", "b", 1.0), ("b", "a", 0.0)))
    assert [[cell["count"] for cell in row["cells"]] for row in matrix["rows"]] == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "rows, size",
    [
        ([("a", "a", 1.0)], None),  # one class
        ([(f"text {i}", "", 0.0) for i in range(20)], None),  # as many answers as examples
        ([(f"class {i % 31}", "", 0.0) for i in range(310)], None),
        ([(f"class {i % 30}", "", 0.0) for i in range(310)], 30),
        ([(name, name, 1.0) for name in ("True", "False")] * 2, 2),
    ],
)
def test_which_data_have_one(rows, size):
    matrix = confusion_matrix(answers(*rows))
    assert (matrix and len(matrix["classes"])) == size


def test_data_with_several_right_answers_have_none():
    several = answers(*ROWS)
    several["predictions"][0]["answers"] = ["yes", "no"]
    assert confusion_matrix(several) is None
    several["predictions"][0]["answers"] = ["yes", "Yes."]
    assert confusion_matrix(several)["classes"] == ["no", "yes"]


def test_the_page_has_a_table_with_headers_and_shades(tmp_path):
    _, page = report(tmp_path, before=None, after=answers(*ROWS))
    assert [header["scope"] for header in page.all("th") if "scope" in header][:5] == ["col"] * 3 + ["row"] * 2
    cells = [cell for cell in page.all("td") if "style" in cell]
    assert [cell["style"] for cell in cells] == [
        f"--share:{s}" for s in ("0.5", "0.0", "0.5", "0.6667", "0.3333", "0.0")
    ]
    assert cells[3]["title"] == "2 of 3, 67%" and not page.all("b", title="maybe")
    assert "1 answers are none of the right answers of this data set, most often “ <b>maybe ” (1)" in page.text
    (frame,) = page.all("div", **{"class": "scrolls"})
    assert frame["role"] == "region" and page.all("figcaption", id=frame["aria-labelledby"])
    assert not report(tmp_path)[1].all("div", **{"class": "scrolls"})  # one class
