"""Conversations in common formats: every image and every text arrives, or an error or a note names it."""

import json
import time

import pytest

from phi3v.data.formats import IMAGE_PLACE, Formats
from phi3v.errors import BadExamples, InputError

ASK, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}
HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}
TWO_TURNS = [ASK, ANSWER, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is."}]


def read(tmp_path, content, name="a.jsonl", literal_tags=False):
    """(turns of each row, notes)"""
    bad, path = BadExamples(), tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    formats = Formats(path, bad, lambda name: name.endswith(".png"), literal_tags)
    found = [turns for _, turns in formats if turns is not None]
    bad.settle(str(path), len(found))
    return found, [*formats.unused.lines("a"), *(f"{n} {note}" for note, n in formats.notes.items() if n)]


def one(tmp_path, example, **kwargs):
    ((turn, *others),), notes = read(tmp_path, example, **kwargs)
    assert not others
    return turn["images"], turn["user"], turn["assistant"], notes


def say(content):
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def text(text):
    return {"type": "text", "text": text}


# ---- Images


@pytest.mark.parametrize("messages", [{"messages": [ASK, ANSWER]}, {"conversations": [HUMAN, GPT]}])
@pytest.mark.parametrize(
    "images",
    [
        {"image": "a.png"},
        {"images": "a.png"},
        {"image": ["a.png"]},
        {"images": ["a.png"]},
        {"image": "a.png", "images": ["a.png"]},
        {"images": [{"path": "a.png"}]},
        {"images": [{"bytes": None, "path": "a.png"}], "image": None},
        {"image": {"url": "a.png"}},
    ],
)
def test_images_beside_the_messages(messages, images, tmp_path):
    assert one(tmp_path, messages | images) == (["a.png"], "What?", "A cat.", [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png"},
        {"image": "a.png"},
        {"type": "image", "image": "a.png", "path": None, "text": None, "index": None},
    ],
)
def test_images_inside_of_a_message(part, tmp_path):
    assert one(tmp_path, say([part, text("What?")])) == (["a.png"], "What?", "A cat.", [])
    found = one(tmp_path, say([part, text("<image> What?"), {"type": "image"}]) | {"images": ["b.png", "c.png"]})
    assert found[:2] == (["a.png", "b.png", "c.png"], "<image>\n<image> What?\n<image>")
    assert "behind or inside of a text stay there" in found[3][0]


def test_images_of_a_message(tmp_path):
    ask = ASK | {"images": ["b.png", "c.png"]}
    second = {"role": "user", "content": "<image>\nWhy?"}
    found, notes = read(tmp_path, {"messages": [ask, ANSWER, second, ANSWER], "images": ["d.png"]})
    assert [turn["images"] for turn in found[0]] == [["b.png", "c.png"], ["d.png"]] and not notes
    assert one(tmp_path, {"conversations": [HUMAN | {"image": "a.png"}, GPT]})[0] == ["a.png"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
        {"role": "user", "content": "<image>What?", "images": ["a.png"]},
    ],
)
def test_images_that_are_named_in_two_places_are_used_once(message, tmp_path):
    example = {"messages": [message, ANSWER], "images": ["a.png"]}
    assert one(tmp_path, example)[0] == ["a.png"]
    with pytest.raises(InputError, match="name each once"):
        one(tmp_path, example | {"images": ["c.png"]})


@pytest.mark.parametrize("content", ["<|image_2|> and <|image_1|>", "<|image_9|>?", "<|image_1|> and <|image_1|>"])
def test_numbered_places_are_in_order(content, tmp_path):
    with pytest.raises(InputError, match="a place is for image .* is the next one"):
        one(tmp_path, say(content) | {"images": ["a.png", "c.png"]})
    with pytest.raises(InputError, match="a place is for image .* is the next one"):
        read(tmp_path, f"image,question,answer\na.png;c.png,{content},A cat\n", "a.csv")
    good = say("<|image_1|> and <|image_2|>?") | {"images": ["a.png", "c.png"]}
    assert one(tmp_path, good)[0] == ["a.png", "c.png"]


def test_a_message_that_contradicts_itself(tmp_path):
    with pytest.raises(InputError, match="content and value with different values"):
        one(tmp_path, {"messages": [ASK | {"value": "LOST"}, ANSWER]})


def test_parts_by_index_as_in_llava_instruct_mix(tmp_path):
    parts = [{"index": None, "text": "Which?", "type": "text"}] + [
        {"index": i, "text": None, "type": "image"} for i in (0, 1)
    ]
    found = one(tmp_path, say(parts) | {"images": ["a.png", "b.png"]})
    assert found[:2] == (["a.png", "b.png"], "Which?\n<image><image>")
    assert one(tmp_path, say(parts[1:] + parts[:1]) | {"images": ["a.png", "b.png"]})[1] == "Which?"
    with pytest.raises(InputError, match="a place is for image 2 of the list, but image 1 is the next one"):
        read(tmp_path, say(parts[::2]) | {"images": ["a.png", "b.png"]})


def test_images_without_a_place_follow_those_with_one(tmp_path):
    found = one(tmp_path, say("<image>\nWhich?") | {"images": ["a.png", "b.png", "c.png"]})
    assert found[0] == ["a.png", "b.png", "c.png"] and "1 more images than places" in found[3][0]
    second = {"role": "user", "content": "<image>\nWhy?"}
    found, notes = read(tmp_path, {"messages": [ASK, ANSWER, second, ANSWER], "images": ["a.png", "b.png"]})
    assert [turn["images"] for turn in found[0]] == [["b.png"], ["a.png"]] and "more images than places" in notes[0]


PLACES = [  # (content, text with places that stay, text with --literal_tags, where all images come before it)
    ("<image>\n<image>\nWhich?", "Which?", "Which?"),
    (" <|image_1|><|image_2|> Which?\n", "Which?", "Which?"),
    ([{"type": "image"}, text("<image>\nWhich?")], "Which?", "Which?"),
    ("Which? <image> <image>", "Which? <image> <image>", "Which?"),
    ("Which?\n<image>\n<image>\n", "Which?\n<image>\n<image>", "Which?"),
    ("Is <image> larger than <|image_2|>?", "Is <image> larger than <image>?", "Is\nlarger than\n?"),
    ("<image> or <image>: which?", "<image> or <image>: which?", "or\n: which?"),
    ([{"type": "image"}, text("Which?"), {"type": "image"}], "<image>\nWhich?\n<image>", "Which?"),
    ([text("1: "), {"type": "image"}, text(" 2: "), {"type": "image"}], "1: <image> 2: <image>", "1: \n 2:"),
]


@pytest.mark.parametrize(("content", "wanted", "moved"), PLACES)
def test_images_inside_or_behind_their_text_stay_there(content, wanted, moved, tmp_path):
    example = say(content) | {"images": ["a.png", "b.png"]}
    assert one(tmp_path, example) == (
        ["a.png", "b.png"], wanted, "A cat.",
        ["1 images that were behind or inside of a text stay there"] if "<image>" in wanted else [],
    )  # fmt: skip
    images, user, _, notes = one(tmp_path, example, literal_tags=True)
    assert (images, user) == (["a.png", "b.png"], moved) and bool(notes) == ("<image>" in wanted)
    assert not notes or "before it now" in notes[0]


@pytest.mark.parametrize("content", [content for content, *_ in PLACES if isinstance(content, str)])
def test_places_in_a_table_are_those_of_a_message(content, tmp_path):
    table = f'image,question,answer\na.png;b.png,"{content}",A cat.\n'
    wanted = one(tmp_path, say(content) | {"images": ["a.png", "b.png"]})[:2]
    assert one(tmp_path, table, name="a.csv")[:2] == wanted


def test_images_without_a_place_follow_a_text_whose_images_stay(tmp_path):
    images = ["a.png", "b.png", "c.png"]
    found = one(tmp_path, say("Is <image> red?") | {"images": images})
    assert found[:2] == (images, "Is <image> red?\n<image><image>")
    ask = {"role": "user", "content": "Is <image> red?", "images": images[1:]}
    ((turn, second),), _ = read(tmp_path, {"messages": [ASK, ANSWER, ask, ANSWER]})
    assert (turn["user"], second["images"], second["user"]) == ("What?", images[1:], "Is <image> red?\n<image>")


def test_an_escaped_place_is_no_place(tmp_path):
    with pytest.raises(InputError, match="the user's text holds '<image>', which stands for"):
        one(tmp_path, say(r"Is \<image> red?") | {"images": ["a.png"]})


# ---- System texts


@pytest.mark.parametrize(
    ("example", "wanted"),
    [
        ({"system": "Be brief."}, "Be brief."),
        ({"system": " "}, None),
        ({"system": None}, None),
        ({"messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER]}, "Be brief."),
        ({"messages": [{"role": "system", "content": [text("Be"), text("brief.")]}, ASK, ANSWER]}, "Be\nbrief."),
        ({"system": "One.", "messages": [{"role": "system", "content": "Two."}, ASK, ANSWER]}, "One.\nTwo."),
        ({"messages": [*({"role": "system", "content": t} for t in ("1", "2")), ASK, ANSWER]}, "1\n2"),
    ],
)
def test_a_system_text_is_that_of_the_conversation(example, wanted, tmp_path):
    (((turn),),), _ = read(tmp_path, {"messages": [ASK, ANSWER]} | example)
    assert turn.get("system") == wanted and turn["user"] == "What?"


def test_a_later_system_text_comes_before_the_next_question(tmp_path):
    later = {"role": "system", "content": "Be brief."}
    ((first, second),), _ = read(tmp_path, {"messages": [later, *TWO_TURNS[:2], later, *TWO_TURNS[2:]]})
    assert first["system"] == "Be brief." and second["user"] == "Be brief.\nWhy?" and "system" not in second
    with pytest.raises(InputError, match="the system's text holds '<video>'"):
        read(tmp_path, {"messages": TWO_TURNS, "system": "<video>"})


def test_the_system_column_of_a_table(tmp_path):
    content = "image,question,answer,system,source\na.png,What?,A cat.,Be brief.,web\n"
    ((turn,),), notes = read(tmp_path, content, name="a.csv")
    assert turn == {"images": ["a.png"], "user": "What?", "assistant": "A cat.", "system": "Be brief."}
    assert notes == ["note: a: fields that are not used: source (1 times)"]


def test_an_answer_that_is_not_learned(tmp_path):
    ((first, second),), notes = read(
        tmp_path, {"messages": [*TWO_TURNS[:1], ANSWER | {"train": False}, *TWO_TURNS[2:]]}
    )
    assert first["train"] is False and "train" not in second and not notes
    (((turn),),), notes = read(tmp_path, {"conversations": [HUMAN | {"train": False}, GPT | {"train": True}]})
    assert "train" not in turn and notes == ["note: a: fields that are not used: conversations[].train (2 times)"]


# ---- What can't be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "v.mp4"}, "a.jsonl:1: video is 'v.mp4', but the model sees images only: make frames"),
        ({"videos": ["v.mp4"]}, "videos is ['v.mp4'], but"),
        ({"audio": "a.wav"}, "audio is 'a.wav', but the model can't hear"),
        ({"tools": [{"name": "x"}]}, "tools is [{'name': 'x'}], but tools can't be trained"),
        ({"rejected": "No."}, "rejected is 'No.', but preferences can't be trained"),
        ({"bbox": [1, 2, 3, 4]}, "bbox is [1, 2, 3, 4], but places in an image"),
        ({"image_path": "a.png"}, "image_path is 'a.png', but no field of this name is read"),
        ({"messages": [ASK | {"img": "a.png"}, ANSWER]}, "messages[].img is 'a.png', but no field of this name"),
        ({"messages": [ASK, ANSWER | {"tool_calls": [{}]}]}, "messages[].tool_calls is [{}], but tools"),
        ({"messages": [ASK | {"videos": ["v.mp4"]}, ANSWER]}, "messages[].videos is ['v.mp4']"),
        (say([{"type": "video", "video": "v.mp4"}, text("What?")]), "a part of a message is {'type': 'video'"),
        (say([{"type": "input_audio", "input_audio": {}}, text("What?")]), "a part of a message is {'input_audio'"),
        (say([{"type": "image", "source": {"data": "iVBO"}}, text("What?")]), "a part of a message is {'source'"),
        (say([{"type": "image", "base64": "iVBO"}, text("What?")]) | {"images": ["a.png"]}, "a part of a message is"),
        (say([{"type": "text", "text": 3}]), "a part of a message is {'text': 3"),
        (say([{"type": "image", "image": "a.png", "path": "b.png"}]), "{'image': 'a.png', 'path': 'b.png'}, must be"),
        (say(["What?"]), "content is ['What?'], must be a text or a list of parts"),
        (say(None), "content is None"),
        ({"images": [1]}, "images is 1, must be the name"),
        ({"images": [{"bytes": "iVBO", "path": "a.png"}]}, "images is {'bytes': 'iVBO', 'path': 'a.png'}, must be"),
        ({"image": "a.png", "images": ["b.png"]}, "image is ['a.png'], but images is ['b.png']: give one"),
        ({"system": ["x"]}, "system is ['x'], must be a text"),
        ({"messages": "hi"}, "messages is 'hi', must be a list of objects"),
        ({"messages": None}, "has neither messages nor conversations"),
        ({"conversations": [HUMAN, GPT]}, "has both messages and conversations"),
        ({"messages": [ASK, ASK, ANSWER]}, "a message of 'user' is out of turn"),
        ({"messages": [ASK, ANSWER, ANSWER]}, "a message of 'assistant' is out of turn"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message of 'tool' is out of turn"),
        ({"messages": [{"role": ["a"], "content": "x"}]}, "a message of ['a'] is out of turn"),
        ({"messages": [{"role": "system", "content": "<image>"}, ASK, ANSWER], "image": "a.png"}, "'system' is out of"),
        ({"messages": [ASK, ANSWER, ASK]}, "the last message must be an answer"),
        ({"messages": [ASK, ANSWER, {"role": "system", "content": "x"}]}, "the last message must be an answer"),
        (say("<image>\n<image>\nWhat?") | {"image": "a.png"}, "a place for 2 images, but 1 are left"),
        (say("<video>\nWhat?"), "the user's text holds '<video>'"),
        (say("<|vision_start|>What?") | {"image": "a.png"}, "the user's text holds '<|vision_start|>'"),
        (say(" "), "the user's text is '', must be a text"),
    ],
)  # fmt: skip
def test_nothing_is_dropped_in_silence(changes, message, tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, {"messages": [ASK, ANSWER]} | changes)
    assert message in str(error.value) and "\n" not in str(error.value) and "a.jsonl:1: " in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,What?,A cat.,v.mp4", "a.csv:2: video is 'v.mp4', but"),
        ("a.png,<image> <image> What?,A cat.,", "the question has places for 2 images, but the row has 1"),
        ("a.png,What?,see <image>,", "the assistant's text holds '<image>'"),
        ("a.png,What?,,", "the assistant's text is '', must be"),
    ],
)
def test_rows_that_cannot_be_used(row, message, tmp_path):
    with pytest.raises(InputError, match="^" + str(tmp_path)) as error:
        read(tmp_path, f"image,question,answer,video\n{row}\n", name="a.csv")
    assert message in str(error.value)


def test_a_row_with_its_image_in_an_unknown_column(tmp_path):
    with pytest.raises(InputError, match="picture is 'a.png', but no field of this name is read"):
        read(tmp_path, "image,question,answer,picture\n,What?,A cat.,a.png\n", name="a.csv")
    content = "images,question,answer\na.png; b.png,<image>\nWhat?,A cat.\n".replace(
        "<image>\nWhat?", '"<image>\nWhat?"'
    )
    assert one(tmp_path, content, name="a.csv")[:2] == (["a.png", "b.png"], "What?")


def test_empty_and_other_fields(tmp_path):
    """Tables that are saved as jsonl have every field in every line, most of them empty."""
    nothing = {"videos": [], "audios": None, "tools": "", "system": None, "images": [], "objects": {}}
    assert one(tmp_path, {"messages": [ASK, ANSWER]} | nothing) == ([], "What?", "A cat.", [])
    messages = [ASK | {"name": "me"}, ANSWER | {"weight": 0}]
    parts = [{"type": "image", "image": "a.png", "min_pixels": 9}, text("What?")]
    lines = [{"id": 1, "messages": messages, "image": "a.png", "coco_url": "b.png"}, say(parts)]
    _, (note,) = read(tmp_path, "\n".join(map(json.dumps, lines)))
    for name in ("id", "messages[].name", "messages[].weight", "coco_url", "messages[].content[].min_pixels"):
        assert f"{name} (1 times)" in note


# ---- --literal_tags


@pytest.mark.parametrize(
    ("example", "user", "answer"),
    [
        ({"messages": [ASK, {"role": "assistant", "content": "![fig](<image>)"}]}, "What?", "![fig](<image>)"),
        ({"messages": [ASK, {"role": "assistant", "content": "<video>"}], "image": "a.png"}, "What?", "<video>"),
        (say("<image>\nWhat does <ImageHere> mean?") | {"image": "a.png"}, "What does <ImageHere> mean?", "A cat."),
        (say("What does <image> mean?"), "What does <image> mean?", "A cat."),
        (say([text("What does <video> mean?")]), "What does <video> mean?", "A cat."),
    ],
)
def test_tags_that_are_text(example, user, answer, tmp_path):
    with pytest.raises(InputError, match="literal_tags|a place for 1 images, but 0 are left"):
        read(tmp_path, example)
    images, *texts, notes = one(tmp_path, example, literal_tags=True)
    assert (images, texts) == (["a.png"] if "image" in example else [], [user, answer])
    assert notes == ["1 a tag such as <video> is text: train with --literal_tags too"]


def test_tags_of_the_chat_format_are_never_text(tmp_path):
    example = {"messages": [ASK, {"role": "assistant", "content": "<|image_1|>"}], "image": "a.png"}
    with pytest.raises(InputError, match="which the chat format reserves"):
        read(tmp_path, example, literal_tags=True)


def test_a_long_row_of_spaces_takes_linear_time():
    started = time.process_time()
    for text in (
        " " * 200_000 + "x",
        " <image>" * 30_000,
        "\n" * 200_000,
        "<|image_" * 50_000,
        " \t" * 100_000 + "<imag",
    ):
        IMAGE_PLACE.split(text)
    assert time.process_time() - started < 10


def test_the_spaces_around_the_place_of_an_image_belong_to_it():
    assert IMAGE_PLACE.split("a \n<image>\t b<image> <image>c  d <|image_2|>") == [
        *("a", None, "b", None, "", None, "c  d", "2", ""),
    ]
