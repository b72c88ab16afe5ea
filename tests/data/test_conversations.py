"""A conversation becomes token ids, labels and crops."""

import os

import pytest
import torch
from bad_inputs import RANDOM_IMAGES, RANDOM_TEXTS
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.data.check import check_images
from phi3v.data.conversations import encode_conversation
from phi3v.data.texts import text_problem
from phi3v.errors import InputError

SNAPSHOT = os.environ.get("PHI3V_SNAPSHOT")
TURNS = [
    {"images": [Image.new("RGB", (60, 40)), Image.new("RGB", (40, 60))], "user": "Which?", "assistant": "yes"},
    {"images": [], "user": "Why?", "assistant": "no"},
    {"images": [Image.new("RGB", (50, 50))], "user": "And this?", "assistant": "True"},
]


def words(tokenizer, ids):
    """The decoded text without blanks, because decoding puts a blank after each special token."""
    return tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "")


def test_the_sequence_is_the_chat_template_with_images_numbered_through(processor):
    encoded = encode_conversation(processor, TURNS)
    ids, images = encoded["input_ids"].tolist(), []
    text = []
    for token in ids:
        if token > 0:
            text.append(token)
        elif not images or images[-1] != token:
            images.append(token)
    assert images == [-1, -2, -3]
    assert words(processor.tokenizer, text) == (
        "<s><|user|>\n<s><s>\nWhich?<|end|>\n<|assistant|>yes<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>no<|end|>\n"
        "<|user|>\n<s>\nAndthis?<|end|>\n<|assistant|>True<|end|>\n<|endoftext|>"
    )
    assert encoded["grids"] == [(1, 1)] * 3
    assert encoded["tiles"].shape == (3, 56, 56, 3) and encoded["tiles"].dtype == torch.uint8


def test_the_loss_covers_every_answer_and_its_end(processor):
    encoded = encode_conversation(processor, TURNS)
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    spans, current = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            spans.append(words(processor.tokenizer, current))
            current = []
    assert spans == ["yes<|end|>\n", "no<|end|>\n", "True<|end|>\n<|endoftext|>"]


def test_evaluation_sees_the_ids_that_stand_before_the_answer_in_training(processor, toy_examples):
    for example in toy_examples:
        train = encode_conversation(processor, example["conversations"])
        prompt = encode_conversation(processor, example["conversations"], for_generation=True)
        n = len(prompt["input_ids"])
        assert torch.equal(train["input_ids"][:n], prompt["input_ids"])
        # All that follows is the last answer: the first id after the prompt is its first target.
        assert (train["labels"][n:] != -100).all() and train["labels"][n - 1] == -100
        assert torch.equal(train["tiles"], prompt["tiles"])


def test_text_only(processor):
    encoded = encode_conversation(processor, [{"images": [], "user": "Hello?", "assistant": "yes"}])
    assert encoded["tiles"].shape == (0, 56, 56, 3) and encoded["grids"] == []


def test_a_damaged_image_is_named(processor, tmp_path):
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut.png can't be read as an image"):
        encode_conversation(processor, [{"images": [tmp_path / "cut.png"], "user": "a", "assistant": "b"}])


def test_a_thin_image_is_named(processor, tmp_path):
    Image.new("RGB", (2000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(InputError, match="thin.png: image of 2000 x 1 pixels is too thin"):
        encode_conversation(processor, [{"images": [tmp_path / "thin.png"], "user": "a", "assistant": "b"}])


if SNAPSHOT:

    def test_ids_with_the_real_tokenizer():
        processor = Phi3VProcessor.from_pretrained(SNAPSHOT, num_crops=4)
        turns = [{"images": [], "user": "Q", "assistant": "A1"}, {"images": [], "user": "Q2", "assistant": "yes"}]
        encoded = encode_conversation(processor, turns)
        labels = encoded["labels"][encoded["labels"] != -100].tolist()
        assert labels == [319, 29896, 32007, 29871, 13, 4874, 32007, 29871, 13, 32000]
        prompt = encode_conversation(processor, turns[:1], for_generation=True)["input_ids"].tolist()
        assert prompt == [1, 32010, 29871, 13, 29984, 32007, 29871, 13, 32001]


@fuzz(150)
@given(st.lists(RANDOM_IMAGES, max_size=3), RANDOM_TEXTS, RANDOM_TEXTS, st.booleans())
def test_random_conversations(processor, images, user, assistant, for_generation):
    """Any images with texts that the reader accepts are encoded, or refused with an InputError."""
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
