"""The Jinja environment that renders the page and the model card, with the filters of their templates."""

import base64
import hashlib
import shlex
from pathlib import Path

import jinja2

from ..text import markdown_code, markdown_text, printable

LONGEST_TEXT = 2000  # characters; a longer text is cut


def format_number(value: float) -> str:
    """Four significant digits: 0.1235, 21,573 or 32M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cut(text) -> str:
    text = str(text)
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters)"


def shown_text(value) -> str:
    """The text that a reader of the page sees for a value."""
    return printable(str(value), keep="\n\t")


def _escaped(value):
    """What the templates apply to each value before they show it: names from outside may hold codes of a terminal."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return shown_text(value) if is_text else value


def _csp_hash(script: str) -> str:
    """The hash by which the page's content security policy allows this script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(["html.jinja"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_escaped,
)
environment.filters.update(number=format_number, cut=_cut, csp_hash=_csp_hash)
environment.filters.update(markdown=markdown_text, code=markdown_code, line=printable, quote=shlex.quote)
