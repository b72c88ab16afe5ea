"""The check of a whole data set before training."""

import os
import signal
from pathlib import Path

import bad_inputs
import numpy as np
import pytest
from PIL import ExifTags, Image

from phi3v.data import check as data_check
from phi3v.data.annotations import read_conversations
from phi3v.data.check import check_data, check_images
from phi3v.data.conversations import encode_conversation
from phi3v.data.images import open_image
from phi3v.errors import InputError

# The check of a whole data set


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    folder = tmp_path_factory.mktemp("special")
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
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


def test_special_images_are_counted_and_are_no_problem(special, processor, monkeypatch):
    conversations = [conversation(image, id=str(i)) for i, image in enumerate(special.values())]
    for image in special.values():
        encode_conversation(processor, conversation(image)["conversations"])
    summary = check_images(conversations, processor, 0, disable_tqdm=True)
    expected = {kind: 1 for kind in special if kind not in ("palette", "opaque", "plain")}
    assert summary.kinds == expected | {data_check.TRANSPARENT: 2} and not summary.problems
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)  # up to twice as much PIL only warns
    (kind,) = check_images([conversation(special["plain"])], processor, 0, disable_tqdm=True).kinds
    assert kind.endswith("slow to decode")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_summary(workers, toy_data, processor):
    examples = read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images")
    lengths = [len(encode_conversation(processor, example["conversations"])["input_ids"]) for example in examples]
    summary = check_images(examples, processor, workers, max_length=sorted(lengths)[-3], disable_tqdm=True)
    assert summary.tokens_per_example == lengths and summary.examples == 24 and not summary.problems
    assert summary.too_long == sum(n > sorted(lengths)[-3] for n in lengths) / 24
    text = str(summary)
    assert f"min {min(lengths)}, median " in text and f"max {max(lengths)}; " in text and "24 examples" in text


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
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
    assert lines[0] == f"data: {len(bad) + 1} problems; these are the first 10" and len(lines) == 11
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


@pytest.mark.slow
def test_a_worker_that_dies_is_reported(special, processor, monkeypatch):
    monkeypatch.setattr(data_check, "examine_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="near example 1: a process that prepares images .* was killed"):
        check_images([conversation(special["plain"])], processor, 1, disable_tqdm=True)


def test_texts_that_the_reader_has_not_checked_are_checked(processor):
    summary = check_images([conversation(user="<|image_3|>")], processor, 0, disable_tqdm=True)
    assert "image tags do not match" in summary.problems.lines[0]
    assert str(check_images([], processor, 0, disable_tqdm=True)).startswith("data: 0 examples, 0 images")


def conversation(*images, id="1", user="Which?"):
    return {"id": id, "conversations": [{"images": list(images), "user": user, "assistant": "yes"}]}
