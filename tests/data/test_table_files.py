"""Only files below the folder of a table are read, whatever its README, its links and its columns say."""

import os
import shutil
import zipfile

import bad_tables
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_tables import load_pairs

from phi3v.data.images import read_image
from phi3v.data.tables import question_keys, undecoded
from phi3v.errors import InputError


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
