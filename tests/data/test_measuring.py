"""Sizes that are counted by arithmetic are those of the encoded examples."""

import random
from pathlib import Path

import pytest
from helpers import CHECKPOINT
from PIL import Image

import finetune_hf_trainer_docvqa as docvqa
from phi3v import Phi3VProcessor
from phi3v.data import measuring, tables
from phi3v.data.conversations import ConversationDataset
from phi3v.data.measuring import measure
from phi3v.data.sizes import all_sizes
from phi3v.errors import InputError

WORDS = ["yes", "no", "\n", "Where is it?", "Größe", "🙂", "<b>", "a" * 40]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Files with images of odd sizes; the last one is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for i, size in enumerate([(1, 1), (57, 56), (56, 57), (300, 7), (9, 200), (64, 47), (33, 33)]):
        Image.new("RGB", size, (i, 2, 3)).save(folder / f"{i}.png")
    (folder / "9.png").write_bytes(b"no image")
    return sorted(map(str, folder.iterdir()))


def random_examples(images: list[str], n: int) -> list[dict]:
    rng = random.Random(0)
    examples = []
    for i in range(n):
        turns = []
        for _ in range(rng.randint(1, 3)):
            user, assistant = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2))
            turns.append({"images": rng.choices(images, k=rng.choice([0, 1, 2, 8])), "user": user})
            turns[-1]["assistant"] = assistant
        examples.append({"id": i, "conversations": turns})
    return examples


def expected(data: ConversationDataset, index: int) -> tuple:
    item = data[index]
    ids = item["input_ids"]
    labels = data.encode_text(index, data.chat(index)[0], item["grids"])[
        "labels"
    ]  # an example with a bad image has none
    crops = sum(h * w + 1 for h, w in item["grids"])
    return len(ids), (ids < 0).sum().item(), crops, (labels != -100).sum().item()


OPTIONS = {
    "training": {},
    "evaluation": {"for_generation": True},
    "cut off": {"max_length": 60, "truncate": True},
    "images that can't be read": {"skip_bad": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sizes_are_those_of_the_encoded_examples(options, images):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    skip, cut = options.get("skip_bad"), options.get("truncate")
    found = 0
    for example in random_examples(images if skip else images[:-1], 25):
        data = ConversationDataset([example], processor, **options)
        try:
            wanted = expected(data, 0)
        except InputError as e:
            with pytest.raises(InputError) as again:
                data.size(0)
            assert cut and str(again.value) == str(e)
            continue
        assert tuple(data.size(0))[:4] == wanted
        found += len(data[0]["input_ids"]) == 60
    assert not cut or found


def test_examples_that_are_measured_together_are_those_that_are_measured_one_by_one(processor, images):
    data = ConversationDataset(random_examples(images[:-1], 150), processor)  # two parts, and a rest
    assert [size for size, _ in measure(data, range(150))] == [data.size(i) for i in range(150)]


def test_tags_in_an_answer_count_as_in_the_labels(processor, images):
    """A table's texts may hold tags, whose tokens are targets. The tokens of image 100 have the id that labels have
    where there is no target."""
    for n in (1, 100):
        turns = [{"images": images[:1] * n, "user": "Which?", "assistant": f"This <|image_{n}|> one"}]
        data = ConversationDataset([{"id": 0, "conversations": turns}], processor)
        assert tuple(data.size(0))[:2] == expected(data, 0)[:2] and data.size(0).targets == expected(data, 0)[3]


def test_tags_without_an_image_are_an_error(processor):
    turns = [{"images": [], "user": "Which <|image_1|>?", "assistant": "yes"}]
    with pytest.raises(ValueError, match="image tags do not match"):
        ConversationDataset([{"id": 0, "conversations": turns}], processor).size(0)


def test_no_ids_are_made_and_a_row_of_a_table_is_read_once(toy_tables, processor, monkeypatch, tmp_path):
    monkeypatch.setattr("phi3v.data.kept_sizes.writable_cache", lambda: tmp_path)
    monkeypatch.setattr(Phi3VProcessor, "tokenize", None)
    train = docvqa.cauldron_questions(
        tables.load_table(
            "HuggingFaceM4/the_cauldron", "docvqa", "train", str(toy_tables), columns=tables.TEXTS_ABOUT_IMAGES
        )
    )
    rows, headers, undecoded, image_size = [], [], tables.undecoded, measuring.state_of_image
    monkeypatch.setattr(tables, "undecoded", lambda table, i: rows.append(i) or undecoded(table, i))
    monkeypatch.setattr(measuring, "state_of_image", lambda image: headers.append(0) or image_size(image))
    list(measure(ConversationDataset(train, processor), range(12)))
    assert rows == [0, 1, 2, 3] and len(headers) == 4 and len(train) == 12


def test_ranks_that_measure_neighbours_find_what_one_finds(processor, toy_examples, monkeypatch, tmp_path):
    monkeypatch.setattr("phi3v.data.kept_sizes.writable_cache", lambda: Path(tmp_path))
    alone = all_sizes(ConversationDataset(toy_examples, processor), "", disable_tqdm=True)
    parts = []
    for rank in range(5):
        monkeypatch.setattr("phi3v.data.sizes.rank", lambda rank=rank: rank)
        monkeypatch.setattr("phi3v.data.sizes.world_size", lambda: 5)
        parts += all_sizes(ConversationDataset(toy_examples, processor), "", disable_tqdm=True)
    assert parts == alone
