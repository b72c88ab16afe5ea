"""Chat messages with images become the prompt with tags that training has."""

import base64
import urllib.request

import pytest
from PIL import Image

from phi3v.data.conversations import chat_text
from phi3v.errors import InputError
from phi3v.model import chat
from phi3v.model.processing_phi3v import image_tag


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A file of 16-bit grey that EXIF says to turn."""
    path = tmp_path_factory.mktemp("chat") / "deep photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("I;16", (30, 20), 30000).save(path, exif=exif)
    return path


def test_the_text_is_that_of_training(photo, processor):
    image = {"type": "image", "path": str(photo)}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Same?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Why?"},
    ]
    turns = [
        {"images": [photo, photo], "user": "Same?", "assistant": "Yes."},
        {"images": [photo], "user": "And this?", "assistant": ""},
        {"images": [], "user": "Why?", "assistant": ""},
    ]
    wanted, _ = chat_text(processor, turns, for_generation=True)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == wanted
    assert len(chat.flatten(messages, image_tag)[1]) == 2  # the third is only a place
    assert messages[0]["content"][0] is image and messages[3]["content"] is None  # the user's messages stay


def test_order_of_texts_and_images(photo):
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "text", "text": "b"},
        {"type": "text", "text": "c"},
    ]
    flat, images = chat.flatten([{"role": "user", "content": parts}], image_tag)
    assert flat == [{"role": "user", "content": "a\n<|image_1|>\nb\nc"}] and images == []


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["I", "I", "Which?"], "II\nWhich?"),
        (["I", " Which?"], "I\n Which?"),
        (["1: ", "I", " 2: ", "I", " Which?"], "1: I 2: I Which?"),
        (["1:\n", "I", "I", "2:", "I"], "1:\nII\n2:\nI"),
        (["I", " or ", "I", "?"], "I or I\n?"),
        (["Which?", "I"], "Which?\nI"),
        (["I"], "I"),
        ([], ""),
    ],
)
def test_line_breaks_between_texts_and_images(pieces, wanted):
    assert chat.join_pieces([(piece == "I", piece) for piece in pieces]) == wanted


def test_places_of_images(photo, monkeypatch):
    encoded = base64.b64encode(photo.read_bytes()).decode()
    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: open(photo, "rb"))
    for part in (
        {"type": "image", "image": str(photo)},
        {"type": "image", "image": Image.open(photo)},
        {"type": "image", "url": str(photo)},
        {"type": "image", "url": f"file://{photo}"},
        {"type": "image", "url": "https://host/photo.png"},
        {"type": "image", "base64": encoded},
        {"type": "image", "base64": f"{encoded[:40]}\n{encoded[40:]}"},
        {"type": "image", "path": photo},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image_url", "image_url": str(photo)},
    ):
        _, (image,) = chat.flatten([{"role": "user", "content": [part]}], image_tag)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("I;16", (30, 20), 30000), part


@pytest.mark.parametrize("name", ["nowhere.png", "cats", "data:image/png;base64,xx", "", "a\0b", "README.md"])
def test_what_is_no_image(name):
    with pytest.raises(InputError, match="can't be read as an image .no file with an image") as error:
        chat.open_image(name)
    assert "\n" not in str(error.value)


def test_an_address_that_fails(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("connection\nrefused")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"https://host/a.png can't be read as an image \(connection refused\)"):
        chat.open_image("https://host/a.png")


@pytest.mark.parametrize("part", [{"type": "video", "video": "a.mp4"}, {"type": "audio"}, {}, "text"])
def test_parts_of_another_kind(part):
    with pytest.raises(ValueError, match="a message has a part of type"):
        chat.flatten([{"role": "user", "content": [part]}], image_tag)
