"""The demo's tokenizer and its base checkpoint."""

import string
import sys

import pytest
from helpers import CHECKPOINT, ROOT

sys.path.insert(0, str(ROOT / "demo"))

import make_base  # noqa: E402
import make_data  # noqa: E402

from phi3v import Phi3VForCausalLM  # noqa: E402

# Shares of held-out answers that are right at least; 0.97, 0.94 and 0.90 of 153 to 306 were when it was trained.
# `count_right` goes by the first five words of a question.
FLOORS = {
    "Which digit is on the": 0.9,
    "Which digits are shown": 0.8,
    "How large is the digit": 0.8,
}


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT)


def test_tokenizer_has_the_real_ones_structure(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    for special in make_base.SPECIAL:
        assert len(tokenizer(special, add_special_tokens=False).input_ids) == 1
    ids = tokenizer("<|user|>\n1<|assistant|>\n1").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "<|user|>", "▁", "<0x0A>", "1", "<|assistant|>", "▁", "1"]


def test_digits_and_class_names_are_few_tokens(processor):
    for digit in string.digits:
        assert processor.tokenizer.tokenize(f"a{digit}{digit}") == ["▁a", digit, digit]
    for motion in make_data.MOTIONS:
        assert len(processor.tokenizer.tokenize(motion)) <= 2


def test_every_printable_character_survives(processor):
    text = string.printable + "é▲ two  spaces"
    ids = processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template(processor):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    render = processor.tokenizer.apply_chat_template
    whole = "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"
    assert render(turns, tokenize=False) == whole
    assert render(turns, tokenize=False, add_generation_prompt=True) == whole
    assert render(turns[:1], tokenize=False, add_generation_prompt=True) == "<|user|>\na<|end|>\n<|assistant|>\n"


def test_checkpoint_is_small_and_stops_at_its_end_tokens(processor, model):
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 2_000_000
    assert not [path.name for path in CHECKPOINT.iterdir() if path.suffix in (".bin", ".pt")]
    end = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == end
    assert model.generation_config.pad_token_id == end[1]


def test_checkpoint_reads_held_out_digits(processor, model):
    counts = make_base.count_right(model, processor, 300)
    for question, least in FLOORS.items():
        right, asked = counts[question]
        assert asked >= 10 and right / asked >= least, f"{question}: {right} of {asked}"
