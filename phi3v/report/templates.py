"""The Jinja environment that renders the page and the model card, with the filters of their templates."""

import base64
import hashlib
from pathlib import Path

import jinja2

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


def _cell(value) -> str:
    """The value as one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


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
)
environment.filters.update(number=format_number, cut=_cut, csp_hash=_csp_hash, cell=_cell)
