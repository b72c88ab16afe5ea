"""Archives of strangers: nothing is written outside of the folder, and too much or damaged content ends in one line."""

import gzip
import io
import os
import sys
import tarfile
import time

import pytest
from bad_archives import ARCHIVES, GOOD_ARCHIVES, VIDEO, block, chain_of_links, many_empty_files, random_archives
from helpers import fuzz
from hypothesis import given

import convert_ucf101
from convert_ucf101 import InputError, unpack


@pytest.fixture
def place(tmp_path):
    """A folder to unpack in, and a file of the user's beside it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "victim.txt").write_text("mine\n")
    return tmp_path


def unpacked(content, place, **limits):
    """The files in the folder after unpacking. The user's file, and nothing else, must be outside of it."""
    (place / "archive").write_bytes(content)
    try:
        unpack(place / "archive", place / "folder", **limits)
    finally:
        assert sorted(os.listdir(place)) == ["archive", "folder", "victim.txt"]
        assert (place / "victim.txt").read_text() == "mine\n" and os.stat(place / "victim.txt").st_nlink == 1
        found = [os.path.join(at, name) for at, folders, files in os.walk(place / "folder") for name in folders + files]
        assert not any(os.path.islink(path) for path in found)
        files = [path for path in found if not os.path.isdir(path)]
        assert all(os.path.isfile(path) and os.stat(path).st_nlink == 1 for path in files)
    return {os.path.relpath(path, place / "folder") for path in files}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_bad_archive_is_one_line(name, place):
    content, message = ARCHIVES[name]
    started = time.process_time()
    with pytest.raises(InputError) as error:
        unpacked(content, place)
    assert message in convert_ucf101.printable(str(error.value)) and len(str(error.value)) < 600
    assert str(error.value).startswith(f"{place}/archive") and time.process_time() - started < 20


@pytest.mark.parametrize("name", GOOD_ARCHIVES)
def test_good_archives_of_all_kinds_are_unpacked(name, place):
    content, files = GOOD_ARCHIVES[name]
    assert unpacked(content, place) == set(files)
    for path in files:
        assert os.stat(place / "folder" / path).st_size > 0


def test_the_chain_of_links_is_the_attack_that_tarfile_lets_through(place):
    (place / "archive").write_bytes(chain_of_links("../victim.txt"))
    with tarfile.open(place / "archive") as archive:
        try:
            archive.extractall(place / "folder", filter="data")
        except (tarfile.FilterError, OSError):
            pytest.skip("this Python has the repaired filter")
    assert (place / "victim.txt").read_text() == "overwritten\n" or sys.version_info >= (3, 11, 13)


@pytest.mark.slow
def test_limits_can_be_raised(place, capfd):
    content = gzip.compress(block(VIDEO, bytes(70 * 2**20)) + block("train/Run/w.avi") + bytes(1024))
    (place / "source.tar.gz").write_bytes(content)
    for flags, said in (
        ([], "unpacks to more than 0.0"),
        (["--max_unpacked_gib", "0.05"], "raise --max_unpacked_gib"),
        (["--max_unpacked_gib", "1", "--max_members", "1"], "holds more than 1 files and folders: if you trust it"),
        (["--max_unpacked_gib", "1"], "none of the 2 videos can be decoded"),
    ):
        flags = ["--source", str(place / "source.tar.gz"), "--out_dir", str(place / "out"), *flags]
        assert convert_ucf101.main(flags) == 2
        assert said in capfd.readouterr().err
    assert sorted(os.listdir(place)) == ["folder", "source.tar.gz", "victim.txt"]


def test_the_limit_of_bytes_passes_real_data_sets():
    """Videos are compressed already: UCF101 has 13,320 of them, and its archive is about as large as its 6.5 GiB."""
    assert convert_ucf101.MOST_MEMBERS >= 10 * 13_320 and convert_ucf101.MOST_GIB >= 10 * 6.5


def test_many_empty_files_take_linear_time(place, monkeypatch):
    """The work is counted, because the seconds depend on the machine."""
    calls = []
    for name in ("open", "mkdir", "stat", "lstat"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=original, **more: calls.append(1) or f(*args, **more))
    (place / "archive").write_bytes(many_empty_files(2000))
    unpack(place / "archive", place / "folder")
    assert len(calls) < 2100


def test_folders_that_are_one_on_this_file_system(place, monkeypatch):
    """As on a file system that ignores the case of names: the second folder is there, but was not made."""
    mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path: mkdir(str(path).lower()))
    content = block("train/a/1.avi") + block("Train/A/2.avi") + bytes(1024)
    (place / "archive").write_bytes(content)
    with pytest.raises(
        InputError, match="Train/A/2.avi is in it twice, or as a file and as a folder, or also in other"
    ):
        unpack(place / "archive", place / "folder")


def test_the_archive_may_be_no_pipe(place, capfd):
    os.mkfifo(place / "pipe")
    assert convert_ucf101.main(["--source", str(place / "pipe"), "--out_dir", str(place / "out")]) == 2
    assert "is not a file or a folder" in capfd.readouterr().err


@fuzz(60)
@given(content=random_archives())
def test_random_archives(content, tmp_path_factory):
    place = tmp_path_factory.mktemp("random")
    (place / "folder").mkdir()
    (place / "victim.txt").write_text("mine\n")
    try:
        unpacked(content, place)
    except InputError as e:
        assert "\n" not in convert_ucf101.printable(str(e))


@fuzz(60)
@given(content=random_archives())
def test_what_tarfile_reads_of_a_good_archive_is_what_is_unpacked(content, tmp_path_factory):
    place = tmp_path_factory.mktemp("random")
    (place / "folder").mkdir()
    (place / "victim.txt").write_text("mine\n")
    try:
        files = unpacked(content, place)
    except InputError:
        return
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        try:
            named = {os.path.normpath(info.name): info for info in archive if info.isfile()}
        except tarfile.TarError:
            return
        assert named.keys() == files
        for name, info in named.items():
            assert (place / "folder" / name).read_bytes() == archive.extractfile(info).read()
