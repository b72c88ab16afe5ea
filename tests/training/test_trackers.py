"""Trackers get the metrics of a run and a sample of its answers."""

import re
from types import SimpleNamespace

import markdown
import pytest
from bad_texts import MARKDOWN
from helpers import SHORT, arguments
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import trackers


def test_trackers_get_the_same_names_and_pictures(toy_data, tmp_path):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--report_to", "tensorboard", "--eval_steps", "1"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.iterdir())) == 1  # one writer, open from the first evaluation to the last
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    names = {"train/loss", "train/learning_rate", "eval/accuracy", "perf/mfu", "perf/tokens_per_second"}
    assert names <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 1, 2, 2]  # before, during and after
    assert any(tag.startswith("eval_samples/") for tag in tags["images"])


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_samples_are_sent_in_the_form_that_other_trackers_take(tracker):
    """A stand-in for the package records the calls. The packages themselves were tried by hand."""
    logged, pandas_frames = [], []
    package = SimpleNamespace(
        Image=lambda image, caption=None: ("image", image.size, caption),
        Table=lambda **kwargs: pandas_frames.append(kwargs) or kwargs,
        log=logged.append,
    )
    rows = [[Image.new("RGB", (4, 2)), "id", "q", "a", "b", "c", 1.0], [None, "id", "q", "a", "b", "c", 0.0]]
    columns = ["images", "id", "question", "answers", "before", "after", "score"]
    getattr(trackers, f"_to_{tracker}")(package, columns, rows)
    (content,) = logged
    if tracker == "wandb":
        assert content["eval/sample_images"] == [("image", (4, 2), "q c")]
        assert content["eval/samples"]["data"] == [row[1:] for row in rows]
    else:
        frame = content["eval/samples"]["dataframe"]
        assert list(frame.columns) == columns and frame["images"][0] == ("image", (4, 2), None)


def test_a_tracker_that_is_not_installed_is_named(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(InputError, match="--report_to: WandbCallback requires wandb"):
        script.main(arguments(toy_data, tmp_path, *SHORT, "--report_to", "wandb"))


@pytest.mark.parametrize("text", MARKDOWN, ids=ascii)
def test_tensorboard_shows_texts_as_they_are(text):
    shown = []
    writer = SimpleNamespace(add_text=lambda name, text, step: shown.append(text), flush=lambda: None)
    for value in (text, "plain"):
        trackers._to_tensorboard(writer, ["images", "id", "question"], [[None, value, value]], 1)
    forms = [re.findall("<[^>]*>", markdown.markdown(table, extensions=["tables", "fenced_code"])) for table in shown]
    assert forms[0] == forms[1]
