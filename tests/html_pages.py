"""Writes small reports and reads their HTML."""

from html.parser import HTMLParser

from PIL import Image

from phi3v.report.page import write_html_report

VOID = {"meta", "link", "img", "input", "br"}
SVG = {"path", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its texts outside of style and script. Fails on unclosed tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.texts, self.texts_with_tags = [], [], [], []
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
            self.texts_with_tags.append((self.open[-1] if self.open else "", data))

    def texts_of(self, tag) -> list[str]:
        """The texts directly inside of tags of this name."""
        return [" ".join(text.split()) for of, text in self.texts_with_tags if of == tag]

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
