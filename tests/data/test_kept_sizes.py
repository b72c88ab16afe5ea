"""A later run measures only examples that are new or changed, and finds the same sizes."""

import os

import pytest
from helpers import CHECKPOINT
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.data import images, measuring
from phi3v.data.conversations import ConversationDataset
from phi3v.data.kept_sizes import KeptSizes
from phi3v.data.sizes import all_sizes
from phi3v.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three images; sizes are kept beside them."""
    monkeypatch.setattr("phi3v.data.kept_sizes.writable_cache", lambda: tmp_path / "cache")
    for i in range(3):
        Image.new("RGB", (40 + 30 * i, 60)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """The numbers of the examples that were measured, and not found among those that were kept."""
    measured, count = [], measuring._count
    monkeypatch.setattr(measuring, "_count", lambda data, i, *args: measured.append(i) or count(data, i, *args))
    return measured


def examples(folder) -> list[dict]:
    turns = [{"images": [str(folder / f"{i}.png")], "user": "Which?", "assistant": "yes"} for i in range(3)]
    turns.append({"images": [], "user": "No image?", "assistant": "no"})
    return [{"id": i, "conversations": [turn]} for i, turn in enumerate(turns)]


def sizes_of(data, processor, counted, **options):
    """The sizes, and which examples were measured, apart from the probes that every rank measures."""
    dataset = ConversationDataset(data, processor, **options)
    probes = [i for i in dict.fromkeys(i * (len(data) - 1) // 15 for i in range(16))]
    counted.clear()
    found = all_sizes(dataset, "", disable_tqdm=True)
    return found, counted[len(probes) :]


def test_nothing_is_measured_again(folder, processor, counted):
    data = examples(folder)
    first, measured = sizes_of(data, processor, counted)
    assert measured == [0, 1, 2, 3]
    images._size_in_file.cache_clear()
    assert sizes_of(data, processor, counted) == (first, [])
    again = Phi3VProcessor.from_pretrained(CHECKPOINT)
    assert sizes_of(data, again, counted) == (first, [])
    assert sizes_of([data[2], data[0]], again, counted) == ([first[2], first[0]], [])


def replaced(path, unnoticed=False):
    """Another image in a file; with `unnoticed` one of as many bytes, and with the time of the old one."""
    before = os.stat(path)
    Image.new("RGB", (200, 50)).save(path)
    if unnoticed:
        Image.new("RGB", (60, 70)).save(path)
        path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(path).st_size == before.st_size


CHANGES = {
    "an image": lambda folder, data: replaced(folder / "1.png"),
    "an image, of the same size and time": lambda folder, data: replaced(folder / "1.png", unnoticed=True),
    "the time of an image": lambda folder, data: os.utime(folder / "1.png", ns=(1, 1)),
    "a question": lambda folder, data: data[1]["conversations"][0].update(user="Which one is it?"),
    "an answer": lambda folder, data: data[1]["conversations"][0].update(assistant="no no"),
    "which image": lambda folder, data: data[1]["conversations"][0].update(images=[str(folder / "3.png")]),
    "a second image": lambda folder, data: data[1]["conversations"][0]["images"].append(str(folder / "0.png")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_example_that_has_changed_is_measured_again(change, folder, processor, counted, monkeypatch):
    Image.new("RGB", (500, 60)).save(folder / "3.png")
    sizes_of(examples(folder), processor, counted)
    data = examples(folder)
    change(folder, data)
    found, measured = sizes_of(data, processor, counted)
    assert measured == [1]
    monkeypatch.setattr("phi3v.data.kept_sizes.writable_cache", lambda: folder / "another")
    assert sizes_of(data, processor, counted) == (found, [0, 1, 2, 3])


def test_other_settings_and_another_tokenizer_are_other_sizes(folder, processor, counted):
    data = examples(folder)
    sizes_of(data, processor, counted)
    for settings in ({"num_crops": 2}, {"exif_rotate": True}):
        assert sizes_of(data, Phi3VProcessor.from_pretrained(CHECKPOINT, **settings), counted)[1] == [0, 1, 2, 3]
    other = Phi3VProcessor.from_pretrained(CHECKPOINT)
    other.tokenizer.add_tokens(["Which"])
    assert sizes_of(data, other, counted)[1] == [0, 1, 2, 3]


def test_kept_sizes_do_not_hide_that_an_example_is_too_long(folder, processor, counted):
    data = examples(folder)
    whole, _ = sizes_of(data, processor, counted)
    longest = max(size.tokens for size in whole)
    with pytest.raises(InputError, match=f"more than --max_length {longest - 1}"):
        sizes_of(data, processor, counted, max_length=longest - 1)
    cut, _ = sizes_of(data, processor, counted, max_length=longest - 1, truncate=True)
    assert max(size.tokens for size in cut) == longest - 1
    assert sizes_of(data, processor, counted) == (whole, [])


def test_an_image_that_could_not_be_read_is_looked_at_again(folder, processor, counted):
    (folder / "1.png").write_bytes(b"no image")
    data = examples(folder)
    for _ in range(2):
        found, measured = sizes_of(data, processor, counted, skip_bad=True)
    assert measured == [1]
    with pytest.raises(InputError, match="1.png can't be read"):
        sizes_of(data, processor, counted)
    (folder / "1.png").unlink()
    with pytest.raises(InputError, match="1.png can't be read"):
        sizes_of(data, processor, counted)


def test_damaged_files_and_folders_that_can_not_be_written_do_no_harm(folder, processor, counted, monkeypatch):
    data = examples(folder)
    first, _ = sizes_of(data, processor, counted)
    path = KeptSizes(processor).path
    whole = path.read_bytes()
    for content in (b"", b"\x80\x04pickle", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert sizes_of(data, processor, counted) == (first, [0, 1, 2, 3])
        assert path.read_bytes() == whole
    (folder / "file").touch()
    monkeypatch.setattr("phi3v.data.kept_sizes.writable_cache", lambda: folder / "file")
    assert sizes_of(data, processor, counted) == (first, [0, 1, 2, 3])


def test_the_file_does_not_grow_without_end(folder, processor, counted, monkeypatch):
    monkeypatch.setattr("phi3v.data.kept_sizes.MOST", 5)
    data = examples(folder)
    for number in range(3):
        data[3]["conversations"][0]["user"] = f"Question {number}?"
        sizes_of(data, processor, counted)
    assert KeptSizes(processor).rows.shape[1] == 5 and sizes_of(data, processor, counted)[1] == []
