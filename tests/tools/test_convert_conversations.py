"""Common formats of conversations are converted; the reader and the schema accept the result."""

import json

import jsonschema
import pytest
from helpers import ROOT
from PIL import Image

from phi3v.data.annotations import read_conversations
from phi3v.errors import InputError
from tools import convert_conversations

SCHEMA = json.loads((ROOT / "tools" / "conversations.schema.json").read_text(encoding="utf-8"))
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The left."}]},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "It is."},
    ],
    "images": ["a.png", "sub/b.png"],
}
LLAVA = {
    "id": "x",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
FORMATS = {
    "a.csv": ("image,question,answer\n" + 'a.png,"What, then?",A cat.\n' * 3 + "a.png; sub/b.png,Alike?,no\n", 2),
    "a.tsv": ("image\tquestion\tanswer\n" + "a.png\tWhat?\tA cat.\n" * 4, 1),
    "a.jsonl": ((json.dumps(MESSAGES) + "\n") * 4, 2),
    "a.json": (json.dumps([LLAVA] * 4), 1),
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (30, 20)).save(folder / name)
    return folder


def convert(images, tmp_path, name, content, *flags):
    (tmp_path / name).write_text(content, encoding="utf-8")
    flags = ["--source", tmp_path / name, "--images_dir", images, "--out_dir", tmp_path / "out", *flags]
    convert_conversations.main(list(map(str, flags)))


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, images, tmp_path):
    content, n_images = FORMATS[name]
    convert(images, tmp_path, name, content, "--val_share", "0.25")
    lines = (tmp_path / "out" / "ucf101_train.jsonl").read_text().splitlines()
    lines += (tmp_path / "out" / "ucf101_val.jsonl").read_text().splitlines()
    for line in lines:
        jsonschema.validate(json.loads(line), SCHEMA)
    train = read_conversations(tmp_path / "out" / "ucf101_train.jsonl", tmp_path / "out" / "images")
    val = read_conversations(tmp_path / "out" / "ucf101_val.jsonl", tmp_path / "out" / "images")
    assert (len(train), len(val)) == (3, 1) and len(val[0]["conversations"][0]["images"]) == n_images
    if name == "a.jsonl":
        first, second = val[0]["conversations"]
        assert first["user"] == "Be brief.\nWhich?" and first["assistant"] == "The left."
        assert second == {"images": [], "user": "Why?", "assistant": "It is."}


BAD = [
    ("a.csv", "image,question\na.png,What?\n", "there is no column answer"),
    ("a.csv", "image,question,answer\nnone.png,What?,A cat.\n", r"a.csv:2: image none.png is not a file below"),
    ("a.csv", "image,question,answer\n../a.csv,What?,A cat.\n", "is not a file below"),
    ("a.csv", "image,question,answer\na.png,What?,\n", "the assistant's text is '', must be a text"),
    ("a.csv", "image,question,answer\na.png,What?,A cat.\n", "too few"),
    ("a.json", "[1]", "object 1 must be an object"),
    ("a.json", "[{", "is not valid JSON"),
    ("a.jsonl", '{"a": 1}\n', "has neither messages nor conversations"),
    ("a.jsonl", json.dumps(MESSAGES | {"images": ["a.png"]}), "a place for 2 images, but 1 are left"),
    ("a.jsonl", json.dumps(MESSAGES | {"messages": MESSAGES["messages"][:-1]}), "the last message must be an answer"),
    ("a.jsonl", json.dumps(MESSAGES | {"messages": [{"role": "tool", "content": "x"}]}), "out of turn"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_sources(name, content, message, images, tmp_path):
    with pytest.raises(InputError, match=message):
        convert(images, tmp_path, name, content)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        {"conversations": []},
        {"conversations": [{"images": [], "user": " ", "assistant": "a"}]},
        {"conversations": [{"images": [], "user": "<|image_1|>", "assistant": "a"}]},
        {"conversations": [{"images": ["../a.png"], "user": "a", "assistant": "a"}]},
        {"conversations": [{"images": ["/a.png"], "user": "a", "assistant": "a"}]},
        {"id": True, "conversations": [{"images": [], "user": "a", "assistant": "a"}]},
        [1],
    ],
)
def test_the_schema_agrees_with_the_reader(spoil, tmp_path):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoil, SCHEMA)
    (tmp_path / "a.jsonl").write_text(json.dumps(spoil) + "\n")
    with pytest.raises(InputError):
        read_conversations(tmp_path / "a.jsonl", tmp_path)
