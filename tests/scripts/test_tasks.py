"""Questions, answers and splits that each task reads from its data set, and the metric of each task."""

import datasets
import pytest
from helpers import CHECKPOINT, cauldron_features, parse_command, png_cell, texts_cell

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as ucf101
from phi3v import Phi3VProcessor
from phi3v.data.conversations import ConversationDataset
from phi3v.data.seen_images import without_seen_images
from phi3v.data.tables import FOLDER, PLACE, ROW
from phi3v.errors import BadExamples, InputError


def load(script, toy_tables, tmp_path, *flags):
    argv = ["--data_dir", str(toy_tables), "--output_dir", str(tmp_path), "--model_name_or_path", str(CHECKPOINT)]
    args, _ = parse_command(script, [*argv, *flags])
    return script.load_data(args)


def turns(example):
    return [(turn["user"], turn["assistant"], len(turn["images"])) for turn in example["conversations"]]


def test_hateful_memes(toy_tables, tmp_path, capsys):
    train, evaluation = load(memes, toy_tables, tmp_path)
    assert len(evaluation) == 500 and [turns(train[i]) for i in range(len(train))] == [
        [("Meme 500?", "no", 1)],
        [("Meme 502?", "no", 1)],
    ]
    assert "1 of 3 training rows left out: their images are in the evaluation set" in capsys.readouterr().out
    assert evaluation[3]["id"] == "3-0" and turns(evaluation[3]) == [("Meme 3?", "yes", 1)]


def test_nlvr2_has_an_example_for_each_statement_and_evaluates_the_first(toy_tables, tmp_path):
    train, evaluation = load(nlvr2, toy_tables, tmp_path)
    assert len(evaluation) == 500 and turns(evaluation[1]) == [("Statement 1.0", "False", 2)]
    assert [turns(example) for example in train] == [
        [("Statement 500.0", "False", 2)],
        [("Statement 502.0", "False", 2)],
    ]
    train, evaluation = load(nlvr2, toy_tables, tmp_path, "--eval_split", "train[500:]")
    assert len(evaluation) == 3
    examples = [turns(example) for example in train]
    assert [("Statement 1.0", "False", 2)] in examples and [("Statement 1.1", "True", 2)] in examples
    assert not any("Statement 500" in example[0][0] for example in examples)  # evaluated on, and so not trained on


def test_nlvr2_as_turns(toy_tables, tmp_path):
    train, evaluation = load(nlvr2, toy_tables, tmp_path, "--as_turns", "--eval_split", "train[500:]")
    assert turns(train[0]) == [("Statement 1.0", "False", 2), ("Statement 1.1", "True", 0)]
    assert all(len(turns(example)) == 1 for example in evaluation)


def test_docvqa_mini(toy_tables, tmp_path):
    train, evaluation = load(docvqa, toy_tables, tmp_path)
    assert [example["id"] for example in train] == ["train_10", "train_12"]  # picture 2 is in the test split
    assert turns(train[0]) == [("Question 10?\nAnswer briefly.", "Answer 10", 1)]
    assert evaluation[1]["answers"] == ["Answer 2", "2"] and turns(evaluation[1])[0][0].endswith("Answer briefly.")


def test_docvqa_full_asks_as_evaluation_does(toy_tables, tmp_path):
    train, evaluation = load(docvqa, toy_tables, tmp_path, "--full_train")
    assert len(train) == 6 and len(evaluation) == 2  # pages 0 and 3, with three questions each
    assert [turns(train[i])[0] for i in (0, 5)] == [
        ("Question 0.0?\nAnswer briefly.", "answer 0", 1),
        ("Question 3.2?\nAnswer briefly.", "answer 2", 1),
    ]


def test_images_of_a_table_are_encoded(toy_tables, tmp_path):
    train, _ = load(nlvr2, toy_tables, tmp_path)
    encoded = ConversationDataset(train[:1], Phi3VProcessor.from_pretrained(CHECKPOINT))[0]
    assert encoded["tiles"].shape == (2, 56, 56, 3)


def test_folders_can_be_moved(toy_tables, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "the_cauldron").symlink_to(toy_tables / "the_cauldron")
    assert len(load(memes, moved, tmp_path / "out")[1]) == 500


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "data" / "the_cauldron" / "hateful_memes" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)

    def fails(rows, message):
        datasets.Dataset.from_list(rows, features=cauldron_features()).to_parquet(path)
        with pytest.raises(InputError, match=message):
            load(memes, tmp_path / "data", tmp_path / "out", "--eval_split", "train[:1]")

    config = "configs:\n- config_name: hateful_memes\n  data_files: hateful_memes/train-*\n"
    (tmp_path / "data" / "the_cauldron" / "README.md").write_text(f"---\n{config}---\n")
    good = {"images": [png_cell(0)], "texts": [texts_cell("Is it?", "no")]}
    fails([good, good], "every training image is in the evaluation set")
    fails([good, {"images": [png_cell(1)], "texts": [texts_cell("Is it?", "")]}], r"row 1: texts\[0\].assistant is ''")
    fails(
        [good, {"images": [png_cell(1)], "texts": [texts_cell("Is <|image_2|>?", "no")]}],
        r"row 1: texts\[0\].user holds",
    )
    fails([good, {"images": [{"bytes": b"no image"}], "texts": []}], r"row 1.*: its image can't be read")
    fails([good, {"images": [None], "texts": []}], r"row 1.*: its image can't be read")
    fails([good, {"images": [png_cell(1)], "texts": None}], "row 1: texts is missing")


def test_bad_rows_are_left_out(capsys):
    """Where a text is bad, its question; where an image is, this is seen later, when it is needed."""

    def table(*rows):
        rows = [{"images": [png_cell(number)], "texts": texts} for number, texts in enumerate(rows)]
        made = datasets.Dataset.from_list(rows, features=cauldron_features())
        places = [f"a table, row {row}" for row in range(len(made))]
        made = made.add_column(ROW, list(range(len(made)))).add_column(PLACE, places)
        return made.add_column(FOLDER, ["."] * len(made))

    good, bad_text, tag = texts_cell("Is it?", "no"), texts_cell("Is it?", ""), texts_cell("<video> Is it?", "no")
    rows = table([good, bad_text, bad_text, good], [bad_text], None, [tag, good])
    for script, wanted in ((memes, ["0-0", "0-3", "3-0", "3-1"]), (nlvr2, ["0-0", "0-3", "3-0", "3-1"])):
        bad = BadExamples(skip=True)
        build = script.questions if script is memes else script.statements
        assert [example["id"] for example in build(rows, bad=bad)] == wanted
        assert len(bad.left_out) == 4 and "row 0: texts[2].assistant is ''" in bad.left_out[1]
        out = capsys.readouterr().out
        assert "4 of 8 examples are left out" in out and "1 examples hold a tag such as <video>" in out
    made = nlvr2.statements(table([bad_text, good, good]), as_turns=True, bad=BadExamples(skip=True))
    assert [example["id"] for example in made] == ["0-1"] and len(turns(made[0])) == 2
    made = nlvr2.statements(table([bad_text, good, good]), first_only=True, bad=BadExamples(skip=True))
    assert [example["id"] for example in made] == ["0-1"] and len(turns(made[0])) == 1

    bad, rows = BadExamples(skip=True), [(0, "Q?", ["a"]), (1, "", ["a"]), (2, "Q?", []), (3, None, ["a"])]
    rows = [{"image": png_cell(i), "query": q and {"en": q}, "answers": a, "id": str(i), ROW: i} for i, q, a in rows]
    rows[1]["query"] = {"en": ""}
    assert [example["id"] for example in docvqa.questions(datasets.Dataset.from_list(rows), bad)] == ["0"]
    assert [line.split(": ")[0][-5:] for line in bad.left_out] == ["row 1", "row 2", "row 3"]


def test_images_that_cannot_be_read_are_left_out_later():
    def table(*images):
        made = datasets.Dataset.from_list([{"images": [image], "texts": []} for image in images], cauldron_features())
        places = [f"a table, row {row}" for row in range(len(made))]
        made = made.add_column(ROW, list(range(len(made)))).add_column(PLACE, places)
        return made.add_column(FOLDER, ["."] * len(made))

    train, evaluation = (
        table(png_cell(0), {"bytes": b"no image"}, png_cell(1)),
        table(png_cell(1), {"bytes": b"no image"}),
    )
    with pytest.raises(InputError, match=r"row 1.*: its image can't be read"):
        without_seen_images(train, evaluation)
    assert without_seen_images(train, evaluation, BadExamples(skip=True))[ROW] == [0, 1]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("12", ["12"], 1.0),
        ("", ["12"], 0.0),
        ("Hello", ["hello"], 1.0),  # case does not count
        ("hallo", ["hello"], 0.8),  # one of five letters
        ("abcd", ["abxy"], 0.0),  # a distance of 0.5 is not below the threshold
        ("abcde", ["abcxy"], 0.6),
        ("12", ["99", "123", "12"], 1.0),  # the nearest answer counts
        ("123", ["12", "1"], 2 / 3),
        ("  new   york ", ["New York"], 1.0),
        ("Straße", ["strasse"], 5 / 7),
        ("cafe\u0301", ["Café"], 1.0),  # the accent as a sign of its own
        ("ÉTÉ", ["été"], 1.0),
        ("2.5", ["25"], 2 / 3),
        ("$1,000", ["1,000"], 5 / 6),
    ],
)
def test_anls(prediction, answers, expected):
    assert docvqa.score(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("script", [memes, nlvr2, ucf101])
def test_exact_match(script):
    assert script.score(" Yes. ", ["yes"]) == 1.0 and script.score("yes", ["no", "YES."]) == 1.0
    assert script.score("yes it is", ["yes"]) == 0.0 and script.score("", ["yes"]) == 0.0
