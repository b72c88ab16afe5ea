"""Objects of json lists and jsonl files, each with the line where it is."""

import json
import re

import pytest

from phi3v.data import json_rows
from phi3v.errors import BadExamples, InputError


def read(tmp_path, content, skip=False):
    path, bad = tmp_path / "a.json", BadExamples(skip)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = [(where.removeprefix(str(tmp_path)), row) for where, row in json_rows.rows(path, bad)]
    bad.settle(str(path), sum(row is not None for _, row in found))
    return found


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_letters_at_which_splitlines_would_cut(separator, tmp_path):
    value = {"a": f"one{separator}two"}
    line = json.dumps(value, ensure_ascii=False) if separator > "\x7f" else json.dumps(value)
    wanted = [(f"/a.json:{i}", value) for i in (1, 3)]
    assert read(tmp_path, f"{line}\n\n{line}") == wanted == read(tmp_path, f"\ufeff{line}\r\n\r\n{line}\r\n")
    wanted = [("/a.json:1, object 1", value), ("/a.json:3, object 2", value)]
    assert read(tmp_path, f"[{line},\n\n{line}]\n") == wanted


@pytest.mark.parametrize("content", ["[]", " [ ]\n", "", "\n"])
def test_an_empty_file_has_no_rows(content, tmp_path):
    assert read(tmp_path, content) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "a.json:1, object 1: must be an object, not int"),
        ('[{"a": 1},\n{"a": 2},\n3]', "a.json:3, object 3: must be an object"),
        ("[{", "a.json:1, object 1, is not valid JSON: Expecting property name"),
        ('[{"a": 1}\n{"a": 2}]', "a.json:2, object 2, is not valid JSON: there is no ','"),
        ('[{"a": 1},\n]', "a.json:2, object 2, is not valid JSON"),
        ('[{"a": 1}', "a.json:1, object 2, is not valid JSON"),
        ('[{"a": 1}] [2]', "there is more after the end of the list"),
        ('[{"a": 1, "a": 2}]', "object 1: the key 'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        (b'[{"a":\n"\xff"}]', "a.json:2 is not UTF-8"),
        ('{"a": 1}\n{"a"\n', "a.json:2: is not valid JSON: not a JSON object"),
        ('{\n"a": 1\n}\n', "write a list of objects, or each object in one line"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "a.json:2: is not valid JSON: not UTF-8"),
        ('{"a": 1}\n[2]\n', "a.json:2: must be an object, not list"),
        ('{"a": 1, "a": 2}\n', "a.json:1: is not valid JSON: the key 'a' occurs twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, content)


def test_bad_lines_are_left_out(tmp_path):
    found = read(tmp_path, '{"a": 1}\n{\n3\n{"a": 2}\n', skip=True)
    assert [row for _, row in found] == [{"a": 1}, None, None, {"a": 2}]
