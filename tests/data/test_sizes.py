"""The size of an example is known without its images being decoded, and tells data sets apart."""

import pytest
from PIL import Image

from phi3v.data.conversations import ConversationDataset
from phi3v.data.sizes import all_sizes, fingerprint


def test_a_size_is_what_the_encoded_example_takes(processor, toy_examples):
    data = ConversationDataset(toy_examples, processor)
    for index, size in enumerate(all_sizes(data, "sizes", disable_tqdm=True)):
        encoded = data[index]
        assert size.tokens == len(encoded["input_ids"])
        assert size.image_tokens == (encoded["input_ids"] < 0).sum()
        assert size.targets == (encoded["labels"] != -100).sum()
        assert size.crops == sum(h * w + 1 for h, w in encoded["grids"])


def test_sizes_need_no_pixels(processor, tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((90, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:100])  # the header is whole, the pixels are missing
    turns = [{"images": [str(path)], "user": "Which?", "assistant": "yes"}]
    assert ConversationDataset([{"id": 1, "conversations": turns}], processor).size(0).crops == 2


CHANGES = {
    "the text": lambda turns, other: turns | {"user": "Why?"},
    "the answer": lambda turns, other: turns | {"assistant": "no"},
    "the image": lambda turns, other: turns | {"images": [other]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_of_data_depends_on(what, processor, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.effect_noise((40, 30), 50).save(tmp_path / "b.png")  # a larger file
    turn = {"images": [str(tmp_path / "a.png")], "user": "Which?", "assistant": "yes"}

    def of(*turns):
        examples = [{"id": i, "conversations": [turn]} for i, turn in enumerate(turns)]
        return fingerprint(all_sizes(ConversationDataset(examples, processor), "sizes", disable_tqdm=True))

    changed = CHANGES[what](turn, str(tmp_path / "b.png"))
    assert of(turn, changed) == of(dict(turn), dict(changed))
    assert len({of(turn), of(changed), of(turn, changed), of(changed, turn)}) == 4
