"""The validation loss is the mean over the tokens of the right answers, however they are packed and divided."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CHECKPOINT, SHORT, arguments, train

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset, encode_conversation
from phi3v.data.sampler import StepSampler
from phi3v.training import answer_loss as module
from phi3v.training.answer_loss import LastAnswers, answer_loss
from phi3v.training.evaluation import Evaluation


@pytest.fixture(scope="module")
def model():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def questions(processor, conversations, **options) -> ConversationDataset:
    return ConversationDataset(conversations, processor, for_generation=True, **options)


@torch.no_grad()
def by_hand(model, processor, conversations) -> list[torch.Tensor]:
    """The cross-entropies of the tokens of each last answer, computed one example at a time from logits."""
    found = []
    for example in conversations:
        turns = example["conversations"]
        whole = encode_conversation(processor, turns)
        start = len(encode_conversation(processor, turns, for_generation=True)["input_ids"])
        batch = Collator(processor, "right")([whole])
        batch.pop("labels")
        logits = model(**batch).logits[0]
        found.append(F.cross_entropy(logits[start - 1 : -1], whole["input_ids"][start:], reduction="none"))
    return found


def test_the_loss_is_that_of_single_examples_without_packing(model, processor, toy_examples):
    examples = toy_examples[:9]  # with one to three turns, and none to several images
    losses = by_hand(model, processor, examples)
    assert len({len(own) for own in losses}) > 2
    wanted = torch.cat(losses).double().mean().item()
    assert abs(wanted - sum(own.mean().item() for own in losses) / 9) > 1e-3  # the mean of means is another number
    for batch_size, most_tokens in ((1, math.inf), (4, math.inf), (9, math.inf), (9, 10)):
        answers = LastAnswers(questions(processor, examples))
        found, tokens = answer_loss(model, answers, batch_size, most_tokens, disable_tqdm=True)
        assert tokens == sum(map(len, losses)) and found == pytest.approx(wanted, rel=1e-6)


def test_examples_that_share_an_image_give_the_same_loss(model, processor, toy_examples):
    image = next(t["images"] for e in toy_examples for t in e["conversations"] if t["images"])
    turns = [{"images": image, "user": f"Question {i}?", "assistant": "yes " * i} for i in range(1, 5)]
    examples = [{"id": str(i), "conversations": [turn]} for i, turn in enumerate(turns)]
    found, _ = answer_loss(model, LastAnswers(questions(processor, examples)), 4, disable_tqdm=True)
    assert found == pytest.approx(torch.cat(by_hand(model, processor, examples)).double().mean().item(), rel=1e-6)


def test_one_turn_has_the_targets_of_training(processor, toy_examples):
    examples = [{**e, "conversations": e["conversations"][:1]} for e in toy_examples[:6]]
    answers, training = LastAnswers(questions(processor, examples)), ConversationDataset(examples, processor)
    for i in range(6):
        assert torch.equal(answers[i]["labels"], training[i]["labels"])


def test_earlier_answers_and_examples_that_fill_up_have_no_targets(processor, toy_examples):
    answers = LastAnswers(questions(processor, toy_examples[:3]))
    training = ConversationDataset(toy_examples[:3], processor)
    last, everything = ((data[2]["labels"] != -100).sum().item() for data in (answers, training))
    assert 0 < last < everything  # it has three turns
    assert (answers[~2]["labels"] == -100).all()


def test_empty_answers_and_unreadable_images_are_left_out(model, processor, toy_examples, tmp_path):
    examples = copy.deepcopy(toy_examples[:5])
    examples[0]["conversations"][-1]["assistant"] = "  "
    (tmp_path / "bad.png").write_bytes(b"no image")
    examples[1]["conversations"][0]["images"] = [str(tmp_path / "bad.png")]
    evaluation = Evaluation(questions(processor, examples, skip_bad=True), "m", lambda *_: 1.0, 2, torch.float32)
    args = script_args(tmp_path)
    report = evaluation.report(model, args, with_loss=True)
    losses = by_hand(model, processor, examples[2:])
    assert report["loss"] == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-6)
    assert (report["num_examples"], report["loss_examples"]) == (4, 3)
    assert report["loss_tokens"] == sum(map(len, losses)) and list(evaluation.left_out) == [1]
    for example in examples:
        example["conversations"][-1]["assistant"] = ""
    evaluation = Evaluation(questions(processor, examples, skip_bad=True), "m", lambda *_: 1.0, 2, torch.float32)
    assert "loss" not in evaluation.report(model, args, with_loss=True)


def script_args(tmp_path):
    from transformers import TrainingArguments

    more = {"use_cpu": True, "per_device_eval_batch_size": 2, "disable_tqdm": True, "report_to": "none"}
    return TrainingArguments(str(tmp_path), **more)


@pytest.mark.parametrize(("count", "world_size"), [(5, 2), (1, 3)])
def test_the_parts_of_all_ranks_make_the_whole(count, world_size, model, processor, toy_examples, monkeypatch):
    """Each rank computes as many micro-batches as the others, and their sums add up, also where a rank has nothing."""
    answers = LastAnswers(questions(processor, toy_examples[:count]))
    wanted, all_tokens = answer_loss(model, answers, 1, disable_tqdm=True)
    parts, calls = [], []
    monkeypatch.setattr(module, "gather_object", lambda own: parts.extend(own) or own)
    monkeypatch.setattr(module.ranks, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(module.ranks, "rank", lambda rank=rank: rank)
        answer_loss(model, answers, 1, disable_tqdm=True, on_batch=lambda rank=rank: calls.append(rank))
    assert len({calls.count(rank) for rank in range(world_size)}) == 1 and len(parts) == world_size
    assert sum(tokens for _, tokens in parts) == all_tokens
    assert sum(sum(sums) for sums, _ in parts) / all_tokens == pytest.approx(wanted, rel=1e-6)


def test_micro_batches_are_no_larger_than_those_of_training_and_generation(model, processor, toy_examples, monkeypatch):
    limits = []
    original = StepSampler.__init__

    def spy(self, sizes, *args, **kwargs):
        limits.append((kwargs["max_tokens"], max(size.tokens for size in sizes)))
        original(self, sizes, *args, **kwargs)

    monkeypatch.setattr(StepSampler, "__init__", spy)
    for batch_size, most_tokens in ((2, 10**9), (2, 1), (8, 1000)):
        answer_loss(model, LastAnswers(questions(processor, toy_examples[:4])), batch_size, most_tokens)
        limit, longest = limits.pop()
        assert limit == max(longest, min(batch_size * longest, most_tokens))


def test_the_loss_leaves_the_model_and_the_random_generators_alone(model, processor, toy_examples):
    model.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    answer_loss(model, LastAnswers(questions(processor, toy_examples[:4])), 2, disable_tqdm=True)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert model.training and all(p.grad is None and p.requires_grad for n, p in model.named_parameters() if "lm_" in n)
    model.eval()


def test_a_run_logs_the_loss_that_evaluate_only_finds(toy_data, tmp_path, capsys):
    out = tmp_path / "out"
    trainer = train(toy_data, out, *SHORT, "--eval_steps", "1", "--warmup_steps", "0")
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2] and all("eval_accuracy" in entry for entry in logged)
    before, after = (json.loads((out / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    assert before["loss"] > logged[0]["eval_loss"] > logged[1]["eval_loss"] == pytest.approx(after["loss"], rel=1e-6)
    output = capsys.readouterr().out
    assert f"loss {after['loss']:.4f} over {after['loss_tokens']} tokens of 6 answers" in output
    assert f"'eval_loss': '{logged[0]['eval_loss']:.4g}'" in output
    script.main(arguments(toy_data, tmp_path / "e", "--evaluate_only", "--model_name_or_path", out))
    alone = json.loads((tmp_path / "e" / "evaluation-val.json").read_text())
    assert {k: alone[k] for k in ("loss", "loss_tokens", "loss_examples")} == pytest.approx(
        {k: after[k] for k in ("loss", "loss_tokens", "loss_examples")}, rel=1e-6
    )


def test_without_eval_steps_reports_are_as_before(toy_data, tmp_path, capsys):
    train(toy_data, tmp_path, *SHORT)
    report = json.loads((tmp_path / "eval_after.json").read_text())
    assert list(report) == ["metric", "accuracy", "num_examples", "predictions"]
    assert "loss 2" not in capsys.readouterr().out.partition("eval_before.json")[2].splitlines()[0]
