"""Tables that cannot be used are refused with the reason, and nothing outside of their folder is read."""

import os
import shutil
import socket
import zipfile

import bad_tables
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import png_cell

from phi3v.data.images import image_size, read_image
from phi3v.data.tables import TEXTS_ABOUT_IMAGES, load_table, question_keys, undecoded, without_seen_images
from phi3v.errors import BadExamples, InputError
from phi3v.training.feature_files import FeatureCache


@pytest.mark.parametrize(
    ("repo", "config", "split", "columns", "message"),
    [
        ("a/nowhere", None, "train", {}, "holds no folder nowhere"),
        ("a/the_cauldron", "chartqa", "train", {}, "can't be loaded"),
        ("a/the_cauldron", "nlvr2", "test", {}, "has no split 'test', only train"),
        ("a/the_cauldron", "nlvr2", "train[600:]", {}, "is empty: it has 503 rows"),
        ("a/the_cauldron", "nlvr2", "train", {"image": str}, "has no column 'image', only images, texts"),
        ("a/the_cauldron", "nlvr2", "train", {"images": [str]}, "column 'images' is List"),
        ("a/the_cauldron", "nlvr2", "train", {"images": datasets.Image}, "column 'images' is List"),
        ("a/the_cauldron", "nlvr2", "train", {"texts": [{"question": str}]}, "column 'texts' is List"),
    ],
)
def test_a_table_that_cannot_be_used(repo, config, split, columns, message, toy_tables):
    with pytest.raises(InputError, match=message):
        load_table(repo, config, split, str(toy_tables), columns)


def load_pairs(folder, split="train"):
    return load_table("HuggingFaceM4/the_cauldron", "nlvr2", split, str(folder), TEXTS_ABOUT_IMAGES)


@pytest.fixture
def no_network(monkeypatch):
    """Fails if something connects, or asks fsspec for a file."""

    def fail(*args, **kwargs):
        raise AssertionError(f"connects or opens: {args} {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(png_cell(1)["bytes"])
    with zipfile.ZipFile(f"{path}.zip", "w") as file:
        file.write(path, "a.png")
    return path


def test_images_of_a_table_lie_below_its_folder(tmp_path, secret, no_network):
    folder, paths = tmp_path / "the_cauldron", bad_tables.paths_outside(secret)
    file = bad_tables.cauldron_file(tmp_path, [bad_tables.image_in(path) for path in paths.values()])
    (folder / "link.png").symlink_to(secret)
    (folder / "away").symlink_to(tmp_path)
    table = load_pairs(tmp_path)
    for row, name in enumerate(paths):
        (image,) = undecoded(table, row)["images"]
        for read in (read_image, image_size, FeatureCache(tmp_path, 1, 1, None).path):
            with pytest.raises(InputError, match=rf"row {row} of {file.name}\): its image 1 can't be read") as error:
                read(image)
            assert "\x1b" not in str(error.value) and "\n" not in str(error.value), name
        with pytest.raises(InputError, match=rf"row {row} of {file.name}\): its image can't be read"):
            without_seen_images(table.select([row]), table.select([row]))
    # What lies below is read, also by its whole path.
    for name in ("a.png", "pictures/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(secret.read_bytes())
    inside = ["a.png", str(folder / "a.png"), "pictures/a.png", "./pictures/../a.png"]
    bad_tables.cauldron_file(tmp_path, [bad_tables.image_in(path) for path in inside])
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "the_cauldron").symlink_to(folder)
    for data_dir in (tmp_path, tmp_path / "link"):
        table = load_pairs(data_dir)
        assert all(image_size(undecoded(table, row)["images"][0]) == (30, 20) for row in range(len(inside)))


@pytest.mark.parametrize("name", bad_tables.READMES)
def test_a_readme_leads_nowhere(name, tmp_path, no_network):
    outside = tmp_path / "outside"
    bad_tables.cauldron_file(outside)
    folder = tmp_path / "data" / "the_cauldron"
    folder.mkdir(parents=True)
    readme = bad_tables.READMES[name].replace("{outside}", str(outside / "the_cauldron"))
    (folder / "README.md").write_text(f"---\n{readme}---\n")
    (folder / "the_cauldron.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    (folder / "nlvr2.py").write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    with pytest.raises(InputError, match=r"can't be loaded: there is no file .*nlvr2/train-\*.parquet"):
        load_pairs(folder.parent)
    bad_tables.cauldron_file(folder.parent)  # with files of its own, these are read
    assert load_pairs(folder.parent)[0]["texts"] == [{"user": "Is it?", "assistant": "no"}]
    assert not (tmp_path / "started").exists() and not list(tmp_path.rglob("started"))


@pytest.mark.parametrize(
    "way", ["a link", "a link to a folder", "a pipe", "a device", "a folder", "an address", "a zip"]
)
def test_files_of_a_table_are_regular_files_below_its_folder(way, tmp_path, no_network):
    path, outside = bad_tables.cauldron_file(tmp_path), tmp_path / "outside"
    own = path.parent
    own.rename(outside)
    if way != "a link to a folder":
        own.mkdir()
    if way == "a link":
        path.symlink_to(outside / path.name)
    elif way == "a link to a folder":
        own.symlink_to(outside)
    elif way == "a pipe":
        os.mkfifo(path)
    elif way == "a device":
        path.symlink_to("/dev/zero")
    elif way == "a folder":
        path.mkdir()
    elif way == "an address":
        shutil.copy(outside / path.name, own / "train-x::http.parquet")
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.write(outside / path.name)
    said = {
        "a pipe": "is not a regular file",
        "a folder": "is not a regular file",
        "an address": "rename the file",
        "a zip": "is damaged at its row 0",
    }
    with pytest.raises(InputError, match=said.get(way, "is a link out of .*the_cauldron: put the file itself there")):
        load_pairs(tmp_path)


def test_files_right_in_the_folder_are_found(tmp_path):
    path = bad_tables.cauldron_file(tmp_path)
    for other in ("nlvr2/train.parquet", "train-0.parquet", "train.parquet"):
        path = path.rename(tmp_path / "the_cauldron" / other)
        assert len(load_pairs(tmp_path)) == 1
    path.rename(path.with_name("test.parquet"))
    with pytest.raises(InputError, match="can't be loaded: there is no file"):
        load_pairs(tmp_path)


@pytest.mark.parametrize("kind", ["Audio", "Video", "Pdf", "Nifti", "Image"])
def test_columns_that_claim_to_be_of_another_type_are_plain(kind, tmp_path, secret, no_network):
    """`datasets` opens what the columns of these types name as soon as a row is read."""
    path = bad_tables.image_in(str(secret))["images"][0]
    claim, cell = {"_type": kind}, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    inner = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string(), "more": cell}))
    more = {"user": "Is it?", "assistant": "no", "more": path | {"path": "http://127.0.0.1:9/a"}}
    claimed = {"feature": {name: {"dtype": "string", "_type": "Value"} for name in ("user", "assistant")}}
    claimed = {"feature": claimed["feature"] | {"more": claim}, "_type": "List"}
    bad_tables.cauldron_file(
        tmp_path, other=(cell, claim, path), text=(pa.string(), claim, str(secret)), texts=(inner, claimed, [more])
    )
    table = load_pairs(tmp_path)
    assert not isinstance(table.features["text"], datasets.Image) and table["text"][0] == str(secret)
    assert question_keys(table, "pairs") == [(0, 0)] and table["texts"][0][0]["more"] == more["more"]
    row = undecoded(table, 0)
    assert row["texts"][0]["more"]["path"].startswith("http")
    with pytest.raises(InputError, match="lies outside of"):
        read_image(row["other"])


@pytest.mark.parametrize(
    "metadata", [b"no json", b"[" * 100_000, b'{"info": {"features": {"images": {"_type": "Value", "dtype": "x"}}}}']
)
def test_what_a_file_says_of_its_columns_is_not_looked_at(metadata, tmp_path):
    path = bad_tables.cauldron_file(tmp_path)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert read_image(undecoded(load_pairs(tmp_path), 0)["images"][0]).size == (30, 20)


def test_unreadable_images_are_an_error_or_left_out(tmp_path):
    bad, path = {"bytes": b"no image", "path": "a.png"}, None
    rows = [bad_tables.GOOD | {"images": images} for images in ([bad], [png_cell(3)], [None], None, [png_cell(4), bad])]
    path = bad_tables.cauldron_file(tmp_path, rows)
    table = load_pairs(tmp_path)
    for train, evaluation in ((table, table.select([1])), (table.select([1]), table)):
        with pytest.raises(InputError, match=rf"row 0 \(row 0 of {path.name}\): its image can't be read"):
            without_seen_images(train, evaluation)
    kept = without_seen_images(table, table.select([1]), BadExamples(skip=True))
    assert kept["row_in_split"] == [0, 2, 3, 4]  # training leaves them out, with their names
    for row in (0, 2, 3):
        with pytest.raises(InputError, match=rf"row {row} .*: its image 1 can't be read"):
            read_image(undecoded(table, row)["images"][0])
