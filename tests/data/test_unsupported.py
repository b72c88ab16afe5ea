"""Fields and tags whose content would be lost."""

import pytest

from phi3v.data.unsupported import UnusedFields, field_problem, media_problem, tag_problem


@pytest.mark.parametrize("value", ["x", ["x"], {"a": 1}, 0, False, [[1, 2]]])
@pytest.mark.parametrize(
    "name",
    "video videos Video video_path audio audios audio_urls tools functions function_call tool_calls rejected chosen "
    "rejected_response bbox bboxes boxes objects mask masks segmentation".split(),
)
def test_fields_that_the_model_cannot_use(name, value):
    problem = field_problem(name, value)
    assert problem.startswith(f"is {value!r}, but ") and ("remove" in problem or "keep one answer" in problem)


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_empty_fields_lose_nothing(value):
    assert field_problem("videos", value) is None


@pytest.mark.parametrize("name", ["video_id", "source", "object_type", "audience", "id", "toolbox", "masked_words"])
def test_other_fields_are_no_problem(name):
    assert field_problem(name, "x") is None


@pytest.mark.parametrize("value", ["a.png", "d/a.JPG ", ["a.webp"], {"file": "a.mp4"}, "clip.MTS", "https://x/a.jpeg"])
def test_a_file_in_an_unknown_field_of_an_example_without_images(value):
    assert "no field of this name is read" in media_problem("picture", value)
    assert media_problem("picture", "a.json") is None and media_problem("picture", 3) is None


@pytest.mark.parametrize(
    "tag",
    "<video> <audio> <image> <Image> <img> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <ImageHere> "
    "<VideoHere> <image_1> <image1> <|audio_1|> <|AUDIO|> <|audio_bos|> <image_placeholder> <start_of_image> "
    "<IMG_CONTEXT> <image_soft_token> <im_start> <im_patch> <speech> <sound> [IMG] [IMG_BREAK] <VIDEO>".split()
    + ["<image 1>", "<image 12>"],
)
def test_places_of_media_in_other_formats(tag):
    for text in (tag, f"{tag}\nWhat?", f"![fig]({tag})", f"a{tag}b"):
        assert tag_problem(text).startswith(f"holds {tag!r}, which") and "--literal_tags" in tag_problem(text)


@pytest.mark.parametrize(
    "text",
    [
        "a < b > c",
        "<b>",
        '<video src="a.mp4" controls>',
        '<img src="a.png">',
        "<revision>",
        "<division>",
        "image",
        "video",
    ]
    + ["the <television>", "[image]", "<box>", "x <imag", "<|im_start|>", "[IMGS]", "if a<image and b>c"],
)
def test_other_texts_are_no_problem(text):
    assert tag_problem(text) is None


def test_unused_fields_are_named_with_their_counts():
    unused = UnusedFields()
    assert unused.lines("a.json") == []
    for i in range(12):
        unused.add("id", i)
        unused.add(f"key {i}\n", "x")
        unused.add("empty", "")
    (line,) = unused.lines("a.json")
    assert line.startswith("note: a.json: fields that are not used: id (12 times), key 0\\n (1 times)")
    assert line.endswith(", and 3 others") and "empty" not in line
