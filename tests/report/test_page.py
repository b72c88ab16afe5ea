"""The HTML report of a run: its content, and that nothing in it can run code or fetch anything."""

import base64
import io
import os
import re
import sys
from types import SimpleNamespace

import pytest
from html_pages import Page, evaluation, example, report
from PIL import Image

from phi3v.report.page import write_page


def test_the_page_shows_the_results_before_and_after_training(tmp_path):
    html, page = report(tmp_path)
    assert "Result: accuracy" in page.text and "0.5000" in page.text and "0.7500" in page.text
    assert "95% confidence interval 0.1500 to 0.8500 Wilson; 4 examples" in page.text
    assert "+0.2500 95% confidence interval -0.5515 to +0.8848 2 wrong → right, 1 right → wrong" in page.text
    assert [a["data-states"] for a in page.all("article")] == [
        "right changed improved",
        "right changed improved",
        "right",
        "wrong changed worsened",
    ]
    assert "What is shown in 3?" in page.text and "v-3" in page.text
    assert "torchrun train.py" in page.text and "2.14.1" in page.text
    assert [b["data-filter"] for b in page.all("button") if "data-filter" in b] == [
        "all", "wrong", "right", "changed", "improved", "worsened"
    ]  # fmt: skip
    assert "All 4 Wrong 1 Right 3 Changed 3 Improved 2 Worsened 1" in page.text
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


def test_texts_are_escaped_in_the_page(tmp_path):
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
    os.mkfifo(tmp_path / "pipe.jpg")
    unreadable = ["broken.jpg", "none.jpg", "pipe.jpg", ".", "a\0.jpg"]
    images = [
        [tmp_path / "a.png"],
        [{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "b.jpg")}],
        [*(f"{tmp_path}/{name}" for name in unreadable), {"bytes": b"", "path": None}, Image.new("I;16", (9, 9)), None],
        [Image.new("P", (20, 20))] * 20,
    ]

    _, page = report(tmp_path, examples=lambda i: {"images": images[i], "question": "?"})
    sizes = [(int(a["width"]), int(a["height"])) for a in page.all("img")]
    assert sizes[:3] == [(160, 5), (160, 5), (160, 107)] and sizes[3:] == [(9, 9)] + [(20, 20)] * 16
    assert len(page.all("span", **{"class": "none"})) == 7 and "and 4 more" in page.text
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


def test_there_is_no_interval_if_the_metric_is_not_a_mean(tmp_path):
    _, page = report(tmp_path, before=None, after=evaluation([0, 1]) | {"accuracy": 0.9})
    assert "0.9000" in page.text and "the metric is not the mean of their scores" in page.text


def test_the_validation_loss_stands_below_the_metric(tmp_path):
    evaluations = {"before": evaluation([0, 1]), "after": evaluation([0, 1]) | {"loss": 0.25}}
    assert report(tmp_path, **evaluations)[1].text.count("Validation loss 0.2500") == 1
    alone = report(tmp_path, before=None, after=evaluations["after"], history=None)[1]  # as --evaluate_only writes
    assert "2 examples Validation loss 0.2500" in alone.text


def test_a_failure_leaves_the_old_report(tmp_path):
    report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    with pytest.raises(KeyError):
        report(tmp_path, after={"metric": "accuracy"})
    with pytest.raises(KeyboardInterrupt):  # while the file is being written
        report(tmp_path, examples=lambda i: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (tmp_path / "report.html").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def written_page(folder, monkeypatch, **changes) -> Page:
    """A page of a run that trains with LoRA, at step 40 of 120."""
    monkeypatch.setattr(sys, "argv", ["finetune_hf_trainer_nlvr2.py", "--use_lora"])
    training_args = SimpleNamespace(output_dir=str(folder), world_size=1, seed=1)
    about = {"mode": "LoRA", "model": "microsoft/Phi-3.5-vision-instruct"}
    state = SimpleNamespace(global_step=40, max_steps=120, log_history=[{"step": 10, "loss": 1.0}])
    arguments = {"before": evaluation([0.0, 1.0]), "after": None, "about": about, "examples": example, "state": state}
    write_page(training_args, **arguments | changes)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_title_has_task_mode_model_and_date(tmp_path, monkeypatch):
    today = r" · \d{4}-\d\d-\d\d"
    title = written_page(tmp_path, monkeypatch).texts_of("h1")[0]
    assert re.fullmatch(rf"nlvr2 · LoRA · microsoft/Phi-3.5-vision-instruct{today}", title)
    (tmp_path / "my model").mkdir()
    about = {"model": f"{tmp_path}/my model/", "commits": {}}  # as --evaluate_only gives it
    page = written_page(tmp_path, monkeypatch, about=about, state=None, before=None, after=evaluation([1.0]))
    assert re.fullmatch(rf"nlvr2 · evaluation · my model{today}", page.texts_of("h1")[0])
    assert page.all("main") == [{"data-task": "nlvr2"}]


def test_a_stopped_run_has_a_banner(tmp_path, monkeypatch):
    page = written_page(tmp_path, monkeypatch, stopped=["resume with: python x.py --resume_from_checkpoint auto"])
    assert re.search(r"Stopped by a signal at step 40 of 120, \d{4}-\d\d-\d\d \d\d:\d\d", page.text)
    assert "exit status was 75" in page.text and "resume with: python x.py --resume_from_checkpoint auto" in page.text
    assert "There is no evaluation after" not in page.text and "data-ended" in page.all("main")[0]
    failed = written_page(tmp_path, monkeypatch, error=ValueError("memory ran out\n  hf_abcdefghijklmnopqrstuvwxyz"))
    assert "Ended by an error at step 40 of 120" in failed.text and "memory ran out •••" in failed.text
    finished = written_page(tmp_path, monkeypatch, after=evaluation([1.0, 1.0]))
    assert not finished.all("div", **{"class": "notice ended"}) and "data-ended" not in finished.all("main")[0]


def controls(page: Page) -> list[str]:
    return [b["data-filter"] for b in page.all("button") if "data-filter" in b] + [
        o["value"] for o in page.all("option")
    ]


@pytest.mark.parametrize(
    "before, after, wanted",
    [
        (None, None, []),
        (None, [1.0], []),
        (None, [1.0, 1.0], []),
        (None, [0.0, 1.0], ["all", "wrong", "right", "position 1", "score -1"]),  # the lowest score is first already
        ([0.0, 1.0], [1.0, 1.0], ["all", "changed", "improved", "position 1", "change 1"]),
        ([1.0, 0.2, 0.7], [0.0, 0.3, 0.6], ["all", "wrong", "right", "improved", "worsened", "position 1", "score -1",
                                           "change 1", "change -1"]),
    ],
)  # fmt: skip
def test_a_control_is_there_only_if_it_changes_something(tmp_path, before, after, wanted):
    evaluations = {"before": before and evaluation(before), "after": after and evaluation(after)}
    _, page = report(tmp_path, **evaluations)
    assert controls(page) == wanted
    assert bool(page.all("input")) == (len(after or ()) > 1)


def test_values_to_sort_by(tmp_path):
    _, page = report(tmp_path, before=evaluation([0.5, 1, 0]), after=evaluation([0.75, 0, 1]))
    articles = page.all("article")
    assert [float(a["data-score"]) for a in articles] == [0.75, 0, 1]
    assert [float(a["data-change"]) for a in articles] == [0.25, -1, 1]
