"""Text is read as UTF-8, and errors say what is wrong with a file and where."""

import bad_inputs
import pytest

from phi3v.data.text_files import lines_of, parse_json, text_of
from phi3v.errors import InputError


def test_a_path_that_is_not_a_regular_file_is_refused(tmp_path):
    bad_inputs.write_images_folder(tmp_path)
    for path, message in bad_inputs.NOT_REGULAR:
        for read in (text_of, lambda path: list(lines_of(path))):
            with pytest.raises(InputError, match=message):
                read(tmp_path / path)


def test_lines_are_counted_and_blank_ones_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf1\n\n \t\r\n2\r\n\xe2\x80\xa8\n3")  # U+2028 ends no line
    assert list(lines_of(tmp_path / "a.jsonl")) == [(1, b"1\n"), (4, b"2\r\n"), (5, b"\xe2\x80\xa8\n"), (6, b"3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a JSON object .* at column 2"),
        (b'{"a": "\xff"}', "not UTF-8 .* at byte 8"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "more digits than can be read"),
        (b"{\0}", "NUL bytes"),
    ],
)
def test_what_is_no_json_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_json(line)
