"""Examples in a file come back as they were, in every process of a node, and only one of these reads them."""

import json
import os
import pickle
import resource
import tempfile
import tracemalloc

import bad_inputs
import pytest

from phi3v.data import stored_lines
from phi3v.data.annotations import read_conversations, store_conversations
from phi3v.data.stored_lines import StoredLines
from phi3v.errors import BadExamples, InputError

LINES = [b"first", b"", b"third \xe2\x80\xa8 line\n", b"\xff\0", b"x" * 5000]


def upper(line: bytes) -> bytes:
    return line.upper()


WANTED = list(map(upper, LINES))


@pytest.fixture
def folder(tmp_path):
    bad_inputs.write_images_folder(tmp_path)
    return tmp_path


def test_a_stored_list_is_like_a_list():
    stored = StoredLines(iter(LINES), upper)
    for part, wanted in (
        (stored, WANTED),
        (stored[1:], WANTED[1:]),
        (stored[:None], WANTED),
        (stored[4:0:-2], WANTED[4:0:-2]),
        (stored[1:][-2:], WANTED[-2:]),
        (stored.select([3, 0, 3]), [WANTED[3], WANTED[0], WANTED[3]]),
        (stored[1:].select([2]), [WANTED[3]]),
        (stored[9:], []),
    ):
        for copy in (part, pickle.loads(pickle.dumps(part))):
            assert list(copy) == wanted and len(copy) == len(wanted) and bool(copy) == bool(wanted)
            assert [copy[i] for i in range(-len(wanted), 0)] == wanted
            for i in (len(wanted), -len(wanted) - 1):
                with pytest.raises(IndexError):
                    copy[i]


def test_examples_come_back_as_they_were_read(folder, capsys):
    images = folder / "images"
    (images / os.fsdecode(b"\xff.png")).write_bytes(b"")
    turn = bad_inputs.TURN
    examples = [
        {"id": "a", "conversations": [turn]},
        {
            "id": 10**4000,
            "conversations": [turn, {"user": "no\u2028images\u0085 \U0001f642 \x7f", "assistant": "\t1e5"}],
        },
        {"conversations": [turn | {"images": []}]},
        {"id": None, "conversations": [turn | {"images": ["a.png", "./a.png", "folder//c.png"]}]},
        {"id": "ë", "source": [[["s"]]], "conversations": [turn | {"images": ["\udcff.png"]}]},
        {"id": "deep", "conversations": [turn], "more": json.loads("[" * 500 + "]" * 500)},
        {"id": "inside", "conversations": [turn | {"weight": 0.1, "none": None}], "nan": float("nan")},
    ]
    lines = [json.dumps(example, ensure_ascii=i % 2 == 0 or i == 4) for i, example in enumerate(examples)]
    path = folder / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    for follow in (False, True):
        wanted = read_conversations(path, images, follow_links=follow)
        said = capsys.readouterr().out
        stored = store_conversations(path, images, follow_links=follow)
        assert capsys.readouterr().out == said and "fields that are not used" in said
        for found in (stored, pickle.loads(pickle.dumps(stored))):
            assert list(found) == wanted and [list(row) for row in found] == [["id", "conversations"]] * len(wanted)
            for row, other in zip(found, wanted, strict=True):
                assert [list(turn) for turn in row["conversations"]] == [list(turn) for turn in other["conversations"]]
                for turn, same in zip(row["conversations"], other["conversations"], strict=True):
                    assert list(map(type, turn["images"])) == list(map(type, same["images"]))
                    assert follow or [i.folders for i in turn["images"]] == [i.folders for i in same["images"]]
    path.write_text("changed")  # after it was read
    assert list(stored) == wanted and wanted[2]["id"] == f"{path}:5"


@pytest.mark.parametrize("name", bad_inputs.ANNOTATIONS)
def test_the_errors_are_those_of_the_reader(name, folder):
    (folder / "a.jsonl").write_bytes(bad_inputs.ANNOTATIONS[name][0])
    messages = []
    for read in (read_conversations, store_conversations):
        with pytest.raises(InputError) as error:
            read(folder / "a.jsonl", folder / "images")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_examples_that_are_left_out_are_the_same(folder):
    path, seen = folder / "a.jsonl", []
    path.write_bytes(bad_inputs.line(id="1") + b"{\n" + bad_inputs.line(id="2") + bad_inputs.line(id="1"))
    for read in (read_conversations, store_conversations):
        bad = BadExamples(skip=True)
        seen.append(([example["id"] for example in read(path, folder / "images", bad)], bad.left_out))
    assert seen[0] == seen[1] and seen[0][0] == ["1", "2"] and len(seen[0][1]) == 2


def test_examples_are_not_in_memory_and_leave_no_file(folder, monkeypatch):
    (folder / "tmp").mkdir()
    for i in range(300):
        (folder / "images" / f"{i}.png").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    text = "Which? " * 100
    with open(folder / "a.jsonl", "wb") as file:
        for i in range(3000):
            file.write(bad_inputs.line(id=str(i), conversations=[bad_inputs.TURN | {"user": f"{text}{i}"}]))
    tracemalloc.start()
    try:
        stored = store_conversations(folder / "a.jsonl", folder / "images")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(stored) == 3000 and stored.in_memory is None
    assert held < 2**18 and peak < 4 * 2**20  # as a list, 2.5 MiB
    assert os.listdir(folder / "tmp") == [] and len(pickle.dumps(stored)) < 2000


@pytest.fixture
def small_files(tmp_path, monkeypatch):
    """Files of this process can have 4 KiB, and examples are written in pieces of 1000 bytes."""
    monkeypatch.setattr(stored_lines, "BUFFER", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored_lines._tell_once.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("count", [30, 10, 9, 300])  # the disk is full at a line, at the end, never, and early
def test_a_full_disk_leaves_the_examples_in_memory(count, small_files, capfd):
    lines = [b"%03d" % i + b"." * 397 for i in range(count)]
    stored = StoredLines(iter(lines), upper)
    again = StoredLines(iter(lines), upper)
    said = capfd.readouterr().out
    assert (stored.in_memory is None) == (count == 9) and said.count("\n") == (count != 9)
    assert "examples can't be written to a temporary file (File too large), so every process" in said or count == 9
    assert list(stored) == list(again) == list(pickle.loads(pickle.dumps(stored[:]))) == lines


def test_without_a_folder_or_proc_the_examples_are_in_memory(monkeypatch, tmp_path, capsys):
    stored_lines._tell_once.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        stored = StoredLines(iter(LINES), upper)
    assert stored.in_memory is not None and list(stored) == WANTED
    assert capsys.readouterr().out.count("(No such file or directory)") == 1
    monkeypatch.setattr(stored_lines, "_path", lambda file: str(tmp_path / "proc"))
    stored = StoredLines(iter(LINES), upper)
    assert stored.in_memory is not None and list(pickle.loads(pickle.dumps(stored))) == WANTED
    assert capsys.readouterr().out == ""


def test_another_file_is_not_taken_for_the_right_one(tmp_path):
    stored, other = StoredLines(iter(LINES), upper), StoredLines(iter(LINES), upper)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"short")
    for path in (stored_lines._path(other.file), str(tmp_path / "pipe"), str(tmp_path / "short"), "/proc/0/fd/1", "/"):
        copy = pickle.loads(pickle.dumps(stored))
        copy.path = path
        assert not copy.open()
        with pytest.raises(InputError, match="can't be opened that another process"):
            copy[0]
