"""Training stops when evaluations no longer get better, at the same step whether it was interrupted or not."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from helpers import SHORT, arguments, digest_of_weights, parse_command, train

import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training.early_stopping import EarlyStopping
from phi3v.training.evaluation import Evaluation
from phi3v.training.stopping import Interrupted


def stopped_at(values, patience, watched="metric", key="eval_m", examples=None, max_steps=99, save="no"):
    """The step at which training stops, if evaluation n gives values[n]; None if it does not. And its control."""
    stopping = EarlyStopping(patience, watched)
    stopping.metric = "m"
    state = SimpleNamespace(log_history=[], global_step=0, max_steps=max_steps)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    for step, value in enumerate(values, 1):
        state.global_step = step
        entry = {key: value, "step": step, "eval_examples": examples[step - 1] if examples else 6}
        state.log_history += [{"loss": 1.0, "step": step}, entry]
        stopping.on_evaluate(SimpleNamespace(save_strategy=save), state, control, entry)
        assert (stopping.line is not None) == control.should_training_stop
        if control.should_training_stop:
            return step, stopping.line, control.should_save
    return None


@pytest.mark.parametrize(
    ("values", "patience", "more", "step", "best"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.3], 2, {}, 4, "0.2000 at step 2"),  # equal is not better
        ([0.1, 0.2, 0.1, 0.3, 0.2], 2, {}, None, None),
        ([0.1, 0.2, 0.1], 1, {}, 3, "0.2000 at step 2"),
        ([3.0, 2.0, 2.5, 2.4], 2, {"watched": "loss", "key": "eval_loss"}, 4, "2.0000 at step 2"),
        ([3.0, math.nan, math.nan], 2, {"watched": "loss", "key": "eval_loss"}, 3, "3.0000 at step 1"),
        ([math.nan, math.nan], 2, {"watched": "loss", "key": "eval_loss"}, 2, "it was NaN"),
        ([0.9, 0.1, 0.2, 0.1], 2, {"examples": [2, 6, 6, 6]}, None, None),  # the first was on other examples
        ([0.1, 0.1, 0.1], None, {}, None, None),
        ([0.1, 0.1, 0.1], 2, {"max_steps": 3}, None, None),  # that is the end anyway
    ],
)
def test_when_training_stops(values, patience, more, step, best):
    found = stopped_at(values, patience, **more)
    assert (found and found[0]) == step
    if best:
        span = "last evaluation;" if patience == 1 else f"last {patience} evaluations;"
        assert f"stopped early at step {step}: " in found[1] and best in found[1] and span in found[1]


def test_a_checkpoint_is_written_at_the_stop_if_the_run_writes_any():
    assert [stopped_at([1, 1], 1, save=save)[2] for save in ("no", "steps")] == [False, True]


def test_the_loss_must_be_there(tmp_path):
    with pytest.raises(InputError, match="--early_stopping_on loss: the evaluation set has no answer"):
        stopped_at([1.0], 1, watched="loss")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--early_stopping_patience 2", "--early_stopping_patience has no effect without --eval_steps"),
        (
            "--eval_steps 1 --early_stopping_on loss",
            "--early_stopping_on has no effect without --early_stopping_patience",
        ),
        ("--eval_steps 1 --early_stopping_patience 0", "--early_stopping_patience is 0, must be at least 1"),
        ("--eval_steps 1 --early_stopping_patience 1 --early_stopping_on m", "is m, must be metric or loss"),
    ],
)
def test_wrong_flags(flags, said, toy_data, tmp_path):
    with pytest.raises(InputError, match=said):
        parse_command(script, arguments(toy_data, tmp_path, *flags.split()))


# ---- Runs. Evaluations are those of the model, with scores that the test makes up.

FLAGS = [*SHORT, *"--max_steps 7 --eval_steps 2 --save_steps 1 --no_eval_before --max_eval_samples 2".split()]
FLAGS += "--batch_size 2 --max_new_tokens 1 --num_crops 1".split()
FLAGS += "--resume_from_checkpoint auto --use_lora --lora_rank 2 --lora_dropout 0.1".split()
PATIENT = [*FLAGS, "--early_stopping_patience", "2"]


@pytest.fixture
def scores(monkeypatch):
    """Set scores.interrupted to a step, and a signal comes in the evaluation of that step."""
    found = SimpleNamespace(trainer=None, interrupted=None, evaluated=[])
    report = Evaluation.report

    def scripted(self, model, args, on_batch=lambda: None, **kwargs):
        step = found.trainer.state.global_step if found.trainer else 0
        if step and step == found.interrupted:
            found.interrupted = None
            os.kill(os.getpid(), signal.SIGUSR1)
        whole = report(self, model, args, on_batch, **kwargs)
        found.evaluated.append(step)
        return whole | {"accuracy": {2: 0.5, 4: 0.25, 6: 0.5, 8: 0.75}.get(step, 0.0)}

    monkeypatch.setattr(Evaluation, "report", scripted)
    from phi3v.training import trainer as module

    init = module.RecipeTrainer.__init__

    def remember(self, **kwargs):
        init(self, **kwargs)
        found.trainer = self

    monkeypatch.setattr(module.RecipeTrainer, "__init__", remember)
    return found


def steps_of(folder) -> list[int]:
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_a_run_stops_early_and_is_finished(scores, toy_data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(toy_data, out, *PATIENT).state.global_step == 6
    line = "stopped early at step 6: accuracy has not improved in the last 2 evaluations; best 0.5000 at step 2"
    assert capsys.readouterr().out.count(line) == 1
    assert line in (out / "report.html").read_text() and steps_of(out)[-1] == 6
    assert train(toy_data, out, *PATIENT) is None
    assert "holds a finished run, which stopped early at step 6: there is nothing left to do" in capsys.readouterr().out

    # Killed after the last checkpoint: nothing is trained, and the rest is done again.
    weights = digest_of_weights(out)
    (out / "finished.json").unlink()
    assert train(toy_data, out, *PATIENT).state.global_step == 6 and line in capsys.readouterr().out
    assert digest_of_weights(out) == weights and (out / "finished.json").exists()

    # Another patience: the user is asked, and training goes on from where it stopped.
    more = [*FLAGS, "--early_stopping_patience", "3"]
    with pytest.raises(InputError, match="early_stopping_patience: 2 then, 3 now"):
        train(toy_data, out, *more)
    scores.evaluated.clear()
    trainer = train(toy_data, out, *more, "--resume_anyway")
    assert trainer.state.global_step == 7 and scores.evaluated == [7, 7] and not trainer.early_stopping.line
    assert "stopped_early_at" not in json.loads((out / "finished.json").read_text())


def test_an_interrupted_run_stops_at_the_same_step(scores, toy_data, tmp_path, capsys):
    train(toy_data, tmp_path / "whole", *PATIENT)
    # Killed between two evaluations, with the checkpoint of step 5 as the newest.
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", out / "checkpoint-5")
    assert train(toy_data, out, *PATIENT).state.global_step == 6
    assert digest_of_weights(out) == digest_of_weights(tmp_path / "whole")

    # A signal during an evaluation: the resumed run does that evaluation, and goes on as if nothing had happened.
    scores.interrupted, out = 4, tmp_path / "signal"
    with pytest.raises(Interrupted):
        train(toy_data, out, *PATIENT)
    assert steps_of(out)[-1] == 4 and not (out / "finished.json").exists()
    scores.trainer, scores.evaluated = None, []
    trainer = train(toy_data, out, *PATIENT)
    assert trainer.state.global_step == 6 and scores.evaluated[0] == 4
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [2, 4, 6]
    assert digest_of_weights(out) == digest_of_weights(tmp_path / "whole")


def test_a_run_that_was_killed_after_its_last_step_trains_no_further(toy_data, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--save_steps", "1", "--resume_from_checkpoint", "auto"]
    train(toy_data, tmp_path, *flags)  # two steps of the six in an epoch
    weights = digest_of_weights(tmp_path)
    (tmp_path / "finished.json").unlink()
    assert train(toy_data, tmp_path, *flags).state.global_step == 2 and digest_of_weights(tmp_path) == weights
