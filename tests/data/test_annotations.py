"""The reader of annotations names what is wrong in a file, and raises nothing but InputError for any input."""

import json
import os
import shutil
import string
import tempfile
import time
from pathlib import Path

import bad_inputs
import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v.data.annotations import read_conversations
from phi3v.data.check import check_images
from phi3v.data.conversations import ConversationDataset
from phi3v.data.texts import check_text, text_problem
from phi3v.errors import BadExamples, InputError
from phi3v.report.page import _thumbnail
from phi3v.text import printable

GOOD = {"id": "1", "conversations": [{"images": ["a.png"], "user": "Which?", "assistant": "yes"}]}


def changed(**turn):
    return json.dumps(GOOD | {"conversations": [GOOD["conversations"][0] | turn]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ('{"id": 1', "not a JSON object"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "conversations must be a list of turns"),
        ('{"conversations": []}', "conversations must be a list of turns"),
        ('{"conversations": ["hello"]}', "conversations[0] must be an object"),
        (changed(user=3), "conversations[0].user is 3, must be a text"),
        (changed(assistant="  "), "conversations[0].assistant is '  ', must be a text"),
        (changed(assistant=None), "conversations[0].assistant is None"),
        (changed(user="see <|image_1|>"), "conversations[0].user holds '<|image_1|>'"),
        (changed(assistant="yes<|end|>"), "conversations[0].assistant holds '<|end|>'"),
        (changed(user="a </s> b"), "conversations[0].user holds '</s>'"),
        (changed(user="a <|placeholder1|>"), "conversations[0].user holds '<|placeholder1|>'"),
        (changed(user="half \ud83d"), "not valid Unicode"),
        (changed(images="a.png"), "conversations[0].images is 'a.png', must be a list"),
        (changed(images=[1]), "conversations[0].images is [1], must be a list"),
        (changed(images=["b.png"]), "b.png does not exist"),
        (changed(images=["../a.png"]), "'../a.png', must be a path inside"),
        (changed(images=["/a.png"]), "'/a.png', must be a path inside"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD | {"id": "0"}) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_conversations(path, tmp_path)
    assert f"{path}:3: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"\n", "no examples"), (b'{"id": "\xff"}', "not UTF-8")]
)
def test_a_bad_file_is_named(content, message, tmp_path):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_conversations(path, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bad")
    bad_inputs.write_images_folder(made)
    return made


@pytest.mark.parametrize("name", bad_inputs.ANNOTATIONS)
def test_bad_annotations_are_named(name, folder):
    content, message = bad_inputs.ANNOTATIONS[name]
    path = folder / f"{name}.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_conversations(path, folder / "images")
    text = str(error.value)
    assert message.replace("{path}", str(path)).replace("{images}", str(folder / "images")) in text
    assert all(len(line) <= 410 and line.isprintable() for line in text.split("\n"))
    assert text.count("\n") == (0 if "problems" not in text else min(10, int(text.split()[1].replace(",", ""))))


MORE = {"system": {"system"}, "train": {"train"}, "a_place": {"places"}}  # keys of turns in a case of ACCEPTED


@pytest.mark.parametrize("name", bad_inputs.ACCEPTED)
def test_unusual_annotations_are_read(name, folder):
    path = folder / f"{name}.jsonl"
    path.write_bytes(bad_inputs.ACCEPTED[name])
    examples = read_conversations(path, folder / "images")
    for example in examples:
        assert isinstance(example["id"], (str, int)) and set(example) == {"id", "conversations"}
        for turn in example["conversations"]:
            assert all(map(os.path.isfile, turn["images"]))
            assert set(turn) - {"images", "user", "assistant"} == MORE.get(name, set()) & set(turn)
    assert name != "no_id" or examples[0]["id"] == f"{path}:1"


def test_a_path_that_is_not_a_regular_file_is_refused(folder):
    for path, message in bad_inputs.NOT_REGULAR:
        with pytest.raises(InputError, match=message):
            read_conversations(folder / path, folder / "images")


def test_a_file_behind_a_link_is_read_if_the_user_says_so(folder, tmp_path):
    (tmp_path / "away.jsonl").write_bytes(bad_inputs.line())
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "data.jsonl"
    path.symlink_to(tmp_path / "away.jsonl")
    with pytest.raises(InputError, match="data.jsonl can't be read: the file lies outside of .*data; .*--follow_links"):
        read_conversations(path, folder / "images")
    assert read_conversations(path, folder / "images", follow_links=True)
    (tmp_path / "link").symlink_to(tmp_path)  # the folder itself may be a link
    assert read_conversations(tmp_path / "link" / "away.jsonl", folder / "images")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"a": 1, ' + b", ".join(b'"%d": 1' % i for i in range(200_000)) + b', "a": 1}\n',
            "the key 'a' occurs twice",
        ),
        (bad_inputs.turn(images=["./" * 2_000_000 + "a.png"]), "does not exist"),
    ],
)
def test_large_lines_take_linear_time(content, message, folder):
    (folder / "large.jsonl").write_bytes(content)
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        read_conversations(folder / "large.jsonl", folder / "images")
    assert time.process_time() - start < 10  # minutes, if the time were quadratic


def test_an_image_that_is_swapped_after_the_check_is_not_opened(folder, tmp_path, processor):
    images = bad_inputs.write_images_folder(tmp_path)
    path = tmp_path / "data.jsonl"
    path.write_bytes(bad_inputs.turn(images=["folder/c.png", "inside.png"]))
    examples, followed = (read_conversations(path, images, follow_links=follow) for follow in (False, True))
    data = ConversationDataset(examples, processor)
    assert len(data[0]["grids"]) == 2
    shutil.move(images / "folder", tmp_path / "elsewhere")
    (images / "folder").symlink_to(tmp_path / "elsewhere")
    for use in (lambda: data[0], lambda: data.size(0)):
        with pytest.raises(InputError, match="folder/c.png can't be read as an image .the file lies outside of"):
            use()
    assert "lies outside of" in check_images(examples, processor, 0, disable_tqdm=True).problems.lines[0]
    assert _thumbnail(examples[0]["conversations"][0]["images"][0], 9) is None
    assert len(ConversationDataset(followed, processor)[0]["grids"]) == 2
    (images / "folder").unlink()
    (images / "folder").mkdir()
    os.mkfifo(images / "folder" / "c.png")
    with pytest.raises(InputError, match="folder/c.png can't be read as an image .not a regular file"):
        data[0]


def test_nothing_outside_the_folder_is_opened(folder, monkeypatch):
    """The reader opens no image; it only lists folders, and only those inside the folder of images."""
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.realpath(path)) or scandir(path))
    names = ["/etc/passwd", "../secret.png", "away/secret.png", "out.png", "a.png", "folder/c.png", "./away/x/y.png"]
    path = folder / "names.jsonl"
    path.write_bytes(bad_inputs.turn(images=names))
    with pytest.raises(InputError, match="5 problems"):
        read_conversations(path, folder / "images")
    inside = os.path.realpath(folder / "images")
    assert listed and all(os.path.commonpath([inside, each]) == inside for each in listed)


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder / "images")
    path = tmp_path / "data.jsonl"
    path.write_bytes(bad_inputs.line())
    (example,) = read_conversations(path, tmp_path / "linked")
    assert example["conversations"][0]["images"] == [str(tmp_path / "linked" / "a.png")]


def test_links_out_of_the_folder_are_followed_if_the_user_says_so(folder):
    path = folder / "links.jsonl"
    names = ["out.png", "away/secret.png", "away/images/a.png", "inside.png"]
    path.write_bytes(bad_inputs.turn(images=names))
    with pytest.raises(InputError, match="2 problems"):
        read_conversations(path, folder / "images")
    (example,) = read_conversations(path, folder / "images", follow_links=True)
    assert example["conversations"][0]["images"] == [str(folder / "images" / name) for name in names]
    for name, message in (("../secret.png", "inside"), ("/etc/passwd", "inside"), ("broken.png", "not exist")):
        path.write_bytes(bad_inputs.turn(images=[name]))
        with pytest.raises(InputError, match=message):
            read_conversations(path, folder / "images", follow_links=True)


def test_tags_of_media_can_be_allowed(folder):
    path = folder / "tags.jsonl"
    path.write_bytes(bad_inputs.turn(user="<video> or <image>?"))
    (example,) = read_conversations(path, folder / "images", literal_tags=True)
    assert example["conversations"][0]["user"] == "<video> or <image>?"
    path.write_bytes(bad_inputs.turn(user="<|image_1|>"))
    with pytest.raises(
        InputError, match="the chat format reserves: .* come before the user's text, or where it has <image>"
    ):
        read_conversations(path, folder / "images", literal_tags=True)


def turns_of(folder, **changes):
    path = folder / "turns.jsonl"
    path.write_bytes(bad_inputs.line(**changes))
    return read_conversations(path, folder / "images")[0]["conversations"]


@pytest.mark.parametrize(
    ("user", "wanted", "is_inside"),
    [
        ("Which?", "Which?", False),
        ("<image><image>\nWhich?", "Which?", False),
        (" <image>\n<image> Which? ", "Which? ", False),
        ("1: <image> 2: <image> Which?", "1: <image> 2: <image> Which?", True),
        ("<image> or <image>?", "<image> or <image>?", True),
        ("<image>\n<image>\nWhich? &lt;image&gt;", "Which? &lt;image&gt;", False),
    ],
)
def test_places_of_images(user, wanted, is_inside, folder):
    names = ["a.png", "folder/c.png"]
    (turn,) = turns_of(folder, conversations=[bad_inputs.TURN | {"images": names, "user": user}])
    assert turn == {
        "images": [str(folder / "images" / name) for name in names], "user": wanted, "assistant": "yes",
        **({"places": True} if is_inside else {}),
    }  # fmt: skip
    path = folder / "turns.jsonl"  # with --literal_tags, it is text
    (example,) = read_conversations(path, folder / "images", literal_tags=True)
    assert example["conversations"] == [{"images": turn["images"], "user": user, "assistant": "yes"}]


def test_a_system_text_comes_before_the_first_turn(folder):
    first, second = turns_of(folder, system="Be brief.", conversations=[bad_inputs.TURN] * 2)
    assert first["system"] == "Be brief." and "system" not in second


@pytest.mark.parametrize(
    ("flags", "loss_on", "message"),
    [
        ([False], "all", "no answer is learned, because train is false in all turns: remove the field"),
        ([False, False], "all", "no answer is learned"),
        ([False], "last", "conversations[0].train is false, but --loss_on last trains this answer alone"),
        ([True, False], "last", "conversations[1].train is false, but --loss_on last"),
        ([True, False], "all", None),
        ([False, True], "last", None),
        ([False, None], "last", None),
        ([False, False], None, None),  # evaluation asks the last turn in any case
    ],
)
def test_something_must_be_learned(flags, loss_on, message, folder):
    turns = [bad_inputs.TURN | {"train": train} for train in flags]
    path, bad = folder / "learned.jsonl", BadExamples(skip=True)
    path.write_bytes(bad_inputs.line(conversations=turns) + bad_inputs.line(id="2"))
    if message is None:
        examples = read_conversations(path, folder / "images", loss_on=loss_on)
        assert [turn.get("train", True) for turn in examples[0]["conversations"]] == [t is not False for t in flags]
        return
    with pytest.raises(InputError) as error:
        read_conversations(path, folder / "images", loss_on=loss_on)
    assert f"{path}:1: {message}" in str(error.value) and "\n" not in str(error.value)
    (example,) = read_conversations(path, folder / "images", bad, loss_on=loss_on)
    assert example["id"] == "2" and message in bad.left_out[0]


def test_bad_lines_are_left_out_and_remembered(folder, capsys):
    path, bad = folder / "mixed.jsonl", BadExamples(skip=True)
    lines = [bad_inputs.line(id=str(i)) for i in range(3)]
    spoilt = [
        b"{\n",
        bad_inputs.line(id="x", conversations=[bad_inputs.TURN | {"images": ["none.png"], "user": ""}]),
        lines[0],  # its id is there already
        bad_inputs.line(id="2", video="v.mp4"),  # its id is free for the next line
    ]
    path.write_bytes(b"".join([lines[0], *spoilt[:2], lines[1], *spoilt[2:], lines[2]]))
    examples = read_conversations(path, folder / "images", bad)
    assert [example["id"] for example in examples] == ["0", "1", "2"] and not bad.problems
    assert [line.split(":")[1] for line in bad.left_out] == ["2", "3", "5", "6"]
    assert capsys.readouterr().out == f"{path}: 4 of 7 examples are left out\n"
    path.write_bytes(spoilt[0] * 12)
    with pytest.raises(InputError, match=f"none of the 12 examples of {path} can be used; {path}:1: not a JSON"):
        read_conversations(path, folder / "images", bad)


def test_check_text():
    assert check_text("Which?", "here") == "Which?" and text_problem("a < b, <b>") is None
    with pytest.raises(InputError, match="^row 3: user is '', must be a text"):
        check_text("", "row 3: user")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["a.png", "pipe", "out.png", "../secret.png", "<|image_1|>", "\ud800", "\0", "folder/c.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


TURNS = st.dictionaries(st.sampled_from(["images", "user", "assistant"]), VALUES) | st.just(bad_inputs.TURN) | VALUES
EXAMPLES = st.fixed_dictionaries({"conversations": st.lists(TURNS, max_size=3) | VALUES}, optional={"id": VALUES})


@st.composite
def mutated_lines(draw):
    """Valid and nearly valid lines, in which some bytes are changed, cut out, repeated or inserted."""
    lines = [json.dumps(example).encode() for example in draw(st.lists(EXAMPLES, max_size=3))] + [bad_inputs.line()]
    content = bytearray(draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(draw(st.permutations(lines))))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 6))
        piece = draw(st.binary(max_size=3) | st.sampled_from([b"\0", b"[" * 3000, b"9" * 5000, b"\xef\xbb\xbf", b'"']))
        content[at : at + length] = draw(st.sampled_from([piece, bytes(content[at : at + 40]) * 2]))
    return bytes(content)


@pytest.fixture(scope="module")
def fuzzed_folder():
    with tempfile.TemporaryDirectory() as made:
        bad_inputs.write_images_folder(Path(made))
        yield Path(made)


def read_or_refuse(content: bytes, folder: Path) -> bool:
    path = folder / "fuzzed.jsonl"
    path.write_bytes(content)
    inside = os.path.realpath(folder / "images")
    try:
        examples = read_conversations(path, folder / "images")
    except InputError as e:
        assert str(e) and all(printable(line) == line and len(line) <= 410 for line in str(e).split("\n"))
        return False
    for example in examples:
        json.dumps(example, ensure_ascii=False).encode("utf-8")  # as the report of an evaluation is written
        for turn in example["conversations"]:
            assert text_problem(turn["user"]) is None and text_problem(turn["assistant"]) is None
            assert all(os.path.commonpath([inside, os.path.realpath(image)]) == inside for image in turn["images"])
    return True


@fuzz(400)
@given(mutated_lines())
def test_mutated_annotations(fuzzed_folder, content):
    read_or_refuse(content, fuzzed_folder)


@fuzz(400)
@given(st.binary(max_size=200))
def test_random_bytes(fuzzed_folder, content):
    read_or_refuse(content, fuzzed_folder)


@fuzz(400)
@given(
    st.text(alphabet=string.printable + "ë日🙂\ud800\u2028\0", max_size=30)
    | st.lists(st.sampled_from(["a.png", "folder", "..", ".", "", "out.png", "away", "/", "inside.png"])).map("/".join)
)
def test_random_image_names(fuzzed_folder, name):
    read_or_refuse(bad_inputs.turn(images=[name]), fuzzed_folder)
