"""The HTML report of a run: what it says, what it leaves out, and that nothing in it can run or be fetched."""

import base64
import io
import math
from html.parser import HTMLParser

import pytest
from PIL import Image

from phi3v.report.page import write_html_report
from phi3v.report.statistics import confidence_interval, sign_test
from phi3v.report.templates import format_number

VOID = {"meta", "link", "img", "input", "br"}
SVG = {"path", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with attributes, and texts outside style and script; fails on tags that are not closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID | SVG:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in SVG:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def evaluation(scores: list[float], name: str = "accuracy", **changes) -> dict:
    rows = [{"id": f"v-{i}", "prediction": f"p{i}", "answers": ["yes"], "score": s} for i, s in enumerate(scores)]
    for i, change in changes.items():
        rows[int(i[1:])] |= change
    return {"metric": name, name: sum(scores) / len(scores), "num_examples": len(rows), "predictions": rows}


def example(i: int) -> dict:
    return {"images": [Image.new("RGB", (320, 200), (i, 90, 200))], "question": f"What is shown in {i}?"}


def report(folder, **changes) -> tuple[str, Page]:
    arguments = {
        "title": "A run",
        "summary": {"command": "torchrun train.py", "seed": 42, "versions": {"torch": "2.14.1"}},
        "history": [{"loss": 2 / step, "learning_rate": 1e-4, "step": step} for step in (1, 2, 3)],
        "before": evaluation([0, 0, 1, 1]),
        "after": evaluation([1, 1, 1, 0]),
        "examples": example,
    } | changes
    path = folder / "report.html"
    write_html_report(path, **arguments)
    assert [p.name for p in folder.iterdir() if p.name.startswith("report")] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_says_what_was_learned(tmp_path):
    html, page = report(tmp_path)
    assert "Result: accuracy" in page.text and "0.5000" in page.text and "0.7500" in page.text
    assert "95% confidence interval 0.1500 to 0.8500 Wilson; 4 examples" in page.text
    assert "+0.2500 2 wrong → right, 1 right → wrong" in page.text
    assert [a["data-states"] for a in page.all("article")] == [
        "right changed improved",
        "right changed improved",
        "right",
        "wrong changed worsened",
    ]
    assert "What is shown in 3?" in page.text and "v-3" in page.text
    assert "torchrun train.py" in page.text and "2.14.1" in page.text
    assert [b["data-filter"] for b in page.all("button")] == [
        "all", "wrong", "right", "changed", "improved", "worsened"
    ]  # fmt: skip
    assert "hidden" in page.all("div", id="toolbar")[0]  # without JavaScript there is nothing to filter with


def test_equal_input_gives_equal_bytes(tmp_path):
    graded = {"before": evaluation([0, 0.7, 1.0]), "after": evaluation([0.8, 0.6, 1.0])}
    assert report(tmp_path / "a", **graded)[0] == report(tmp_path / "b", **graded)[0]


def test_nothing_is_fetched_and_one_script_may_run(tmp_path):
    html, page = report(tmp_path)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in html and "@import" not in html
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;") and "'sha256-" in policy["content"]
    assert len(page.all("script")) == 1


def test_texts_stay_texts(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \"' {{ 7 * 7 }} \ud800"
    _, page = report(
        tmp_path,
        title=evil,
        summary={evil: evil, "command": evil, "data": {evil: [evil]}, evil + "2": {"a": evil}},
        history=[{"step": 1, evil: 1.0}],
        after=evaluation([1, 0, 0, 0], v0={"prediction": evil, "answers": [evil], "id": evil}),
        examples=lambda i: {"images": [{"bytes": None, "path": evil}], "question": evil},
    )
    assert len(page.all("script")) == 1 and not page.all("img")
    assert page.text.count("<script>alert(1)</script>") >= 12 and "49" not in page.text


def test_secrets_are_masked(tmp_path):
    token = "hf_abcdefghijklmnopqrstuvwx"
    html, page = report(
        tmp_path,
        summary={
            "command": f"HF_TOKEN=s3cret1 torchrun --hub_token s3cret2 --wandb-key='s3cret3 b' '--password=s3cret4 c' "
            f'--max_new_tokens 64 --url https://me:s3cret5@host/x {token} --config \'{{"token": "s3cret6"}}\'',
            "env": {"API_KEY": "s3cret7", "nested": {"password": 1234567, "list": [{"secret": "s3cret8"}]}},
            "credentials": {"user": "s3cret9"},
            "note": f"uses {token}",
            "settings": {"max_new_tokens": 64, "include_tokens_per_second": "no", "hub_token": None},
            "versions": {"tokenizers": "0.23.1"},
        },
    )
    assert "s3cret" not in html and token not in html and "1234567" not in html
    assert "--max_new_tokens 64 --url https://•••@host/x •••" in page.text and "max_new_tokens 64" in page.text
    assert "include_tokens_per_second no" in page.text and "hub_token None" in page.text and "0.23.1" in page.text
    forms = "github_pat_s3cretab xoxb-s3cret-abc https://h/a?X-Amz-Signature=s3cret&b=1 https://h/a?se=1&sig=s3cret"
    assert "s3cret" not in report(tmp_path, summary={"command": f"train.py {forms}"})[0]
    listed = report(tmp_path, summary={"command": ["train.py", "--hub_token", "it's s3cret", "--password=s3cret b"]})
    assert "s3cret" not in listed[0]


@pytest.mark.parametrize("missing", ["before", "after", "both", "history", "summary"])
def test_missing_parts_are_named(tmp_path, missing):
    empty = {"before": None, "after": None, "history": [], "summary": {}}
    changes = {k: v for k, v in empty.items() if missing == k or missing == "both" and v is None}
    _, page = report(tmp_path, **changes)
    told = {
        "There is no evaluation before training": missing in ("before", "both"),
        "There is no evaluation after training": missing in ("after", "both"),
        "There are no predictions to show": missing == "both",
        "Nothing was logged during training": missing == "history",
        "No settings were recorded": missing == "summary",
        "wrong → right": missing not in ("before", "after", "both"),
    }
    assert {text: text in page.text for text in told} == told
    assert len(page.all("article")) == (0 if missing == "both" else 4)


def test_images_of_every_kind(tmp_path):
    file = io.BytesIO()
    Image.new("RGBA", (900, 30), (9, 9, 9, 0)).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    Image.new("L", (3000, 2000), 9).save(tmp_path / "b.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:400])
    images = [
        [tmp_path / "a.png"],
        [{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "b.jpg")}],
        [tmp_path / "broken.jpg", tmp_path / "none.jpg", {"bytes": b"", "path": None}, None, Image.new("I;16", (9, 9))],
        [Image.new("P", (20, 20))] * 20,
    ]

    _, page = report(tmp_path, examples=lambda i: {"images": images[i], "question": "?"})
    sizes = [(int(a["width"]), int(a["height"])) for a in page.all("img")]
    assert sizes[:3] == [(160, 5), (160, 5), (160, 107)] and sizes[3:] == [(9, 9)] + [(20, 20)] * 16
    assert len(page.all("span", **{"class": "none"})) == 4 and "and 4 more" in page.text
    with Image.open(io.BytesIO(base64.b64decode(page.all("img")[2]["src"].partition(",")[2]))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (160, 107))


def test_an_example_that_fails_is_named(tmp_path):
    def fails(i):
        raise KeyError("row 7")

    _, page = report(tmp_path, examples=fails)
    assert page.text.count("This example can't be loaded: 'row 7'") == 4


def test_a_sample_is_evenly_spaced(tmp_path):
    asked = []
    scores = [0.0] * 1000
    _, page = report(
        tmp_path,
        before=evaluation(scores),
        after=evaluation(scores),
        examples=lambda i: asked.append(i) or {"images": [], "question": ""},
        max_examples=5,
    )
    assert asked == [0, 249, 499, 749, 999] and "5 of 1,000 evaluation examples, evenly spaced" in page.text


def test_examples_are_paired_by_id(tmp_path):
    before, after = evaluation([0, 0, 0, 1]), evaluation([1, 1, 1], v1={"id": "v-3"}, v2={"id": "new"})
    _, page = report(tmp_path, before=before, after=after)
    assert "1 wrong → right, 0 right → wrong" in page.text and "2 examples in both evaluations" in page.text
    assert page.text.count("not evaluated") == 1  # "new", before
    before["predictions"][3]["id"] = after["predictions"][1]["id"] = "v-0"  # an id that comes twice
    assert "2 examples in both" in report(tmp_path, before=before, after=after)[1].text


def test_no_interval_where_the_metric_is_no_mean(tmp_path):
    _, page = report(tmp_path, before=None, after=evaluation([0, 1]) | {"accuracy": 0.9})
    assert "0.9000" in page.text and "the metric is not the mean of their scores" in page.text


def test_curves(tmp_path):
    history = [{"step": s, "loss": 1 / s, "mfu": 0.3, "grad_norm": math.nan if s == 2 else 1.0} for s in range(1, 11)]
    history += [{"step": 5, "eval_accuracy": 0.5, "eval_runtime": 3.0}, {"step": 10, "train_loss": 0.1}, {"epoch": 1}]
    html, page = report(tmp_path, history=history)
    titles = [a["aria-label"].partition(" over")[0] for a in page.all("svg", role="img")]
    assert titles == ["Loss", "Gradient norm", "MFU", "eval_accuracy"]
    assert "1 values are NaN or infinite and are left out" in page.text and "30% at step 10" in page.text
    for line in page.all("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(points) == len(line["data-steps"].split()) == len(line["data-values"].split())
        assert all(48 <= x <= 340 and 8 <= y <= 158 for x, y in points)
    long = [{"step": s, "loss": 2.0, "learning_rate": 0.0} for s in range(5000)]
    html, page = report(tmp_path / "long", history=long)
    assert len(page.all("polyline")[0]["points"].split()) == 300 and "up to 17 logged values" in page.text


def test_a_failure_leaves_the_old_report(tmp_path):
    report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    with pytest.raises(KeyError):
        report(tmp_path, after={"metric": "accuracy"})
    with pytest.raises(KeyboardInterrupt):  # while the file is being written
        report(tmp_path, examples=lambda i: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (tmp_path / "report.html").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_statistics():
    # Wilson's interval for 8 of 10 and 0 of 10, as in Brown, Cai and DasGupta (2001)
    assert confidence_interval([1] * 8 + [0] * 2)[:2] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert confidence_interval([0.0] * 10)[:2] == pytest.approx((0, 0.2775), abs=1e-4)
    low, high, method = confidence_interval([0.25, 0.75] * 200)  # standard error 0.0125
    assert (low, high) == pytest.approx((0.4755, 0.5245), abs=0.004) and method.startswith("bootstrap")
    with pytest.raises(ValueError):
        confidence_interval([])
    assert sign_test(0, 0) == 1 and sign_test(3, 3) == 1
    assert sign_test(1, 9) == pytest.approx(22 / 1024) and sign_test(5000, 100) < 1e-6
    assert list(map(format_number, (0, 4e-5, 0.123456, 999, 21573.4, 3.2e7))) == [
        "0", "4e-05", "0.1235", "999", "21,573", "32M"
    ]  # fmt: skip
