"""An image is either trained on or asked about."""

import itertools
import json
import pickle
import random

import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st

from phi3v.data.annotations import store_conversations
from phi3v.data.split import groups_of_shared_images, split_by_image, warn_of_shared_images
from phi3v.data.stored_lines import StoredLines
from phi3v.errors import InputError


def test_groups_are_connected_through_other_examples():
    images = [["a"], [], ["b"], ["a", "c"], ["c", "b"], [], ["d", "d"]]
    assert groups_of_shared_images(images) == [[0, 2, 3, 4], [1], [5], [6]]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.9, 0.01])
@pytest.mark.parametrize("n", [2, 9, 10, 11, 100, 257])
def test_every_nth_example_is_kept_if_no_image_is_shared(n, share):
    every = max(2, round(1 / share))
    wanted = set(range(every - 1, n, every))
    for images in ([[i] for i in range(n)], [[]] * n, [[i, f"{i} b", i] for i in range(n)]):
        if wanted:
            assert split_by_image(images, share) == wanted
        else:
            with pytest.raises(InputError, match=f"there are {n} examples, too few"):
                split_by_image(images, share)


@fuzz(200)
@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=2, max_size=80), st.floats(0.01, 0.99))
def test_no_image_is_on_both_sides(images, share):
    try:
        kept = split_by_image(images, share)
    except InputError as e:
        assert "too few" in str(e) or "are connected through images" in str(e)
        return
    assert kept == split_by_image(images, share) and 0 < len(kept) < len(images)
    on = [set(itertools.chain(*(own for i, own in enumerate(images) if (i in kept) == side))) for side in (True, False)]
    assert not on[0] & on[1]
    every, groups = max(2, round(1 / share)), groups_of_shared_images(images)
    assert len(kept) <= max(len(images) // every, min(map(len, groups)))


@pytest.mark.parametrize("questions", [1, 2, 5, 10])
def test_the_share_is_met(questions):
    images = [[picture] for picture in range(100) for _ in range(questions)]
    assert len(split_by_image(images, 0.1)) == 10 * questions
    random.Random(0).shuffle(images)
    assert len(split_by_image(images, 0.1)) == pytest.approx(10 * questions, abs=questions)


def test_the_smallest_group_is_kept_if_none_fits():
    assert split_by_image([["a"]] * 10 + [["b"]] * 3 + [["c"]] * 4, 0.1) == {10, 11, 12}
    with pytest.raises(InputError, match=r"all 12 examples are connected .* \(12 have logo.png\)"):
        split_by_image([["logo.png", f"{i}.png"] for i in range(12)], 0.1)


def example(*images):
    return {"id": 1, "conversations": [{"images": list(images[:1])}, {"images": list(images[1:])}]}


def test_a_warning_names_images_on_both_sides(capsys):
    train = [example("d/a.png", "d/b.png"), example("d/c.png"), example()]
    warn_of_shared_images(train, [example("d/e.png"), example()])
    assert capsys.readouterr().out == ""
    warn_of_shared_images(train, [example("d/e.png", "d/./b.png"), example("d/c.png", "d/c.png")])
    out = capsys.readouterr().out
    assert out.startswith("warning: 2 of the 3 images of the evaluation are also trained on") and out.count("\n") == 1
    assert "'d/b.png', 'd/c.png'" in out


def test_stored_examples_are_compared_without_reading_them_again(tmp_path, monkeypatch, capsys):
    names = ["a.png", "b.png", "folder/c.png", "d.png"]
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / name).touch()

    def stored(*names):
        turns = [{"images": [name], "user": "Which?", "assistant": "this"} for name in names]
        (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "conversations": turns}) + "\n")
        return store_conversations(tmp_path / "a.jsonl", tmp_path)

    train, evaluation = stored("a.png", "./folder/./c.png"), stored("b.png", "d.png")
    with monkeypatch.context() as patch:
        patch.setattr(StoredLines, "__getitem__", None)
        warn_of_shared_images(train, evaluation)
    assert capsys.readouterr().out == ""
    evaluation = stored("b.png", "folder//c.png")
    assert not stored("a.png").may_share_images(evaluation) and train.may_share_images(evaluation)
    for pair in ((train, evaluation), (pickle.loads(pickle.dumps(train)), evaluation), (list(train), evaluation)):
        warn_of_shared_images(*pair)
        assert capsys.readouterr().out.startswith("warning: 1 of the 2 images of the evaluation are also trained on")
