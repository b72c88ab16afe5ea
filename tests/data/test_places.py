"""Images between pieces of text stand in the prompt exactly where they are written, and numbers agree everywhere."""

import random

import pytest
import torch
from helpers import CHECKPOINT
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.data.check import check_images
from phi3v.data.conversations import ConversationDataset, chat_text, encode_conversation
from phi3v.data.kept_sizes import key_of
from phi3v.data.places import places_problem, put_in_place, text_with_tags
from phi3v.data.preview import render_example
from phi3v.errors import InputError
from phi3v.model.chat import join_pieces
from phi3v.model.processing_phi3v import image_tag

IMAGE = Image.new("RGB", (60, 40))  # 13 tokens with one crop
TURNS = [
    {"images": [IMAGE, IMAGE], "user": "1: <image> 2: <image> Which?", "assistant": "2", "places": True},
    {"images": [], "user": "Why?", "assistant": "no"},
]
TURNS[0]["system"] = "Be brief."
SYSTEM, USER, ASSISTANT, END, LAST, LINE = 509, 511, 508, 510, 507, [325, 13]
# fmt: off
PIECES = [  # (ids, whether they are the first answer, or the second)
    ([1, SYSTEM, *LINE, 274, 303, 396, 375, 342, 260, END, *LINE], 0),  # Be brief.
    ([USER, *LINE, 262, 271, 325, *[-1] * 13], 0),  # 1: and the image
    ([1, 325, 325, 263, 271, 325, *[-2] * 13], 0),  # 2: and the image
    ([1, 325, 367, 272, END, *LINE, ASSISTANT], 0), ([325, 263, END, *LINE], 1),  # Which? 2
    ([USER, *LINE, 295, 306, 323, 272, END, *LINE, ASSISTANT], 0), ([411, END, *LINE, LAST], 2),  # Why? no
]
# fmt: on
IDS = [token for ids, _ in PIECES for token in ids]


def labels_of(*answers):
    return [token if answer in answers else -100 for ids, answer in PIECES for token in ids]


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=1)


@pytest.mark.parametrize(
    ("train", "loss_on", "learned"),
    [
        ((None, None), "all", (1, 2)),
        ((True, True), "all", (1, 2)),
        ((None, None), "last", (2,)),
        ((False, None), "all", (2,)),
        ((None, False), "all", (1,)),
        ((False, None), "last", (2,)),
        ((False, False), "all", ()),
    ],
)
def test_ids_and_labels_written_by_hand(train, loss_on, learned, processor):
    turns = [turn | ({} if t is None else {"train": t}) for turn, t in zip(TURNS, train, strict=True)]
    encoded = encode_conversation(processor, turns, loss_on=loss_on)
    assert encoded["input_ids"].tolist() == IDS and encoded["labels"].tolist() == labels_of(*learned)
    data = ConversationDataset([{"id": 1, "conversations": turns}], processor, loss_on=loss_on)
    assert data[0]["labels"].tolist() == labels_of(*learned)
    assert data.size(0)[:4] == (len(IDS), 26, 4, sum(len(ids) for ids, answer in PIECES if answer in learned))
    prompt = encode_conversation(processor, turns, for_generation=True)
    assert prompt["input_ids"].tolist() == IDS[: len(IDS) - len(PIECES[-1][0])]
    assert not data[~0]["labels"].ne(-100).any()


def test_the_printed_example_shows_images_where_they_stand(processor):
    turns = [TURNS[0] | {"train": False}, TURNS[1]]
    _, text, _ = render_example(ConversationDataset([{"id": 1, "conversations": turns}], processor))
    image = "<image {}: 1 x 1 sub-crops and a global crop, 13 tokens>"
    start = text.replace(" ", "").replace("<s>", "")
    for piece in ("<|system|>\nBebrief.<|end|>", f"1:{image.format(1)}2:{image.format(2)}Which?", "2<|end|>"):
        assert piece.replace(" ", "") in start
    assert start.count("[[") == 1 and start.endswith("[[no<|end|>\n<|endoftext|>]]")


@pytest.mark.parametrize(
    ("user", "wanted", "as_if"),
    [
        ("Compare.", "<|image_3|><|image_4|>\nCompare.", "Compare."),
        ("<image>\n<image> Compare.", "<|image_3|><|image_4|>\nCompare.", "Compare."),
        ("1: <image>, 2: <image>. Compare", "1: <|image_3|>, 2: <|image_4|>. Compare", None),
        ("<image> or <image>?", "<|image_3|> or <|image_4|>?", None),
        ("<image>\n<image>\nA\n<image>", None, None),
    ],
)
def test_tags_replace_places(user, wanted, as_if):
    turn = {"images": ["a", "b"], "user": user}
    if wanted is None:
        assert "3 of the places <image> for 2 images" in places_problem(user, 2)
        return
    assert places_problem(user, 2) is None
    put_in_place(turn)
    assert text_with_tags(turn, map(image_tag, (3, 4))) == wanted
    assert turn == {"images": ["a", "b"], "user": as_if} if as_if else turn["places"]


def test_a_text_of_a_script_keeps_the_word_image(processor):
    """Conversations that are not read from jsonl have no places: a question may hold the word."""
    turn = {"images": [IMAGE], "user": "Is <image> a tag?", "assistant": "yes"}
    wanted = "<|user|>\n<|image_1|>\nIs <image> a tag?<|end|>\n<|assistant|>\n"
    assert chat_text(processor, [turn], for_generation=True)[0] == wanted
    tokens = check_images([{"id": 1, "conversations": [turn]}], processor, 0, disable_tqdm=True).tokens_per_example
    assert tokens == [len(encode_conversation(processor, [turn])["input_ids"])]


WORDS = ["yes", "1: ", "\n", "Where is it?", "Größe ", " 🙂", "<b>", "a" * 40, "<imag"]


def random_turns(rng, image, max_turns=3):
    turns = []
    for _ in range(rng.randint(1, max_turns)):
        n, pieces = rng.choice([0, 1, 2, 3]), ["x"]
        pieces += rng.choices(WORDS, k=rng.randint(0, 6))
        for _ in range(n):
            pieces.insert(rng.randint(0, len(pieces)), "<image>")
        turns.append({"images": [image] * n, "user": "".join(pieces), "assistant": rng.choice(["yes", "no no"])})
        put_in_place(turns[-1])
        if rng.random() < 0.5:
            turns[-1]["train"] = rng.random() < 0.5
    if rng.random() < 0.5:
        turns[0]["system"] = "Be brief."
    return turns


@pytest.mark.parametrize("options", [{}, {"loss_on": "last"}, {"max_length": 60, "truncate": True}])
def test_random_conversations_are_measured_as_they_are_encoded(options, processor, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    rng, refused, inside = random.Random(0), 0, 0
    for _ in range(60):
        turns = random_turns(rng, str(tmp_path / "a.png"))
        inside += any("places" in turn for turn in turns)
        data = ConversationDataset([{"id": 1, "conversations": turns}], processor, **options)
        try:
            item = data[0]
        except InputError as e:
            with pytest.raises(InputError) as again:
                data.size(0)
            refused += str(again.value) == str(e)
            continue
        ids, targets = item["input_ids"], int((item["labels"] != -100).sum())
        assert data.size(0)[:4] == (len(ids), int((ids < 0).sum()), 2 * len(item["grids"]), targets)
        order = [int(-token) for token in dict.fromkeys(ids.tolist()) if token < 0]
        assert order == list(range(1, len(item["grids"]) + 1))
        if not options:
            prompt = ConversationDataset(data.conversations, processor, for_generation=True)[0]["input_ids"]
            assert torch.equal(ids[: len(prompt)], prompt)
            assert check_images(data.conversations, processor, 0, disable_tqdm=True).tokens_per_example == [len(ids)]
    assert inside > 20 and bool(refused) == ("truncate" in options)


def test_what_is_learned_is_part_of_what_identifies_an_example(processor, tmp_path):
    IMAGE.save(tmp_path / "a.png")
    turns = [turn | {"images": [str(tmp_path / "a.png")] * len(turn["images"])} for turn in TURNS]
    of_all, *others = (
        ConversationDataset([{"id": 1, "conversations": own}], processor, loss_on=loss_on)
        for own, loss_on in (
            (turns, "all"),
            (turns, "last"),
            ([turns[0], turns[1] | {"train": False}], "all"),
            ([turns[0] | {"system": "Be long."}, turns[1]], "all"),
            ([{k: v for k, v in turns[0].items() if k != "places"}, turns[1]], "all"),
        )
    )
    digests = [data.size(0).digest for data in (of_all, *others)]
    assert len(set(digests)) == 5
    last = ConversationDataset([{"id": 1, "conversations": [turns[0] | {"train": False}, turns[1]]}], processor)
    assert last.size(0) == others[0].size(0)  # they train the same
    assert key_of("a", [], []) != key_of(("a", (False, True)), [], []) != key_of(("a", (True, False)), [], [])


def test_an_example_whose_only_learned_answer_is_cut_off_is_named(processor):
    data = ConversationDataset(
        [{"id": "x", "conversations": TURNS}], processor, max_length=70, truncate=True, loss_on="last"
    )
    with pytest.raises(InputError, match="example x has 80 tokens, .*nothing would be left of its answer"):
        data[0]
    data.loss_on = "all"
    assert (data[0]["labels"] != -100).any()


# ---- Messages with parts, as the library takes them


def random_parts(rng):
    """Texts and images in any order. A text right behind images at the beginning has no blank at its own beginning,
    which would belong to the places."""
    kinds = rng.choices(["text", "image"], k=rng.randint(1, 5)) + ["text"]
    rng.shuffle(kinds)
    parts = [{"type": kind} for kind in kinds]
    for i, part in enumerate(parts):
        if part["type"] == "text":
            at_once = "image" in kinds[:i] and "text" not in kinds[:i]
            part["text"] = rng.choice(["Which?", "a\n", "x "] if at_once else ["1: ", " 2: ", "Which?", "\nb"])
    return parts


def test_messages_with_parts_are_what_training_makes_of_them(processor):
    rng, kinds = random.Random(1), set()
    for _ in range(200):
        messages, turns = [{"role": "system", "content": "Be brief."}], []
        for _ in range(rng.randint(1, 3)):
            parts = random_parts(rng)
            images = [IMAGE for part in parts if part["type"] == "image"]
            as_written = join_pieces([(part["type"] == "image", part.get("text", "<image>")) for part in parts])
            turns.append({"images": images, "user": as_written, "assistant": "yes"})
            put_in_place(turns[-1])
            kinds.add((bool(images), "places" in turns[-1]))
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
        turns[0]["system"] = "Be brief."
        wanted, _ = chat_text(processor, turns, for_generation=True)
        assert processor.apply_chat_template(messages[:-1], add_generation_prompt=True) == wanted
        # And back: what training makes of a turn is the content of a message.
        of_training = wanted.split("<|user|>\n")[1:]
        contents = [{"role": "user", "content": text.partition("<|end|>")[0]} for text in of_training]
        messages[1::2] = contents
        assert processor.apply_chat_template(messages[:-1], add_generation_prompt=True) == wanted
    assert kinds == {(False, False), (True, False), (True, True)}
