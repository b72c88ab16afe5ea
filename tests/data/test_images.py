"""Bad and unusual images: what is refused, what becomes of the rest, and the look through a whole data set."""

import io
import os
import signal
from pathlib import Path

import bad_inputs
import numpy as np
import pytest
from conftest import CHECKPOINT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from phi3v import Phi3VProcessor
from phi3v.data import check as data_check
from phi3v.data.annotations import read_conversations, text_problem
from phi3v.data.check import check_data, check_images
from phi3v.data.conversations import encode_conversation
from phi3v.data.images import open_image, read_image, to_rgb
from phi3v.errors import InputError


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT)


def conversation(*images, id="1", user="Which?"):
    return {"id": id, "conversations": [{"images": list(images), "user": user, "assistant": "yes"}]}


@pytest.mark.parametrize("name", bad_inputs.IMAGES)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_bad_images_are_named(name, as_bytes, processor, tmp_path):
    content, message = bad_inputs.IMAGES[name]
    path = tmp_path / name
    path.write_bytes(content)
    image = {"bytes": content, "path": name} if as_bytes else str(path)
    with pytest.raises(InputError) as error:
        encode_conversation(processor, conversation(image)["conversations"])
    assert name in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    # The check before a training says the same.
    summary = check_images([conversation(image)], processor, 0, disable_tqdm=True)
    assert summary.problems.lines == [f"data, example 1: {error.value}"] and summary.bad_examples == ["1"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "an image can't be read as an image (there is none)"),
        ({"bytes": None, "path": None}, "an image of the table can't be read as an image (there is none)"),
        ({"bytes": b"", "path": "a.png"}, "a.png can't be read as an image (the file is empty)"),
        ({"path": "nowhere.png"}, "nowhere.png can't be read as an image (the file does not exist)"),
        ("nowhere.png", "nowhere.png can't be read as an image (the file does not exist)"),
        ("/", "/ can't be read as an image (no regular file)"),
        (os.devnull, f"{os.devnull} can't be read as an image (no regular file)"),
        ("a\0.png", "can't be read as an image (the file does not exist)"),
        (7, "an image can't be read as an image ("),
        (Image.new("La", (9, 9)), "an image, of mode La, can't be converted to RGB (conversion from La"),
        (Image.new("F", (9, 9)), "an image, of mode F, can't be converted to RGB (floating-point"),
        (Image.new("RGB", (0, 9)), "an image: image of 0 x 9 pixels is empty"),
    ],
)
def test_what_is_no_image(image, message, processor):
    with pytest.raises(InputError) as error:
        encode_conversation(processor, conversation(image)["conversations"])
    assert message in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        open_image(tmp_path / "pipe")


def test_a_lazy_image_that_is_damaged():
    image = Image.open(io.BytesIO(bad_inputs.IMAGES["cut.png"][0]))
    with pytest.raises(InputError, match="can't be read as an image"):
        read_image(image)


def test_16_bit_grey_keeps_its_scale():
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    for made in (Image.fromarray(grey), Image.fromarray(grey.astype(">u2")), Image.fromarray(grey.astype(np.int32))):
        rgb = to_rgb(made)
        assert rgb.mode == "RGB" and np.asarray(rgb)[0].tolist() == [[v] * 3 for v in expected]
    # As PIL reads 16-bit colour.
    data = b"\0" + b"".join(int(v).to_bytes(2, "big") * 3 for v in grey[0])
    colour = Image.open(io.BytesIO(bad_inputs.png(5, 1, data, depth=16)))
    assert np.asarray(read_image(colour))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_other_modes_are_converted_as_by_the_official_processor(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "PA":
        image = image.convert("LA").convert("PA")
    else:
        image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "RGBa") else image.convert(mode)
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


def test_an_rgb_image_is_copied():
    image = Image.new("RGB", (9, 9))
    rgb = read_image(image)
    rgb.putpixel((0, 0), (255, 0, 0))
    assert image.getpixel((0, 0)) == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------
# The check of a whole data set


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    folder = tmp_path_factory.mktemp("special")
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[data_check.EXIF_ORIENTATION] = 6
    clear = rgb.copy()
    clear.putalpha(0)
    palette = rgb.convert("P")
    return {
        data_check.ANIMATED: saved(folder / "a.gif", rgb, save_all=True, append_images=[rgb.rotate(90)], loop=0),
        data_check.CMYK: saved(folder / "a.jpg", rgb.convert("CMYK")),
        data_check.DEEP: saved(folder / "16.png", Image.fromarray(np.full((40, 60), 9999, np.uint16))),
        data_check.ROTATED: saved(folder / "exif.jpg", rgb, exif=exif),
        data_check.TRANSPARENT: saved(folder / "alpha.png", clear),
        "palette": saved(folder / "palette.png", palette, transparency=palette.getpixel((0, 0))),
        "opaque": saved(folder / "opaque.png", rgb.convert("RGBA")),
        "plain": saved(folder / "plain.png", rgb),
    }


def test_special_images_are_counted_and_no_problem(special, processor, monkeypatch):
    conversations = [conversation(image, id=str(i)) for i, image in enumerate(special.values())]
    for image in special.values():
        encode_conversation(processor, conversation(image)["conversations"])
    summary = check_images(conversations, processor, 0, disable_tqdm=True)
    expected = {kind: 1 for kind in special if kind not in ("palette", "opaque", "plain")}
    assert summary.kinds == expected | {data_check.TRANSPARENT: 2} and not summary.problems
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)  # up to twice as much PIL only warns
    (kind,) = check_images([conversation(special["plain"])], processor, 0, disable_tqdm=True).kinds
    assert kind.endswith("slow to decode")


@pytest.mark.parametrize("workers", [0, 2])
def test_summary(workers, toy_data, processor):
    examples = read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images")
    lengths = [len(encode_conversation(processor, example["conversations"])["input_ids"]) for example in examples]
    summary = check_images(examples, processor, workers, max_length=sorted(lengths)[-3], disable_tqdm=True)
    assert summary.tokens_per_example == lengths and summary.examples == 24 and not summary.problems
    assert summary.too_long == sum(n > sorted(lengths)[-3] for n in lengths) / 24
    text = str(summary)
    assert f"min {min(lengths)}, median " in text and f"max {max(lengths)}; " in text and "24 examples" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data(workers, toy_data, processor, tmp_path, capsys):
    examples = read_conversations(toy_data / "ucf101_val.jsonl", toy_data / "images")
    assert check_data(examples, examples, processor, 500, workers, disable_tqdm=True) is None
    assert "evaluation data: 6 examples" in capsys.readouterr().out
    bad = []
    for i, (name, (content, _)) in enumerate(bad_inputs.IMAGES.items()):
        (tmp_path / name).write_bytes(content)
        bad.append(conversation(tmp_path / name, id=f"bad-{i}"))
    with pytest.raises(InputError) as error:
        check_data(examples + bad, bad[:1], processor, None, workers, disable_tqdm=True)
    lines = str(error.value).split("\n")
    assert lines[0] == f"data: {len(bad) + 1} problems, of which these are the first 10" and len(lines) == 11
    assert lines[1].startswith("  training data, example bad-0: ") and "empty.png" in lines[1]
    out = capsys.readouterr().out
    assert f"{len(bad)} problems in {len(bad)} examples: bad-0, bad-1" in out and "Traceback" not in out


def test_an_image_of_several_questions_is_decoded_once(special, processor, monkeypatch):
    calls = []
    monkeypatch.setattr(data_check, "open_image", lambda image: calls.append(image) or open_image(image))
    content = Path(special["plain"]).read_bytes()
    conversations = [conversation({"bytes": bytes(bytearray(content)), "path": None}, special["plain"])] * 5
    summary = check_images(conversations, processor, 0, disable_tqdm=True)
    assert len(calls) == 2 and sum(summary.images_per_example) == 10


def test_a_worker_that_dies_is_reported(special, processor, monkeypatch):
    monkeypatch.setattr(data_check, "examine_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="a process that decodes images died near example 1"):
        check_images([conversation(special["plain"])], processor, 1, disable_tqdm=True)


def test_texts_that_no_reader_saw(processor):
    summary = check_images([conversation(user="<|image_3|>")], processor, 0, disable_tqdm=True)
    assert "image tags do not match" in summary.problems.lines[0]
    assert str(check_images([], processor, 0, disable_tqdm=True)).startswith("data: 0 examples, 0 images")


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 150)),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
]
SIZES = st.tuples(st.integers(0, 90), st.integers(0, 90)) | st.sampled_from([(1, 2000), (3000, 2), (1, 1), (700, 400)])
IMAGES = st.builds(Image.new, st.sampled_from(MODES), SIZES, st.sampled_from([0, 1, 200]))
TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<|image_1|>", "<|image_2|>", "<|", "|>", "<s>", "\n", "{{ 1 }}", "{% x", "yes", "\u0301", "\u202e"]
    )
).map("".join)


@FUZZ
@given(st.lists(IMAGES, max_size=3), TEXTS, TEXTS, st.booleans())
def test_random_conversations(processor, images, user, assistant, for_generation):
    """Texts that the reader lets through, with any images: encoded, or refused with an InputError."""
    if text_problem(user) or text_problem(assistant):
        return
    turns = [{"images": images, "user": user, "assistant": assistant}]
    try:
        encoded = encode_conversation(processor, turns, for_generation)
    except InputError as e:
        assert images and "\n" not in str(e)
        return
    assert encoded["input_ids"].shape == encoded["labels"].shape and len(encoded["grids"]) == len(images)
    if not for_generation:
        (length,) = check_images(
            [{"id": "1", "conversations": turns}], processor, 0, disable_tqdm=True
        ).tokens_per_example
        assert length == len(encoded["input_ids"])


@FUZZ
@given(st.lists(IMAGES.filter(lambda image: image.mode != "La"), max_size=2), TEXTS)
def test_random_prompts(processor, images, text):
    """The processor, which callers give what they like: it returns, or raises the ValueError that it documents."""
    try:
        batch = processor(text, images, return_tensors="pt")
    except ValueError:
        return
    assert batch["input_ids"].shape[0] == 1 and ("pixel_values" in batch) == bool(images)


@FUZZ
@given(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "ppm", "webp"]), st.data())
def test_damaged_files(processor, format, data):
    """Files with bytes changed and cut: whatever PIL makes of them, it is an image or an InputError."""
    content = bytearray(bad_inputs.encoded(format, 12, 9))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert read_image({"bytes": content, "path": f"a.{format}"}).mode == "RGB"
    except InputError as e:
        assert f"a.{format}" in str(e) and "\n" not in str(e)
    tokens, _, problem = data_check.examine_image({"bytes": content, "path": None}, processor.image_processor)
    assert (tokens > 0) == (problem is None)


def test_truncated_images_stay_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
