"""Reads what a page of `write_html_report` shows, for a comparison of runs: curves, settings and pictures."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from ..errors import InputError
from ..files import open_regular
from .charts import Curve

LARGEST_PAGE = 1 << 30  # bytes


@dataclass
class SavedPage:
    """What a page of `write_html_report` shows; of one that earlier versions wrote, too.

    task: the name of the task, or None; ended_early: whether the run was stopped or has failed.
    curves: by the title of their chart; tables: (name, value) of the settings, by the title of the table.
    examples: of each example in the order of the page, "id", "question", "images" and "num_more".
    """

    task: str | None = None
    ended_early: bool = False
    curves: dict[str, Curve] = field(default_factory=dict)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    examples: list[dict] = field(default_factory=list)


def read_page(path: Path) -> SavedPage:
    """Raises InputError if it can't be read."""
    try:
        with open_regular(path) as file:
            html = file.read(LARGEST_PAGE).decode("utf-8", errors="replace")
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror}") from None
    reader = _PageReader()
    reader.feed(html)
    reader.close()
    return reader.page


class _PageReader(HTMLParser):
    """Collects what a `SavedPage` holds. The texts are those that a reader of the page sees."""

    TEXTS = {"h1", "summary", "th", "td"}

    def __init__(self):
        super().__init__()
        self.page, self.chart, self.table, self.name = SavedPage(), "", {}, ""
        self.text, self.example, self.in_main, self.holder = None, None, False, None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        kind = (attributes.get("class") or "").split()
        if tag == "main":
            self.page.task = attributes.get("data-task")
            self.page.ended_early = "data-ended" in attributes
        elif tag == "svg" and attributes.get("role") == "img":
            self.chart = (attributes.get("aria-label") or "").partition(" over steps: ")[0]
        elif tag == "polyline":
            self._add_curve(attributes)
        elif tag == "details":
            self.table = {}
        elif tag == "article":
            self.example = {"id": "", "question": "", "images": [], "num_more": 0}
            self.page.examples.append(self.example)
        elif tag == "img" and self.example is not None:
            size = [attributes.get(name) or "" for name in ("width", "height")]
            if (attributes.get("src") or "").startswith("data:image/jpeg;base64,") and all(map(str.isdecimal, size)):
                self.example["images"].append({"uri": attributes["src"], "width": int(size[0]), "height": int(size[1])})
        elif tag == "span" and self.example is not None and "none" in kind:
            self.example["images"].append(None)
        elif tag == "p" and self.example is not None and (names := {"question", "id"} & set(kind)):
            self.text, self.holder = [], names.pop()
        if tag in self.TEXTS:
            self.text = []

    def handle_data(self, data):
        if self.text is not None:
            self.text.append(data)
        elif self.example is not None and (more := re.fullmatch(r"and (\d+) more", data.strip())):
            self.example["num_more"] = int(more[1])

    def handle_endtag(self, tag):
        if tag == "article":
            self.example = None
        if self.text is None or tag not in {*self.TEXTS, "p"}:
            return
        text, self.text = "".join(self.text), None
        if tag == "p" and self.example is not None and self.holder:
            self.example[self.holder], self.holder = text, None
        elif tag == "h1" and self.page.task is None:  # earlier versions wrote the script's name
            if found := re.fullmatch("finetune hf trainer (.*)", text):
                self.page.task = found[1].replace(" ", "_")
        elif tag == "summary":
            self.table = self.page.tables.setdefault(re.sub(r" \(\d+\)$", "", text), {})
        elif tag == "th":
            self.name = text
        elif tag == "td":
            self.table[self.name] = text

    def _add_curve(self, attributes: dict):
        try:
            steps = [float(step) for step in attributes["data-steps"].split()]
            values = [_number(text) for text in attributes["data-values"].split()]
        except (KeyError, ValueError, AttributeError):
            return
        name = attributes.get("data-name") or self.chart
        if steps and len(steps) == len(values):
            self.page.curves[name] = Curve(name, steps, values)


def _number(text: str) -> float:
    """The value of a label of a chart, such as 0.1235, 21,573, 32M or 30%."""
    factor = {"%": 0.01, "M": 1e6}.get(text[-1:], 1)
    return float(text.rstrip("%M").replace(",", "")) * factor
