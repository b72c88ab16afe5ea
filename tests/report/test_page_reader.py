"""What a comparison of runs reads from pages."""

import os

import pytest
from html_pages import evaluation, report
from PIL import Image

from phi3v.errors import InputError
from phi3v.report.charts import Curve
from phi3v.report.page_reader import read_page

EVIL = 'a </article> "quoted" & \x1b[2J <b>bold</b>'
OLD = """<main><h1>finetune hf trainer hateful memes</h1><figure class="card chart">
<svg viewBox="0 0 360 180" role="img" aria-label="MFU over steps: 30% at step 20">
<polyline class="curve" points="1,2 3,4" data-steps="10 20" data-values="25.5% 30%"/></svg></figure>
<details><summary>Run</summary><table><tr><th scope="row">seed</th><td>42</td></tr></table></details></main>"""


def test_what_was_written_is_read(tmp_path):
    history = [{"step": s, "loss": 2 / s, "tokens_per_second": 12345.678 * s, "mfu": 0.3} for s in (1, 200)]
    history += [{"step": 200, "eval_loss": 3e-5, "peak_memory_gib": 3.2e7}]
    many = [Image.new("RGB", (40, 30))] * 18
    examples = [{"images": [], "question": EVIL}, {"images": [*many[:1], "none.jpg"], "question": ""}]
    examples += [{"images": many, "question": "two\nlines"}]
    report(
        tmp_path,
        task="nlvr2",
        ending=["Stopped"],
        history=history,
        summary={"command": "x", "seed": 1, "data": {"a <b>": EVIL}, "long": {str(i): i for i in range(30)}},
        after=evaluation([1, 0, 1], v0={"id": EVIL}),
        examples=lambda i: examples[i],
    )
    page = read_page(tmp_path / "report.html")
    assert (page.task, page.ended_early) == ("nlvr2", True)
    assert page.curves["Loss"] == Curve("Loss", [1, 200], [2, 0.01])
    assert page.curves["Validation loss"] == Curve("Validation loss", [200], [3e-5])
    assert page.curves["Tokens/s"].values == pytest.approx([12346, 2.469e6])
    assert page.curves["MFU"].values == pytest.approx([0.3, 0.3])
    assert page.curves["Peak memory, GiB"].values == [3.2e7]
    shown = EVIL.replace("\x1b", "\\x1b")
    assert page.tables["Run"] == {"seed": "1"} and page.tables["Data"] == {"a <b>": shown}
    assert page.tables["Long"]["29"] == "29"
    assert [e["id"] for e in page.examples] == [shown, "v-1", "v-2"]
    assert [e["question"] for e in page.examples] == [shown, "", "two\nlines"]
    assert [len(e["images"]) for e in page.examples] == [0, 2, 16] and page.examples[1]["images"][1] is None
    image = page.examples[2]["images"][0]
    assert (image["width"], image["height"]) == (40, 30) and image["uri"].startswith("data:image/jpeg;base64,")
    assert [e["num_more"] for e in page.examples] == [0, 0, 2]


def test_pages_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "report.html").write_text(OLD)
    page = read_page(tmp_path / "report.html")
    assert page.task == "hateful_memes" and not page.ended_early and page.tables == {"Run": {"seed": "42"}}
    assert page.curves["MFU"].steps == [10, 20] and page.curves["MFU"].values == pytest.approx([0.255, 0.3])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe<", b"<main><article><p class='id'>", b"<polyline data-steps='1'>"])
def test_what_is_no_page_is_empty(tmp_path, content):
    (tmp_path / "report.html").write_bytes(content)
    page = read_page(tmp_path / "report.html")
    assert not page.curves and not page.tables and not any(e["id"] for e in page.examples)


def test_a_page_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        read_page(tmp_path / "none.html")
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(InputError, match="not a regular file"):
        read_page(tmp_path / "pipe.html")
