"""Tables of strangers: parquet files and folders that name files and addresses elsewhere."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import png_cell

from phi3v.data.tables import TEXTS_ABOUT_IMAGES, load_table

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXTS = pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()}))
GOOD = {"images": [png_cell(0)], "texts": [{"user": "Is it?", "assistant": "no"}]}


def cauldron_file(folder: Path, rows: Sequence[dict] = (GOOD,), name: str = "train-00000-of-00001", **more) -> Path:
    """A file of the_cauldron (nlvr2) in `folder`. more: further columns: (type, claimed feature, value)."""
    schema, claimed = {"images": pa.list_(IMAGE), "texts": TEXTS}, {}
    schema |= {column: type for column, (type, _, _) in more.items()}
    claimed |= {column: feature for column, (_, feature, _) in more.items()}
    rows = [row | {column: value for column, (_, _, value) in more.items()} for row in rows]
    path = folder / "the_cauldron" / "nlvr2" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"images": {"feature": {"_type": "Image"}, "_type": "List"}} | claimed
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema).with_metadata(metadata)), path)
    return path


def image_in(path: str | None) -> dict:
    return GOOD | {"images": [{"bytes": None, "path": path}]}


def paths_outside(secret: Path) -> dict[str, str]:
    """What the column `path` of an image without content can say. Each leads to `secret`, or to the network."""
    return {
        "absolute": str(secret),
        "above": os.path.join("..", "..", secret.name),
        "from the root": os.path.join(*[".."] * 40, *secret.parts[1:]),
        "a link": "link.png",
        "in a link": os.path.join("away", secret.name),
        "file address": f"file://{secret}",
        "web address": "http://127.0.0.1:9/a.png",
        "Hub address": "hf://datasets/a/b/a.png",
        "in a zip": f"zip://a.png::{secret}.zip",
        "in a zip of the web": "zip://a.png::http://127.0.0.1:9/a.zip",
        "local": f"local://{secret}",
        "NUL": f"{secret}\0",
        "space": f"{secret} ",
        "long": "a" * 70_000,
        "device": "/dev/zero",
        "process": "/proc/self/environ",
        "empty": "",
        "dot": ".",
        "codes": "\x1b]0;PWNED\x07.png",
    }


# name: what the README of a copy of the_cauldron says. {outside} is a folder.
READMES = {
    "absolute": "configs:\n- config_name: nlvr2\n  data_files: {outside}/nlvr2/train-*\n",
    "above": "configs:\n- config_name: nlvr2\n  data_files: ../outside/the_cauldron/nlvr2/train-*\n",
    "data_dir": "configs:\n- config_name: nlvr2\n  data_dir: {outside}/nlvr2\n",
    "web": "configs:\n- config_name: nlvr2\n  data_files: http://127.0.0.1:9/a.parquet\n",
    "zip": "configs:\n- config_name: nlvr2\n  data_files: zip://*::{outside}/a.zip\n",
    "hub": "configs:\n- config_name: nlvr2\n  data_files: hf://datasets/a/b/train-*\n",
    "aliases": "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n",
    "object": "a: !!python/object/apply:os.system ['touch {outside}/started']\n",
}


def load_pairs(folder, split="train"):
    return load_table("HuggingFaceM4/the_cauldron", "nlvr2", split, str(folder), TEXTS_ABOUT_IMAGES)
