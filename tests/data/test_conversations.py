"""Conversations → ids, labels and crops; the jsonl reader and what it refuses; padding; generation."""

import json
import os

import pytest
import torch
from conftest import CHECKPOINT
from PIL import Image

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import Collator, ConversationDataset, encode_conversation
from phi3v.errors import InputError
from phi3v.training.evaluation import generate_answers

SNAPSHOT = os.environ.get("PHI3V_SNAPSHOT")


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def examples(toy_data):
    return read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images")


TURNS = [
    {"images": [Image.new("RGB", (60, 40)), Image.new("RGB", (40, 60))], "user": "Which?", "assistant": "yes"},
    {"images": [], "user": "Why?", "assistant": "no"},
    {"images": [Image.new("RGB", (50, 50))], "user": "And this?", "assistant": "True"},
]


def words(tokenizer, ids):
    """The text without its blanks: decoding puts one after each special token."""
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
    assert encoded["pixel_values"].shape == (3, 56, 56, 3) and encoded["pixel_values"].dtype == torch.uint8


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


def test_evaluation_sees_the_ids_that_stand_before_the_answer_in_training(processor, examples):
    for example in examples:
        train = encode_conversation(processor, example["conversations"])
        prompt = encode_conversation(processor, example["conversations"], for_generation=True)
        n = len(prompt["input_ids"])
        assert torch.equal(train["input_ids"][:n], prompt["input_ids"])
        # All that follows is the last answer: the first id after the prompt is its first target.
        assert (train["labels"][n:] != -100).all() and train["labels"][n - 1] == -100
        assert torch.equal(train["pixel_values"], prompt["pixel_values"])


def test_text_only(processor):
    encoded = encode_conversation(processor, [{"images": [], "user": "Hello?", "assistant": "yes"}])
    assert encoded["pixel_values"].shape == (0, 56, 56, 3) and encoded["grids"] == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_pads_on_one_side_and_joins_crops(side, processor, examples):
    encoded = [encode_conversation(processor, example["conversations"]) for example in examples[:5]]
    batch = Collator(processor, side)(encoded)
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(len(e["input_ids"]) for e in encoded))
    for row, example in enumerate(encoded):
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], example["input_ids"])
        assert torch.equal(batch["labels"][row][real], example["labels"])
        assert (batch["labels"][row][~real] == -100).all()
        assert real.tolist() == sorted(real.tolist(), reverse=side == "right")
    images = [image for e in examples[:5] for turn in e["conversations"] for image in turn["images"]]
    crops = torch.cat([processor.image_processor.crops(Image.open(image)) for image in images])
    torch.testing.assert_close(batch["pixel_values"], crops, rtol=0, atol=1e-6)


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
        (changed(user="half \ud83d"), "no valid Unicode"),
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


def test_answers_come_in_order_whatever_the_batch(processor, examples):
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    data = ConversationDataset(examples[:9], processor, for_generation=True)
    wanted = []
    for i in range(len(data)):  # one at a time, by transformers' generate alone
        encoded = {k: v for k, v in Collator(processor, "left")([data[i]]).items() if k != "labels"}
        ids = model.generate(**encoded, do_sample=False, max_new_tokens=12)
        new = ids[0, encoded["input_ids"].shape[1] :]
        wanted.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1
    for batch_size in (1, 4, 16):
        assert generate_answers(model, processor, data, batch_size, 12, disable_tqdm=True) == wanted


if SNAPSHOT:

    def test_ids_with_the_real_tokenizer():
        processor = Phi3VProcessor.from_pretrained(SNAPSHOT, num_crops=4)
        turns = [{"images": [], "user": "Q", "assistant": "A1"}, {"images": [], "user": "Q2", "assistant": "yes"}]
        encoded = encode_conversation(processor, turns)
        labels = encoded["labels"][encoded["labels"] != -100].tolist()
        assert labels == [319, 29896, 32007, 29871, 13, 4874, 32007, 29871, 13, 32000]
        prompt = encode_conversation(processor, turns[:1], for_generation=True)["input_ids"].tolist()
        assert prompt == [1, 32010, 29871, 13, 29984, 32007, 29871, 13, 32001]
