"""Common formats of conversations are converted; the reader and the schema accept the result."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from helpers import ROOT, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v.data.annotations import read_conversations
from phi3v.errors import InputError
from tools import convert_conversations

SCHEMA = json.loads((ROOT / "tools" / "conversations.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
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
        assert first["system"] == "Be brief." and '"system": "Be brief.", "conversations"' in lines[3]
        assert first["user"] == "<image>\nWhich?\n<image>" and first["assistant"] == "The left."
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


# ---- Messages, names and folders of strangers

ASK, SAY = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}


def question(content, **fields):
    return json.dumps({"messages": [{"role": "user", "content": content}, SAY], **fields})


def deep(n):
    return "[" * n + "]" * n


ODD = {  # name: (a line of jsonl, what the message holds)
    "messages_text": ('{"messages": "hi"}', "messages is 'hi', must be a list of objects"),
    "messages_of_lists": ('{"messages": [[1]]}', "messages is [[1]], must be a list of objects"),
    "messages_of_null": ('{"messages": [null]}', "messages is [None], must be a list of objects"),
    "text_is_number": (question([{"type": "text", "text": 5}]), "a part of a message is {'text': 5"),
    "type_is_list": (question([{"type": ["image"]}]), "a part of a message is {'type': ['image']}"),
    "content_is_number": (question(5), "content is 5, must be a text or a list of parts"),
    "from_is_list": (json.dumps({"conversations": [{"from": ["a"], "value": "q"}, SAY]}), "a message of ['a'] is out"),
    "role_is_object": (json.dumps({"messages": [{"role": {"a": 1}, "content": "q"}]}), "a message of {'a': 1} is out"),
    "images_is_number": (question("q", images=3), "images is 3, must be the name of an image file"),
    "system_is_number": (question("q", system=3), "system is 3, must be a text"),
    "index_is_float": (question([{"type": "image", "index": 0.5}], images=["a.png"]), "the index of an image is 0.5"),
    "index_is_object": (question([{"type": "image", "index": {}}, {"type": "image", "index": {"a": 1}}]), "{'a': 1}"),
    "index_is_true": (question([{"type": "image", "index": True}], images=["a.png"]), "the index of an image is True"),
    "index_is_negative": (question([{"type": "image", "index": -1}], images=["a.png"]), "the index of an image is -1"),
    "image_number_is_long": (
        question(f"<|image_{'9' * 5000}|>?", images=["a.png"]),
        "the user's text holds '<|image_9",
    ),
    "deep": ('{"messages": ' + deep(200_000) + "}", "nested too deeply"),
    "deep_images": (question("q")[:-1] + f', "images": {deep(900)}}}', "nested too deeply"),
    "deep_content": (question("q").replace('"q"', deep(900)), "content is [[[[[[[...]]]]]]]"),
    "long_number": (question("q")[:-1] + f', "id": {"9" * 5000}}}', "more digits than can be read"),
    "key_twice": (question("q")[:-1] + ', "messages": []}', "the key 'messages' occurs twice"),
    "name_with_nul": (question("q", image="a\0.png"), "image 'a\\x00.png' can't be the name of a file"),
    "long_name": (question("q", image="a" * 5000), "a is not a file below"),
    "name_of_many_parts": (question("q", image="a/" * 5000), "a/a/ is not a file below"),
    "half_a_pair": (question("q", image="\ud800.png"), "image '\\ud800.png' can't be the name of a file"),
    "codes_in_name": (question("q", image="\x1b]0;PWNED\x07.png"), "image \\x1b]0;PWNED\\x07.png is not a file below"),
    "bad_address": (question("q", image="file://[x"), "image 'file://[x' can't be the name of a file"),
    "nul_in_address": (question("q", image="file:a%00b"), "image 'file:a%00b' can't be the name of a file"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_odd_messages_are_one_line(name, suffix, images, tmp_path):
    line, message = ODD[name]
    content = f"[{line}]" if suffix == "json" else line
    with pytest.raises(InputError) as error:
        convert(images, tmp_path, f"a.{suffix}", content)
    said = str(error.value)
    assert message in said
    assert said.startswith(f"{tmp_path}/a.{suffix}:1") and said.isprintable() and len(said) < 600


def test_bad_rows_are_left_out_whatever_they_are(images, tmp_path):
    lines = [question("q", image=f"{i}.png") for i in range(12)] + [line for line, _ in ODD.values()]
    train, val = convert(images, tmp_path, "a.jsonl", "\n".join(lines), "--on_bad_example", "skip")
    assert len(train) + len(val) == 12
    assert len((tmp_path / "out" / "left_out.txt").read_text().splitlines()) == len(ODD)


def test_unicode_line_breaks_do_not_end_a_line(images, tmp_path):
    text = "a\u2028b\u2029c\u0085d\u000b\u000ce"
    lines = [json.dumps({"messages": [ASK, SAY | {"content": text}], "image": f"{i}.png"}, ensure_ascii=False)
             for i in range(10)]  # fmt: skip
    for name, content in (("a.jsonl", "\n".join(lines)), ("a.json", f"[{','.join(lines)}]")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        train, val = convert(images, tmp_path, name, content)
        assert {example["conversations"][0]["assistant"] for example in train + val} == {text}


def test_images_are_copies_and_with_link_hard_links(images, tmp_path):
    content = csv(*(f"{i}.png,What?,x" for i in range(10)))
    convert(images, tmp_path, "a.csv", content)
    copy = tmp_path / "out" / "images" / "3.png"
    assert copy.read_bytes() == (images / "3.png").read_bytes() and copy.stat().st_nlink == 1
    copy.write_bytes(b"edited")
    assert (images / "3.png").read_bytes() != b"edited"
    shutil.rmtree(tmp_path / "out")
    convert(images, tmp_path, "a.csv", content, "--link")
    assert os.path.samefile(copy, images / "3.png")


def test_links_to_another_disk_are_not_possible(images, tmp_path, monkeypatch):
    def other_disk(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    with pytest.raises(InputError, match=r"0.png can't be copied \(no hard link: Invalid cross-device link; leave out"):
        convert(images, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))), "--link")


def test_an_image_swapped_after_the_check_is_not_copied(linked, tmp_path, monkeypatch):
    place_image = convert_conversations.place_image

    def swapped(file, *args):
        Path(file).unlink()
        Path(file).symlink_to(tmp_path / "far" / "c.png")
        return place_image(file, *args)

    monkeypatch.setattr(convert_conversations, "place_image", swapped)
    for flags in ((), ("--link",), ("--exif_rotate",)):
        with pytest.raises(InputError, match="lies outside of"):
            convert(linked, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))), *flags)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        (linked / "0.png").unlink()
        Image.new("RGB", (30, 20)).save(linked / "0.png")


def test_a_spreadsheet_and_a_folder_that_is_missing_are_named(tmp_path):
    for name, flags, message in (
        ("a.xlsx", [], "a.xlsx is a spreadsheet: save it as CSV"),
        ("a.csv", ["--images_dir", str(tmp_path / "photo")], "--images_dir .*photo is not a folder"),
    ):
        (tmp_path / name).write_text("Image,question,answer\n")
        with pytest.raises(InputError, match=message):
            convert_conversations.main(["--source", str(tmp_path / name), "--out_dir", str(tmp_path / "out"), *flags])
    with pytest.raises(InputError, match="no column image, only .* must name the columns in small letters"):
        convert_conversations.main(["--source", str(tmp_path / "a.csv"), "--out_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/out", "x" * 300, "a\0b", "/", "new/folder/out", "."])
def test_places_for_the_output(place, images, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a.csv").write_text(csv(*(f"{i}.png,What?,x" for i in range(10))))
    monkeypatch.chdir(tmp_path / "empty")
    out = place if place in (".", "/", "/proc/out") or "\0" in place else str(tmp_path / place)
    flags = ["--source", str(tmp_path / "a.csv"), "--images_dir", str(images), "--out_dir", out]
    if place in (".", "new/folder/out"):
        convert_conversations.main(flags)
        assert (Path(tmp_path / "empty" if place == "." else out) / "ucf101_train.jsonl").is_file()
        return
    with pytest.raises(InputError, match="^--out_dir "):
        convert_conversations.main(flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "empty", "file", "pictures"]


def test_a_folder_of_the_user_stays(images, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="out.partial is in the way, and was not made by this program: move it away"):
        convert(images, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))))
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_what_a_killed_run_of_an_earlier_version_left_is_replaced(images, tmp_path):
    (tmp_path / "out.partial" / "images").mkdir(parents=True)
    (tmp_path / "out.partial" / "ucf101_train.jsonl").touch()
    convert(images, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))))
    assert sorted(os.listdir(tmp_path / "out")) == ["images", "ucf101_train.jsonl", "ucf101_val.jsonl"]
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_one_line(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_conversations.shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"^--out_dir .*out can't be written \(\[Errno 28\] No space left on device\)"):
        convert(images, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_nothing_printed_is_obeyed_by_a_terminal(images, tmp_path, capsys):
    lines = [json.dumps({"messages": [ASK, SAY], "image": f"{i}.png", "\x1b]0;PW\x07": 1}) for i in range(10)]
    lines += [json.dumps({"messages": [ASK, SAY], "image": "\x1b[2J.png"})]
    lines[0] = lines[0].replace("A.", "<video>")
    convert(images, tmp_path, "\x1b[1ma.jsonl", "\n".join(lines), "--on_bad_example", "skip", "--literal_tags")
    out = capsys.readouterr().out
    assert (
        "\\x1b[1ma.jsonl: 1 examples: a tag such as" in out
        and "\\x1b]0;PW\\x07 (10 times)" in out
        and "image \\x1b[2J.png is not a file" in out
    )
    assert all(line.isprintable() for line in out.split("\n") if "examples are left out" not in line)


@pytest.mark.parametrize("share", ["nan", "inf", "0", "1", "-1", "1e-320", "1e-300"])
def test_shares_out_of_range(share, images, tmp_path):
    with pytest.raises(InputError, match="--val_share is .*, must be between 0 and 1"):
        convert(images, tmp_path, "a.csv", csv("a.png,b?,x"), f"--val_share={share}")


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


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(images, tmp_path):
    snapshot, blobs = (tmp_path / "datasets--me--photos" / name for name in ("snapshots/0123abc", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i in range(10):
        shutil.copy(images / f"{i}.png", blobs / f"hash{i}")
        (snapshot / f"{i}.png").symlink_to(f"../../blobs/hash{i}")
    train, val = convert(snapshot, tmp_path, "a.csv", csv(*(f"{i}.png,What?,x" for i in range(10))))
    assert sorted(map(os.path.basename, images_of(train + val))) == [f"{i}.png" for i in range(10)]
    assert not any(map(os.path.islink, images_of(train + val)))


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
        *({"conversations": [GOOD_TURN], name: "x"} for name in ("image", "images", "messages", "videos")),
        *({"conversations": [GOOD_TURN], "system": text} for text in (" ", 3, "<image>", "<|end|>", "<video>")),
        *({"conversations": [GOOD_TURN | {"train": value}]} for value in (0, "no", [])),
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


# Texts of a turn, made of pieces that are allowed, places, and what either of the two might see differently.
PIECES = ["<image>", "<image>", " ", "\n", "a", "<image", "\\<image>", "<Image>", "<image 1>", "<|image_1|>", "<|im"]
PIECES += ["<video>", "<s>", "<IMG_CONTEXT>", "[IMG_BREAK]", "<vi_END>", "\0", "age>", "&lt;image&gt;"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.sampled_from([None, 3, "Which?", "1: <image>"])
TURNS = st.fixed_dictionaries(
    {"user": TEXTS | st.integers(0, 9).map(lambda n: "1" + "<image>" * n), "assistant": TEXTS | st.just("yes")},
    optional={
        "images": st.integers(0, 9).map(lambda n: ["a.png"] * n) | st.sampled_from([None, [], "a.png", [1]]),
        "train": st.sampled_from([True, False, False, None, 0, "no"]),
        "system": st.sampled_from(["", None, "x"]),
    },
)
EXAMPLES = st.fixed_dictionaries(
    {"conversations": st.lists(TURNS, max_size=2)},
    optional={"system": TEXTS, "id": st.sampled_from([None, "", 1, "a"])},
)


@fuzz(250)
@given(EXAMPLES)
def test_the_schema_agrees_with_the_reader_about_random_turns(tmp_path_factory, example):
    folder = tmp_path_factory.getbasetemp() / "schema"
    if not folder.exists():
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "a.jsonl").write_text(json.dumps(example) + "\n")
    try:
        read_conversations(folder / "a.jsonl", folder)
        problem = None
    except InputError as e:
        problem = e
    assert VALIDATOR.is_valid(example) == (problem is None), problem
