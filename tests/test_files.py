"""Files appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from phi3v import files
from phi3v.errors import InputError
from phi3v.files import read_json


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_partial_file(tmp_path):
    path = tmp_path / "a"
    with files.replacing(path, several_writers=True) as one, files.replacing(path, several_writers=True) as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]  # the outer block ends last


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: events.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: events.append("replace") or replace(*paths))
    files.write_json(tmp_path / "a.json", {"b": "ü", "a": 1})
    assert events == ["fsync", "replace"] and files.read_json(tmp_path / "a.json") == {"b": "ü", "a": 1}
    with files.replacing(tmp_path / "b", durable=False) as partial:
        partial.touch()
    assert events == ["fsync", "replace", "replace"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out"
    with files.replacing_folder(path) as partial:
        assert os.listdir(partial) == [files.MARK]
        (partial / "a").write_text("1")
        assert not path.exists()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(path) == ["a"]
    with pytest.raises(RuntimeError), files.replacing_folder(tmp_path / "other") as partial:
        (partial / "a").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to a folder"])
def test_what_is_not_ours_is_never_deleted(kind, tmp_path):
    mine, partial = tmp_path / "mine", tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if kind == "folder":
        mine.rename(partial)
    elif kind == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(mine if "folder" in kind else "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="out.partial is in the way, and was not made by this program"):
        with files.replacing_folder(tmp_path / "out", {"a"}):
            pass
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_process_left_is_replaced(tmp_path):
    for left in ([files.MARK, "anything"], ["a"], []):  # the others: of an earlier version
        (tmp_path / "out.partial").mkdir()
        for name in left:
            (tmp_path / "out.partial" / name).touch()
        with files.replacing_folder(tmp_path / "out", {"a"}) as partial:
            assert os.listdir(partial) == [files.MARK]
        assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")


def test_two_processes_do_not_fill_one_folder(tmp_path):
    with files.replacing_folder(tmp_path / "out") as partial:
        (partial / "a").touch()
        with pytest.raises(InputError, match="another process is writing to .*out.partial: wait until it ends"):
            with files.replacing_folder(tmp_path / "out"):
                pass
        assert (partial / "a").exists()
    assert os.listdir(tmp_path / "out") == ["a"]


def test_the_folder_may_be_the_present_one(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with files.replacing_folder(".") as partial:
        (partial / "a").touch()
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == ["a"]


def test_others_may_read_weights_as_they_read_the_config(tmp_path):
    for name, mode in (("config.json", 0o644), ("model.safetensors", 0o600)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    files.let_others_read(tmp_path)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


def test_json_that_is_none_is_an_error_with_the_files_name(tmp_path):
    path = tmp_path / "a.json"
    for content, said in {
        b"{": "not valid JSON",
        b"[" * 200_000: "nested too deeply",
        b'"\xff"': "not valid JSON",
    }.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=said) as error:
            read_json(path)
        assert str(path) in str(error.value)
    path.unlink()
    os.mkfifo(path)
    for irregular in (path, tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="not a regular file"):
            read_json(irregular)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_link_to_an_empty_folder_leads_to_the_new_one(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to("large_disk")
    with files.replacing_folder(tmp_path / "out") as partial:
        (partial / "a").touch()
    assert (tmp_path / "out").is_symlink() and os.listdir(tmp_path / "large_disk") == ["a"]


def test_a_folder_that_can_not_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(InputError, match="a file system is mounted: choose a new folder in it, such as .*/new"):
        with files.replacing_folder(tmp_path):
            raise AssertionError
