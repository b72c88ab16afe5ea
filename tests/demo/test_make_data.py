"""The demo's data: its archive of videos and its tables."""

import hashlib
import sys
import tarfile
from collections import Counter
from pathlib import Path

import av
import datasets
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "demo"))

import digits  # noqa: E402
import make_data  # noqa: E402

VIDEOS = {"train": 16, "val": 8, "test": 8}


def make_archive(folder: Path) -> Path:
    folder.mkdir()
    make_data.main(["--task", "ucf101", "--out_dir", str(folder), "--videos", *map(str, VIDEOS.values())])
    return folder / "UCF101_subset.tar.gz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_archive(tmp_path_factory.mktemp("demo") / "first")


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


ROWS = {"docvqa": (30, 6), "hateful_memes": (40, 20), "nlvr2": (40, 16)}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for task, rows in ROWS.items():
        make_data.main(["--task", task, "--out_dir", str(folder), "--rows", *map(str, rows)])
    return folder


TEXT = datasets.Value("string")
SCHEMAS = {
    "docvqa_1200_examples": {
        "id": TEXT,
        "image": datasets.Image(),
        "query": dict.fromkeys(("de", "en", "es", "fr", "it"), TEXT),
        "answers": datasets.List(TEXT),
        "words": datasets.List(TEXT),
        "bounding_boxes": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "answer": {
            "match_score": datasets.Value("float64"),
            "matched_text": TEXT,
            "start": datasets.Value("int64"),
            "text": TEXT,
        },
    },
    "the_cauldron": {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List(dict.fromkeys(("user", "assistant", "source"), TEXT)),
    },
}


def load(folder: Path, repo: str, config: str | None = None, split: str = "train") -> datasets.Dataset:
    return datasets.load_dataset(str(folder / repo), config, split=split, cache_dir=str(folder / "cache"))


def test_tables_load_as_the_hubs_do_and_have_their_schema(tables):
    assert load(tables, "docvqa_1200_examples").features == datasets.Features(SCHEMAS["docvqa_1200_examples"])
    assert len(load(tables, "docvqa_1200_examples")) == 30
    assert len(load(tables, "docvqa_1200_examples", split="test")) == 6
    for config, n in (("docvqa", 60), ("hateful_memes", 60), ("nlvr2", 56)):  # calls into one folder add up
        table = load(tables, "the_cauldron", config)
        assert table.features == datasets.Features(SCHEMAS["the_cauldron"]) and len(table) == n
        assert {len(images) for images in table["images"]} == {2 if config == "nlvr2" else 1}


def test_answers_cannot_be_guessed_from_the_questions(tables):
    memes = Counter(row["texts"][0]["assistant"] for row in load(tables, "the_cauldron", "hateful_memes"))
    assert memes == {"yes": 30, "no": 30}
    judged = [text for row in load(tables, "the_cauldron", "nlvr2") for text in row["texts"]]
    for beginning in ("The ", "At least"):
        answers = Counter(text["assistant"] for text in judged if text["user"].startswith(beginning))
        assert answers["True"] == answers["False"]


def test_answers_of_a_page_are_its_words(tables):
    for row in load(tables, "docvqa_1200_examples"):
        asked = row["query"]["en"].rstrip("?")[-1]
        number = row["words"][row["words"].index(asked) + 1]
        assert row["answers"][0] == number == row["answer"]["text"]


def test_tables_are_the_same_on_every_run(tables, tmp_path):
    make_data.main(["--task", "docvqa", "--out_dir", str(tmp_path), "--rows", *map(str, ROWS["docvqa"])])
    for path in (tmp_path / "docvqa_1200_examples").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tables / path.relative_to(tmp_path)).read_bytes()


def digest(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "cache" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_the_order_of_tasks_does_not_matter_and_folders_can_be_moved(tables, tmp_path):
    made, moved = tmp_path / "made", tmp_path / "elsewhere" / "moved"
    for task in [*reversed(ROWS), "nlvr2"]:
        make_data.main(["--task", task, "--out_dir", str(made), "--rows", *map(str, ROWS[task])])
    assert digest(made) == digest(tables)
    moved.parent.mkdir()
    made.rename(moved)
    assert len(load(moved, "the_cauldron", "docvqa")) == 60


@pytest.mark.parametrize("task", ROWS)
def test_evaluation_rows_come_first_and_show_other_digit_images(task, monkeypatch, tmp_path):
    split_of, drawn = {}, []
    for split in digits.SHARES:
        split_of |= {image.tobytes(): split for image in digits.load_digits(split)[0]}
    monkeypatch.setattr(make_data, "draw", lambda canvas, digit, *rest: drawn.append(split_of[digit.tobytes()]))
    monkeypatch.setattr(make_data, "write_parquet", lambda folder, parts: None)
    n_train, n_eval = ROWS[task]
    getattr(make_data, f"make_{task}")(tmp_path, n_train, n_eval)
    if task == "docvqa":  # six digits a page; the Cauldron's pages come last
        assert drawn == ["train"] * 6 * n_train + ["val"] * 6 * n_eval + ["train"] * 12 * n_train
    else:
        k = 2 if task == "nlvr2" else 1  # digits a row
        assert drawn == ["val"] * k * n_eval + ["train"] * k * n_train


def rows_and_labels(task: str, monkeypatch, folder: Path) -> tuple[list[dict], list[int]]:
    """The rows of a full-size table without their pictures, and the digit that each picture shows."""
    labels, written = [], {}
    monkeypatch.setattr(make_data, "draw_digit", lambda digits, label, rng: labels.append(int(label)))
    monkeypatch.setattr(make_data, "png", lambda image: None)
    monkeypatch.setattr(make_data, "write_parquet", lambda folder, parts: written.update(parts))
    getattr(make_data, f"make_{task}")(folder, *make_data.SIZES[task])
    return written[f"{task}/train"], labels


def test_captions_match_half_the_pictures_and_answers_are_right(monkeypatch, tmp_path):
    rows, labels = rows_and_labels("hateful_memes", monkeypatch, tmp_path)
    counts = Counter()
    for row, label in zip(rows, labels, strict=True):
        (text,) = row["texts"]
        said = "odd" if "an odd number" in text["user"] else "even"
        assert text["assistant"] == ("yes" if said == ("even", "odd")[label % 2] else "no")
        counts[said, text["assistant"]] += 1
    assert set(counts.values()) == {len(rows) // 4}


def test_statements_are_right_and_their_answers_cannot_be_guessed(monkeypatch, tmp_path):
    rows, labels = rows_and_labels("nlvr2", monkeypatch, tmp_path)
    answers = {}
    for row, left, right in zip(rows, labels[::2], labels[1::2], strict=True):
        for text in row["texts"]:
            shown = {"The left": [left], "The righ": [right], "At least": [left, right]}[text["user"][:8]]
            parities = {("even", "odd")[digit % 2] for digit in shown}
            true = left > right if "larger" in text["user"] else any(f"{p} number" in text["user"] for p in parities)
            assert text["assistant"] == str(true), (text, left, right)
            answers.setdefault(text["user"], []).append(true)
    assert len(answers) == 7
    for statement, true in answers.items():
        assert abs(sum(true) / len(true) - 0.5) < 0.06, statement
    firsts = Counter((row["texts"][0]["user"].split()[1], row["texts"][0]["assistant"]) for row in rows[:500])
    for word in ("left", "right", "least"):
        assert abs(firsts[word, "True"] - firsts[word, "False"]) < 30, word


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "nlvr2", "--rows", "0", "5"], "--rows 0 5"),
        (["--task", "nlvr2", "--videos", "8", "8", "8"], "--videos is not for --task nlvr2"),
        (["--task", "ucf101", "--rows", "8", "8"], "--rows is not for --task ucf101"),
        (["--task", "vqa"], "vqa"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_data.main([*flags, "--out_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    flags = ["--task", "docvqa", "--out_dir", str(tmp_path), "--rows", "4", "2"]
    make_data.main(flags)
    before = digest(tmp_path)

    def fail(table, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk is full")

    monkeypatch.setattr(make_data.Dataset, "to_parquet", fail)
    with pytest.raises(SystemExit):
        make_data.main(flags)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: disk is full")
    assert digest(tmp_path) == before
