"""Rows of tables: what their writer meant, or an error with the line, never a field that is cut or swallows rows."""

import csv
import io
import re
import time

import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data import csv_rows
from phi3v.errors import BadExamples, InputError

HEADER = "image,question,answer\n"
ROWS = "".join(f"{i}.png,What {i}?,A {i}\n" for i in range(15))


def read(tmp_path, content, name="a.csv", skip=False, is_image=lambda name: name.endswith(".png")):
    """The rows that can be used, by the line where they start, and what was left out."""
    path, bad = tmp_path / name, BadExamples(skip)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(csv_rows.rows(path, bad, is_image))
    used = {int(where.rpartition(":")[2]): row for where, row in found if row is not None}
    bad.settle(str(path), len(used))
    return used, bad.left_out


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        # the number of fields
        (
            HEADER + "a.png,What, then?,A cat\n" + ROWS,
            2,
            "the row has 4 fields, but the header has 3: ['a.png', 'What'",
        ),
        (HEADER + ROWS + "a.png,What?\n", 17, "the row has 2 fields"),
        (HEADER + "\n\na.png,What?,A cat,\n", 4, "the row has 4 fields"),
        (HEADER + ' \na.png,"a\nb",c\n', 2, "the row has 1 fields"),
        (HEADER + 'a.png, "What, then?",A cat\n', 2, "the row has 4 fields"),
        # quotes
        (HEADER + 'a.png,How wide?,"5 inches\n' + ROWS + 'b.png,How wide?,6"\n', 2, "closes in line 18"),
        (HEADER + 'a.png,How wide?,"5 inches\nb.png,How wide?,6"\n', 2, "closes in line 3"),
        (HEADER + 'a.png,"How wide?,5 inches\n' + ROWS, 2, "quotes of this row are wrong (unexpected end of data)"),
        (HEADER + ROWS + 'a.png,How wide?,"5 inches\n', 17, "quotes of this row are wrong (unexpected end of data)"),
        (HEADER + 'a.png,How wide?,"5 inches\n' + ROWS + 'b.png,"What, then?",x\n', 2, "quotes of this row are wrong"),
        (HEADER + 'a.png,"5" wide?,yes\n' + ROWS, 2, "quotes of this row are wrong (',' expected after '\"')"),
        (HEADER + '"a.png","How?","5 inches\n"b.png","How?","6"\n', 2, "quotes of this row are wrong"),
        (HEADER + 'a.png,What?,"two\nlines"\nb.png,How wide?,"5\nc.png,How wide?,6"\n', 4, "closes in line 5"),
        (HEADER + ',Who?,"He\n,Where?,There"\n', 2, "closes in line 3"),
    ],
)
def test_a_row_that_is_not_what_was_meant(content, line, message, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert str(error.value).split("\n  ")[-1 if "problems" in str(error.value) else 0].startswith(f"{tmp_path}/a.csv:")
    assert f"a.csv:{line}: " in str(error.value) and message in str(error.value)


def test_rows_that_a_quote_has_swallowed_are_read_when_the_bad_row_is_left_out(tmp_path):
    content = HEADER + 'a.png,How wide?,"5 inches\n' + ROWS + 'b.png,How wide?,6"\n'
    used, left_out = read(tmp_path, content, skip=True)
    assert list(used) == list(range(3, 19)) and used[3] == {"image": "0.png", "question": "What 0?", "answer": "A 0"}
    assert used[18]["answer"] == '6"' and len(left_out) == 1 and "a.csv:2: " in left_out[0]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("question,answer,image", ["What?", "First a cat.\nThen, a dog", "a.png"]),
        ("question,image,answer", ["Look:\nok?", "a.png", "yes"]),
        ("image,question,answer", ["a.png", "Which?", "One, two\nthree, four"]),
        ("image,question,answer", ["a.png", "Files:\nb.png\nc.png", "yes"]),
        ("image,question,answer", ["", "no image, but\ntwo lines", "yes"]),
    ],
)
def test_fields_of_several_lines_are_read(header, row, tmp_path):
    file = io.StringIO()
    csv.writer(file).writerows([header.split(","), row])
    used, left_out = read(tmp_path, file.getvalue())
    assert list(used.values()) == [dict(zip(header.split(","), row, strict=True))] and not left_out


def test_lines_without_content_are_no_rows(tmp_path):
    used, left_out = read(tmp_path, "\n\n" + HEADER + "a.png,What?,A cat\n,,\n\n,,\n")
    assert list(used) == [4] and not left_out


def test_images_without_an_extension_are_known_by_their_files(tmp_path):
    content = HEADER + 'one,How wide?,"5\ntwo,How wide?,6"\n'
    assert len(read(tmp_path, content)[0]) == 1
    with pytest.raises(InputError, match="closes in line 3"):
        read(tmp_path, content, is_image={"one", "two"}.__contains__)


@pytest.mark.parametrize(
    "answer",
    [
        '5" wide',
        "two\nlines",
        "a, b\nc, d, e",
        "pen,1,2\ncup,3,4\n",
        "x" * 200_000,
        "",
        ' "b" ',
        "a\u2028b\x85c",
        "\r\n,",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV", ".Tsv"])
def test_every_answer_can_be_written(answer, suffix, tmp_path):
    file = io.StringIO(newline="")
    delimiter = csv_rows.DELIMITERS[suffix.lower()][0]
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["image", "question", "answer"], ["a.png", "What?", answer], ["b.png", answer, "no"]])
    used, _ = read(tmp_path, "\ufeff" + file.getvalue(), f"a{suffix}")
    assert [row["answer"] for row in used.values()] == [answer, "no"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,question,answer," + ",".join(map(str, range(100_000))) + ",7\n", "the column '7' is there twice"),
        ("image,question\n", "no column answer"),
        ("", "no column image, question, answer"),
        ("image;question;answer\n", "with a comma between them"),
        ("image,question,answer,answer\n", "the column 'answer' is there twice"),
        ('image,"question,answer\n', "a.csv:1: the quotes"),
        ("image,question,answer\n".encode("utf-16"), "is UTF-16"),
        (HEADER.encode() + b"a.png,What?,\xff\n", "a.csv:2 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_such_a_table(header, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, header)


@fuzz(300)
@given(st.lists(st.sampled_from(["a.png", ",", '"', "\n", " ", "x", "b.png,Q?,A\n", 'c.png,"Q, q",A\n']), max_size=25))
def test_every_line_is_read_or_named(tmp_path_factory, pieces):
    """Whatever quotes and commas a table has, a field that is used never holds another row."""
    used, _ = ({}, None)
    try:
        used, _ = read(tmp_path_factory.mktemp("fuzzed"), HEADER + "z.png,Q?,A\n" + "".join(pieces), skip=True)
    except InputError as e:
        assert "none of the" in str(e)
    for row in used.values():
        for field in row.values():
            assert not re.search(r"\n[abc]\.png,[^,\n]+,[^,\n]+(\n|$)", field)


def test_quotes_that_swallow_all_rows_take_linear_time(tmp_path):
    """Each row opens a quote, as it closes the one before, so that every record goes on to the end of the file."""
    path = tmp_path / "a.csv"
    path.write_text("image,question,answer\n" + '1.png",q,"y\n' * 30_000)
    started = time.process_time()
    with pytest.raises(InputError, match=r"a.csv:\d+: the quotes of this row and of many before it are wrong"):
        list(csv_rows.rows(path, BadExamples(), lambda name: False))
    assert time.process_time() - started < 20


def test_many_columns_take_linear_time(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,question,answer," + ",".join(f"c{i}" for i in range(100_000)) + "\n")
    started = time.process_time()
    assert list(csv_rows.rows(path, BadExamples(), lambda name: False)) == []
    path.write_text(f"a,{'x' * 5000}\n")
    with pytest.raises(InputError, match="there is no column image, question, answer, only ") as error:
        list(csv_rows.rows(path, BadExamples(), lambda name: False))
    assert len(str(error.value)) < 1000 and time.process_time() - started < 10
