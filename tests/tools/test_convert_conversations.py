"""Common formats of conversations are converted; the reader and the schema accept the result."""

import itertools
import json
import os
import re

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
    "images": ["N.png", "sub/N.png"],
}
LLAVA = {
    "id": "x",
    "image": "N.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
HEADER = "image,question,answer\n"
# Four examples; each N becomes the example's number, so that no two examples share an image.
FORMATS = {
    "a.csv": (HEADER + 'N.png; sub/N.png,"What, then?",A cat.\n' * 4, 2),
    "a.tsv": (HEADER.replace(",", "\t") + "N.png\tWhat?\tA cat.\n" * 4, 1),
    "A.CSV": (HEADER + "N.png,What?,A cat.\n" * 4, 1),
    "A.TSV": (HEADER.replace(",", "\t") + "N.png\tWhat?\tA cat.\n" * 4, 1),
    "a.jsonl": ((json.dumps(MESSAGES) + "\n") * 4, 2),
    "A.JSONL": ((json.dumps(MESSAGES) + "\n") * 4, 2),
    "a.json": (json.dumps([LLAVA] * 4), 1),
}


def numbered(content: str) -> str:
    count = itertools.count()
    lines = re.split(r"(?<=\n)|(?<=\}, )", content)
    return "".join(line.replace("N.png", f"{next(count)}.png") if "N.png" in line else line for line in lines)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b", *range(20)):
        Image.new("RGB", (30, 20)).save(folder / f"{name}.png")
        Image.new("RGB", (30, 20)).save(folder / "sub" / f"{name}.png")
    return folder


def convert(images, tmp_path, name, content, *flags):
    (tmp_path / name).write_text(content, encoding="utf-8")
    flags = ["--source", tmp_path / name, "--images_dir", images, "--out_dir", tmp_path / "out", *flags]
    convert_conversations.main(list(map(str, flags)))
    return [
        read_conversations(tmp_path / "out" / f"ucf101_{split}.jsonl", tmp_path / "out" / "images", literal_tags=True)
        for split in ("train", "val")
    ]


def images_of(examples):
    return [image for example in examples for turn in example["conversations"] for image in turn["images"]]


def csv(*rows):
    return HEADER + "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, images, tmp_path):
    content, n_images = FORMATS[name]
    train, val = convert(images, tmp_path, name, numbered(content), "--val_share", "0.25")
    lines = (tmp_path / "out" / "ucf101_train.jsonl").read_text().splitlines()
    lines += (tmp_path / "out" / "ucf101_val.jsonl").read_text().splitlines()
    for line in lines:
        jsonschema.validate(json.loads(line), SCHEMA)
    assert (len(train), len(val)) == (3, 1) and len(val[0]["conversations"][0]["images"]) == n_images
    assert [example["id"] for example in train + val] == [0, 1, 2, 3]
    assert len(set(images_of(train + val))) == 4 * n_images and not (tmp_path / "out" / "left_out.txt").exists()
    if name == "a.jsonl":
        first, second = val[0]["conversations"]
        assert first["user"] == "Be brief.\nWhich?" and first["assistant"] == "The left."
        assert second == {"images": [], "user": "Why?", "assistant": "It is."}


BAD = [
    ("a.csv", "image,question\na.png,What?\n", "there is no column answer"),
    (
        "a.csv",
        csv("none.png,What?,A cat."),
        r"a.csv:2: image none.png is not a file below .*pictures: see --images_dir",
    ),
    ("a.csv", csv("../a.csv,What?,A cat."), "is not a file below"),
    ("a.csv", csv("sub,What?,A cat."), "image sub is not a file below"),
    (
        "a.csv",
        csv("https://host/a.png,What?,A cat."),
        "'https://host/a.png' is not a file but an address or data: save",
    ),
    ("a.csv", csv("a\0.png,What?,A cat."), r"image 'a\\x00.png' can't be the name of a file"),
    ("a.csv", csv("a" * 5000 + ".png,What?,A cat."), "image a+"),
    ("a.csv", csv("a.png,What?,"), "the assistant's text is '', must be a text"),
    ("a.csv", csv("a.png,What?,A cat."), "too few"),
    ("a.csv", csv(*["a.png,What?,A cat."] * 20), r"all 20 examples are connected .* \(20 have a.png\)"),
    ("a.json", "[1]", "object 1: must be an object"),
    ("a.json", "[{", "is not valid JSON"),
    ("a.jsonl", '{"a": 1}\n', "has neither messages nor conversations"),
    ("a.jsonl", json.dumps(MESSAGES | {"images": ["a.png"]}), "a place for 2 images, but 1 are left"),
    ("a.jsonl", json.dumps(MESSAGES | {"messages": MESSAGES["messages"][:-1]}), "the last message must be an answer"),
    ("a.jsonl", json.dumps(MESSAGES | {"messages": [{"role": "tool", "content": "x"}]}), "out of turn"),
    ("a.jsonl", json.dumps(LLAVA | {"image": ""}), "image is '', must be a file name"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_sources(name, content, message, images, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        convert(images, tmp_path, name, content)
    assert all(line.isprintable() for line in str(error.value).split("\n"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# ---- Bad rows


MIXED = csv(*(f"{i}.png,What?,A cat." for i in range(20)), *(f"none{i}.png,What?,A cat." for i in range(12)), "a.png,b")


def test_all_bad_rows_are_reported_at_once(images, tmp_path):
    with pytest.raises(InputError) as error:
        convert(images, tmp_path, "a.csv", MIXED)
    head, *lines = str(error.value).split("\n  ")
    assert head == f"{tmp_path}/a.csv: 13 problems; these are the first 10" and len(lines) == 10
    assert {int(line.split(":")[1]) for line in lines} <= set(range(22, 35))
    with pytest.raises(InputError, match="--on_bad_example is drop, must be error or skip"):
        convert(images, tmp_path, "a.csv", MIXED, "--on_bad_example", "drop")


def test_bad_rows_are_left_out_and_listed(images, tmp_path, capsys):
    train, val = convert(images, tmp_path, "a.csv", MIXED, "--on_bad_example", "skip")
    out = capsys.readouterr().out
    assert (len(train), len(val)) == (18, 2) and [example["id"] for example in val] == [9, 19]
    assert f"{tmp_path}/a.csv: 13 of 33 examples are left out" in out and "13 examples were left out" in out
    assert out.count("image none") == 10 and "… and 3 more" in out
    listed = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert len(listed) == 13 and listed[-1].startswith(f"{tmp_path}/a.csv:34: the row has 2 fields")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 20


def test_a_bad_row_does_not_change_the_ids_of_others_or_link_its_images(images, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}]} for i in range(20)
    ]
    rows[3] = LLAVA | {"image": ["a.png", "none.png"]}
    rows[4]["videos"] = ["v.mp4"]
    content = "\n".join(map(json.dumps, rows)).replace("\n", "\n{\n", 1)
    train, val = convert(images, tmp_path, "a.jsonl", content, "--on_bad_example", "skip")
    assert sorted(example["id"] for example in train + val) == [i for i in range(21) if i not in (1, 4, 5)]
    assert not list((tmp_path / "out" / "images").iterdir())


def test_if_no_row_is_good_skipping_does_not_help(images, tmp_path):
    with pytest.raises(InputError, match="none of the 2 examples of .*a.csv can be used; .*a.csv:2: image x is not"):
        convert(images, tmp_path, "a.csv", csv("x,a,b", "y,a,b"), "--on_bad_example", "skip")


# ---- The split


def test_examples_that_share_an_image_are_on_the_same_side(images, tmp_path, capsys):
    rows = [f"{picture}.png,Question {i}?,x" for i in range(10) for picture in range(10)]
    train, val = convert(images, tmp_path, "a.csv", csv(*rows, "a.png,b?,x", ",b?,x"))
    assert (len(train), len(val)) == (92, 10) and not set(images_of(train)) & set(images_of(val))
    out = capsys.readouterr().out
    assert "100 examples share images with others" in out and "the evaluation has 9.8% of all examples" in out
    assert out.endswith("out: 92 training and 10 evaluation examples\n")


def test_two_names_of_one_file_are_one_image(images, tmp_path):
    (images / "link.png").symlink_to("0.png")
    rows = ["0.png,a?,x", "./0.png,a?,x", "sub/../0.png,a?,x", "link.png,a?,x", f"{images}/0.png,a?,x"]
    train, val = convert(images, tmp_path, "a.csv", csv(*rows, "1.png,a?,x"), "--val_share", "0.5")
    assert (len(train), len(val)) == (5, 1) and len(set(images_of(train))) == 1


# ---- Links


@pytest.fixture
def linked(images, tmp_path):
    """Pictures behind a link to a folder outside, behind links to a file outside and inside, and into a ring."""
    (tmp_path / "far").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "far" / "c.png")
    (images / "folder").symlink_to(tmp_path / "far")
    (images / "c.png").symlink_to(tmp_path / "far" / "c.png")
    (images / "inside.png").symlink_to("a.png")
    (images / "ring.png").symlink_to("ring.png")
    return images


@pytest.mark.parametrize("name", ["folder/c.png", "c.png"])
def test_links_out_of_the_folder(name, linked, tmp_path):
    content = csv(*(f"{i}.png,What?,x" for i in range(9)), f"{name},What?,y")
    with pytest.raises(InputError) as error:
        convert(linked, tmp_path, "a.csv", content)
    wanted = (
        f"{tmp_path}/a.csv:11: image {name} is behind a link out of {linked}, to {tmp_path}/far/c.png: give --follow"
    )
    assert str(error.value).startswith(wanted)
    _, val = convert(linked, tmp_path, "a.csv", content, "--follow_links")
    assert images_of(val) == [str(tmp_path / "out" / "images" / name)] and not os.path.islink(images_of(val)[0])


@pytest.mark.parametrize("name", ["../far/c.png", "folder/../../far/c.png", "ring.png", "folder", "folder/none.png"])
def test_links_do_not_lead_everywhere(name, linked, tmp_path):
    with pytest.raises(InputError, match="is not a file below"):
        convert(linked, tmp_path, "a.csv", csv(f"{name},What?,x"), "--follow_links")
    with pytest.raises(InputError, match="is not a file below"):
        convert(linked, tmp_path, "a.csv", csv(f"{name},What?,x"))


def test_the_folder_itself_may_be_a_link(linked, tmp_path):
    (tmp_path / "link").symlink_to(linked)
    rows = [*(f"{i}.png,What?,x" for i in range(8)), "inside.png,What?,x", f"{tmp_path}/link/b.png,What?,x"]
    train, val = convert(tmp_path / "link", tmp_path, "a.csv", csv(*rows))
    assert images_of(train + val)[8:] == [str(tmp_path / "out" / "images" / name) for name in ("a.png", "b.png")]


def test_addresses_of_local_files(images, tmp_path):
    (images / "a b.png").write_bytes((images / "a.png").read_bytes())
    rows = [{"type": "image", "url": (images / name).as_uri()} for name in ("a b.png", "sub/b.png")]
    contents = [{"messages": [{"role": "user", "content": [row, {"type": "text", "text": "?"}]}]} for row in rows]
    for content in contents:
        content["messages"].append({"role": "assistant", "content": "x"})
    train, val = convert(images, tmp_path, "a.jsonl", "\n".join(map(json.dumps, contents)), "--val_share", "0.5")
    assert [os.path.relpath(path, tmp_path / "out" / "images") for path in images_of(train + val)] == [
        "a b.png",
        "sub/b.png",
    ]


# ---- Notes, and what the reader and the schema say of the result


def test_what_is_not_used_is_named_once(images, tmp_path, capsys):
    rows = [LLAVA | {"image": f"{i}.png", "source": "x"} for i in range(12)]
    convert(images, tmp_path, "a.json", json.dumps(rows))
    out = capsys.readouterr().out
    assert out.startswith(f"note: {tmp_path}/a.json: fields that are not used: id (12 times), source (12 times)\n")
    assert out.count("\n") == 2


def test_literal_tags_must_be_allowed_in_training_too(images, tmp_path, capsys):
    ask, say = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "![fig](<image>)"}
    content = "\n".join(json.dumps({"messages": [ask, say], "image": f"{i}.png"}) for i in range(10))
    with pytest.raises(InputError, match="an answer has an image, but only questions can: .*--literal_tags"):
        convert(images, tmp_path, "a.jsonl", content)
    train, _ = convert(images, tmp_path, "a.jsonl", content, "--literal_tags")
    assert train[0]["conversations"][0]["assistant"] == "![fig](<image>)"
    assert "10 examples: a tag such as <video> is text: train with --literal_tags too" in capsys.readouterr().out
    with pytest.raises(InputError, match="9 problems"):
        read_conversations(tmp_path / "out" / "ucf101_train.jsonl", tmp_path / "out" / "images")


GOOD_TURN = {"images": [], "user": "a", "assistant": "a"}


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
        *({"conversations": [GOOD_TURN | {"user": tag}]} for tag in ("<video>", "<ImageHere>", "<image 1>")),
        *({"conversations": [GOOD_TURN], name: "x"} for name in ("image", "images", "system", "messages", "videos")),
        *({"conversations": [GOOD_TURN | {name: "x"}]} for name in ("image", "system", "audio_url", "bboxes")),
    ],
)  # fmt: skip
def test_the_schema_agrees_with_the_reader(spoil, tmp_path):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoil, SCHEMA)
    (tmp_path / "a.jsonl").write_text(json.dumps(spoil) + "\n")
    with pytest.raises(InputError):
        read_conversations(tmp_path / "a.jsonl", tmp_path)


def test_the_schema_agrees_about_what_is_not_used(tmp_path, capsys):
    good = {
        "id": 1,
        "source": "x",
        "conversations": [GOOD_TURN | {"note": 1}],
        "videos": [],
        "image": None,
        "extra": {"a": 1},
    }
    jsonschema.validate(good, SCHEMA)
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n")
    assert read_conversations(tmp_path / "a.jsonl", tmp_path) == [{"id": 1, "conversations": [GOOD_TURN]}]
    assert "fields that are not used: conversations[].note (1 times), extra (1 times)\n" in capsys.readouterr().out
