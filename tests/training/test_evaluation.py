"""Answers that are generated for an evaluation, and the model that evaluates best."""

import json

import pytest
import torch
from helpers import CHECKPOINT, SHORT, arguments, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset
from phi3v.errors import InputError
from phi3v.training.evaluation import Evaluation, generate_answers, new_evaluation
from phi3v.training.output_folder import folder_for_evaluation


def test_answers_come_in_order_whatever_the_batch(processor, toy_examples):
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    data = ConversationDataset(toy_examples[:9], processor, for_generation=True)
    wanted = []
    for i in range(len(data)):  # one at a time, by transformers' generate alone
        encoded = {k: v for k, v in Collator(processor, "left")([data[i]]).items() if k != "labels"}
        ids = model.generate(**encoded, do_sample=False, max_new_tokens=12)
        new = ids[0, encoded["input_ids"].shape[1] :]
        wanted.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1
    for batch_size in (1, 4, 16):
        assert generate_answers(model, processor, data, batch_size, 12, disable_tqdm=True) == wanted


@pytest.mark.parametrize(
    ("batch_size", "lower"), [(4, "--per_device_eval_batch_size, which is 4"), (1, "--num_crops or")]
)
def test_memory_that_runs_out_names_what_to_lower(batch_size, lower, processor, toy_examples, monkeypatch):
    def generate(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Phi3VForCausalLM, "generate", generate)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    data = ConversationDataset(toy_examples[:4], processor, for_generation=True)
    with pytest.raises(InputError, match=f"^memory ran out while answers were generated: lower {lower}"):
        generate_answers(model, processor, data, batch_size, 12, disable_tqdm=True)


def test_a_prediction_belongs_to_its_example_although_others_are_left_out(processor, toy_examples):
    data = ConversationDataset(toy_examples[:6], processor, for_generation=True)
    for left_out, wanted in (
        ({}, [0, 1, 2, 3, 4, 5]),
        ({0: "bad", 2: "bad", 3: "bad"}, [1, 4, 5]),
        ({5: "bad"}, [0, 4]),
    ):
        evaluation = Evaluation(data, "m", lambda prediction, answers: 0, 8, torch.float32, left_out)
        positions = range(len(wanted)) if len(wanted) != 2 else (0, 4)
        for position, index in zip(positions, wanted, strict=True):
            images = [image for turn in toy_examples[index]["conversations"] for image in turn["images"]]
            question = toy_examples[index]["conversations"][-1]["user"]
            assert evaluation.example(position) == {"images": images, "question": question}


# --keep_best


@pytest.mark.parametrize("last", [0.75, 0.5])
def test_the_best_model_is_kept(last, toy_data, tmp_path, monkeypatch, capsys):
    """And if it is better than the last one, the run says where it is."""
    values, weights = iter([0.25, 0.75, 0.5, last]), []
    report = Evaluation.report

    def scripted(self, model, args, **kwargs):
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return report(self, model, args, **kwargs) | {"accuracy": next(values)}

    monkeypatch.setattr(Evaluation, "report", scripted)
    flags = [*SHORT, "--max_steps", "3", "--eval_steps", "1", "--keep_best", "--no_eval_before"]
    script.main(arguments(toy_data, tmp_path, *flags))
    record = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert (record["step"], record["accuracy"]) == (2, 0.75)
    kept = Phi3VForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[1].items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in weights[2].items())
    line = f"a better one, accuracy 0.7500 at step 2, is in {tmp_path / 'best'}"
    for text in (capsys.readouterr().out, *((tmp_path / name).read_text() for name in ("report.html", "README.md"))):
        assert (line in text.replace("\\", "")) == (last < 0.75)


def test_a_kept_model_is_evaluated_with_its_own_crops(toy_data, tmp_path):
    flags = [*SHORT, "--no_eval_before", "--eval_steps", "1", "--keep_best", "--num_crops", "2"]
    script.main(arguments(toy_data, tmp_path / "out", *flags))
    best = ["--model_name_or_path", str(tmp_path / "out" / "best"), "--evaluate_only"]
    flags = [flag for flag in arguments(toy_data, tmp_path / "e", *best) if flag not in ("--num_crops", "4")]
    assert parse_command(script, flags)[0].num_crops == 2


def test_the_name_of_an_evaluation(tmp_path):
    for number, name in enumerate(("evaluation-train-500.json", "evaluation-train-500-2.json")):
        assert new_evaluation(tmp_path, "owner/model", "train[:500]") == tmp_path / name, number
    assert new_evaluation(tmp_path, str(tmp_path), None).name == "evaluation-held-out.json"
    assert new_evaluation(tmp_path, str(tmp_path), "../../x").name == "evaluation-x.json"
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "complete.json").touch()
    assert folder_for_evaluation(str(checkpoint)) == folder_for_evaluation(str(tmp_path)) == str(tmp_path)
    assert folder_for_evaluation("owner/model") is None
    assert new_evaluation(tmp_path, str(checkpoint), "val").name == "evaluation-checkpoint-7-val.json"
    assert new_evaluation(tmp_path / "checkpoint-7", str(checkpoint), "val").name == "evaluation-val.json"
