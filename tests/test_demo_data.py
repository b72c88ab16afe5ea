"""The demo: its archive of videos, its tokenizer and its base checkpoint."""

import hashlib
import string
import sys
import tarfile
from collections import Counter
from pathlib import Path

import av
import pytest

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))

import digits  # noqa: E402
import make_base  # noqa: E402
import make_data  # noqa: E402

from phi3v import Phi3VForCausalLM, Phi3VProcessor  # noqa: E402

CHECKPOINT = DEMO / "base_checkpoint"
# Shares of held-out answers that are right at least; 0.97, 0.98, 0.91 and 0.98 of 107 to 174 were when it was trained.
FLOORS = {
    "Which digit is on the left": 0.9,
    "Which digit is on the right": 0.9,
    "Which digits are shown": 0.8,
    "How large is the digit": 0.9,
}
VIDEOS = {"train": 16, "val": 8, "test": 8}


def make_archive(folder: Path) -> Path:
    folder.mkdir()
    make_data.main(["--task", "ucf101", "--out_dir", str(folder), "--videos", *map(str, VIDEOS.values())])
    return folder / "UCF101_subset.tar.gz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(tmp_path_factory.mktemp("demo") / "first")


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT)


def test_the_archive_is_the_same_on_every_run(archive, tmp_path):
    again = make_archive(tmp_path / "again")
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(archive.read_bytes()).digest()
    assert [path.name for path in again.parent.iterdir()] == [again.name], "a partial file is left"


def test_every_split_holds_eight_classes(archive):
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert names == sorted(names)
    for split, n in VIDEOS.items():
        counts = Counter(name.split("/")[2] for name in names if name.split("/")[1] == split)
        assert counts == dict.fromkeys(make_data.MOTIONS, n // 8), split
    assert "UCF101_subset/val/SlideUp/v_SlideUp_g01_c01.avi" in names


def test_videos_decode_as_promised(archive, tmp_path):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    lengths = []
    for path in sorted(tmp_path.rglob("*.avi")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            lengths.append(len(frames))
            assert (stream.codec_context.name, stream.codec_tag, stream.average_rate) == ("mpeg4", "XVID", 25), path
            assert {(frame.width, frame.height) for frame in frames} == {(320, 240)}
            assert len(frames) == stream.frames
    assert len(lengths) == sum(VIDEOS.values())
    assert 16 <= min(lengths) < max(lengths) <= 40


@pytest.mark.parametrize("number", ["0", "12"])
def test_a_number_of_videos_that_classes_cannot_share_is_refused(number, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_data.main(["--task", "ucf101", "--out_dir", str(tmp_path), "--videos", number, "8", "8"])
    assert exit_.value.code == 2
    assert f"train {number}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_splits_share_no_digit_image():
    seen = {split: {image.tobytes() for image in digits.load_digits(split)[0]} for split in digits.SHARES}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    assert sum(map(len, seen.values())) == 1797


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
