"""A file is opened only if it lies in the folder that it must lie in, whatever the path says and links do."""

import copy
import os
import pickle

import pytest

from phi3v.inside import Inside, is_inside, open_file, real_folders


@pytest.fixture
def folder(tmp_path):
    """A folder behind a link, with files, links and a pipe, and a secret beside it."""
    (tmp_path / "disk" / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "disk" / "data-2").write_bytes(b"secret")
    real = tmp_path / "data"
    for name in ("a", "sub/b"):
        (real / name).write_bytes(b"good")
    (real / "in").symlink_to("sub/b")
    (real / "out").symlink_to(tmp_path / "secret")
    (real / "up").symlink_to("..")
    (real / "zero").symlink_to("/dev/zero")
    os.mkfifo(real / "pipe")
    return real


def test_files_of_the_folder_are_opened(folder):
    for name in ("a", "sub/b", "in", "sub/../a", "./a", "sub//b"):
        with open_file(Inside(f"{folder}/{name}", real_folders(folder))) as file:
            assert file.read() == b"good"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out", "the file lies outside of"),
        ("../secret", "does not exist"),  # the folder is a link: this is beside the folder that it leads to
        ("../data-2", "the file lies outside of"),
        ("up/data-2", "the file lies outside of"),
        ("/etc/passwd", "the file lies outside of"),
        ("/proc/self/environ", "the file lies outside of"),
        ("zero", "not a regular file"),
        ("pipe", "not a regular file"),
        ("sub", "not a regular file"),
        ("nowhere", "does not exist"),
        ("a\0", "does not exist"),
        ("a" * 5000, "does not exist"),
        ("\ud800", "does not exist"),
        ("a ", "does not exist"),
        ("file://a", "does not exist"),
    ],
)
def test_nothing_else_is_opened(folder, name, reason):
    with pytest.raises(ValueError, match=reason):
        open_file(Inside(os.path.join(folder, name), real_folders(folder)))


def test_a_file_that_is_swapped_after_the_check_is_not_opened(folder, tmp_path):
    path, other = Inside(f"{folder}/sub/b", real_folders(folder)), tmp_path / "other"
    other.mkdir()
    (other / "b").write_bytes(b"secret")
    (folder / "sub").rename(folder / "away")
    (folder / "sub").symlink_to(other)
    with pytest.raises(ValueError, match="the file lies outside of"):
        open_file(path)
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "other")  # the folder itself is resolved once
    with pytest.raises(ValueError, match="the file lies outside of"):
        open_file(Inside(f"{folder}/b", path.folders))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs_alone(tmp_path):
    for name in ("mine", "other"):
        (tmp_path / f"datasets--a--{name}" / "blobs").mkdir(parents=True)
        (tmp_path / f"datasets--a--{name}" / "blobs" / "0f").write_bytes(b"good")
    snapshot = tmp_path / "datasets--a--mine" / "snapshots" / "0123"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "x").symlink_to("../../../blobs/0f")
    (snapshot / "data" / "y").symlink_to("../../../../datasets--a--other/blobs/0f")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link", snapshot / "data", f"{snapshot}/"):
        path = os.path.join(tmp_path, snapshot, "data")
        assert open_file(Inside(f"{path}/x", real_folders(folder))).read() == b"good"
        with pytest.raises(ValueError, match="lies outside of"):
            open_file(Inside(f"{path}/y", real_folders(folder)))
    # Blobs that are a link themselves lead out as any other link does.
    os.rename(tmp_path / "datasets--a--mine" / "blobs", tmp_path / "moved")
    (tmp_path / "datasets--a--mine" / "blobs").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="lies outside of"):
        open_file(Inside(f"{snapshot}/data/x", real_folders(snapshot)))


def test_a_path_stays_what_it_is_in_other_processes(folder):
    path = Inside(f"{folder}/a", real_folders(folder))
    for other in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path), os.fspath(path)):
        assert other == f"{folder}/a" and other.folders == path.folders and hash(other) == hash(f"{folder}/a")


def test_what_is_inside():
    assert is_inside("/a/b", ("/a",)) and is_inside("/a", ("/a",)) and is_inside("/a", ("/",))
    assert not is_inside("/ab", ("/a",)) and not is_inside("/", ("/a",))
    assert real_folders("/nowhere") == ("/nowhere",)
