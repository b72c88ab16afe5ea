"""What comes from outside is printed so that it can neither command a terminal nor hide."""

import time

import pytest
from bad_texts import ORDINARY, UNSEEN

from phi3v.errors import InputError
from phi3v.text import printable


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize("c", UNSEEN, ids=ascii)
def test_what_a_terminal_obeys_and_what_cannot_be_seen_is_escaped(c):
    assert printable(f"a{c}b") == f"a{ascii(c)[1:-1]}b"
    assert str(InputError(f"a{c}b")) == f"a{ascii(c)[1:-1]}b"


def test_a_joiner_is_ordinary_only_between_what_it_joins():
    assert printable("\u2764\ufe0f\ufe0f\u200d\u200d\U0001f525") == "\u2764\ufe0f\\ufe0f\\u200d\\u200d\U0001f525"
    assert printable("a\u200d.b\ufe0f") == "a\\u200d.b\\ufe0f"


def test_line_breaks_stay_where_they_are_asked_for():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    # In an error, only a list has several lines. A line break in a name can't begin a line of its own.
    assert str(InputError("2 problems\n  a\nerror: b")) == "2 problems\n  a\\nerror: b"


def test_a_long_text_takes_no_long_time():
    start = time.process_time()
    for text in (
        "\x1b" * 300_000,
        "\u200d" * 300_000,
        "\U0001f468\u200d" * 150_000,
        "\U0001f3f4" + "\U000e0067" * 300_000,
    ):
        printable(text)
    assert time.process_time() - start < 5
