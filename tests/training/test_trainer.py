"""The script trains the same in one process and in two, however a step is divided into micro-batches."""

import json
import re

import pytest
import torch
from helpers import CHECKPOINT, ROOT, SHORT, SIX_STEPS, arguments, train_losses, train_resumable
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset
from phi3v.training.evaluation import generate_answers


@pytest.fixture(scope="module")
def one_process(toy_data, tmp_path_factory):
    """Six steps of SGD on four examples each, one example at a time. Any other division into micro-batches must give
    these numbers."""
    out = tmp_path_factory.mktemp("one")
    losses = train_losses(toy_data, out, *SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "1")
    return losses, load_file(out / "model.safetensors")


def assert_same_run(losses, out, one_process):
    expected_losses, expected = one_process
    assert len(losses) == 6 and losses == pytest.approx(expected_losses, rel=1e-5)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_a_step(toy_data, one_process):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    data = ConversationDataset(read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images"), processor)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    sums = []  # of each example: loss summed over its supervised tokens, and their number
    with torch.no_grad():
        for example in data:
            batch = Collator(processor, "right")([example])
            labels = batch.pop("labels")[:, 1:]
            scores = model(**batch).logits[:, :-1].flatten(0, 1)
            summed = torch.nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum")
            sums.append((summed.item(), (labels != -100).sum().item()))
    # The first step's four examples are the only four of the data with this mean.
    first = one_process[0][0]
    indices = range(len(sums))
    found = [
        (a, b, c, d)
        for a in indices
        for b in range(a)
        for c in range(b)
        for d in range(c)
        if abs(sum(sums[i][0] for i in (a, b, c, d)) / sum(sums[i][1] for i in (a, b, c, d)) - first) < 1e-6
    ]
    assert found


def test_micro_batches_of_four(toy_data, tmp_path, one_process):
    losses = train_losses(toy_data, tmp_path, *SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "4")
    assert_same_run(losses, tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_two_ranks_under_deepspeed_are_one_training(config, ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "1", "--deepspeed", ROOT / "ds_config" / f"{config}.json"]
    flags += ["--per_device_eval_batch_size", "1"]  # ZeRO-3 waits for ever if text and images make ranks differ
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first["losses"] == second["losses"] and first["engine"] == "DeepSpeedEngine"
    assert first == second or config == "zero3"  # where each rank keeps its own part of the weights
    # Six steps of two micro-batches. ZeRO-1 sends gradients once a step.
    assert first["gradients_sent"] == {"zero1": 6, "zero2": 12}.get(config, first["gradients_sent"])
    assert_same_run(first["losses"], tmp_path / "out", one_process)


@pytest.mark.slow
def test_two_ranks_without_deepspeed_are_one_training(ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "2", "--deepspeed", "none"]
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first == second and first["engine"] == "DistributedDataParallel"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


@pytest.mark.slow
def test_two_ranks_with_micro_batches_filled_by_tokens_are_one_training(ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--max_tokens_per_gpu", "900", "--deepspeed", ROOT / "ds_config" / "zero2.json"]
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first == second and first["engine"] == "DeepSpeedEngine"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


@pytest.mark.slow
def test_a_whole_run_with_frozen_vision_in_bf16(ranks, toy_data, tmp_path):
    flags = "--freeze_vision_model --bf16 --num_train_epochs 2 --batch_size 8 --batch_size_per_gpu 2".split()
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags, "--learning_rate", "1e-2"))
    assert first == second and len(first["losses"]) == 6
    out = tmp_path / "out"
    saved, base = load_file(out / "model.safetensors"), load_file(CHECKPOINT / "model.safetensors")
    assert saved.keys() == base.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        same = torch.equal(tensor, base[name].bfloat16())
        assert same == ("vision_embed_tokens" in name), name

    reports = [json.loads((out / f"eval_{when}.json").read_text()) for when in ("before", "after")]
    for report in reports:
        assert report["metric"] == "accuracy" and report["num_examples"] == len(report["predictions"]) == 6
        assert report["accuracy"] == sum(row["score"] for row in report["predictions"]) / 6
        assert [row["id"] for row in report["predictions"]] == [f"val-{i}" for i in range(6)]
    # What was saved is what was evaluated: it gives the reported answers again.
    model, processor = Phi3VForCausalLM.from_pretrained(out), Phi3VProcessor.from_pretrained(out)
    assert processor.image_processor.num_crops == 4
    conversations = read_conversations(toy_data / "ucf101_val.jsonl", toy_data / "images")
    data = ConversationDataset(conversations, processor, for_generation=True)
    answers = generate_answers(model, processor, data, 8, 8, compute_dtype=torch.bfloat16, disable_tqdm=True)
    assert answers == [row["prediction"] for row in reports[1]["predictions"]]


def test_text_alone(tmp_path):
    """Without any image the vision model gets no gradient, and training does not wait for one."""
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        turn = {"images": [], "user": "Is it?", "assistant": "yes"}
        lines = [json.dumps({"id": str(i), "conversations": [turn]}) for i in range(4)]
        (tmp_path / f"ucf101_{split}.jsonl").write_text("\n".join(lines))
    flags = ["--deepspeed", "none", "--batch_size", "2", "--num_train_epochs", "10", "--learning_rate", "3e-3"]
    losses = train_losses(tmp_path, tmp_path / "out", *flags)
    assert losses[-1] < losses[0] / 2


def test_max_steps_may_exceed_an_epoch_of_micro_batches_filled_by_tokens(toy_data, tmp_path):
    flags = ["--deepspeed", "none", "--max_tokens_per_gpu", "300", "--max_steps", "40", "--save_steps", "100"]
    assert train_resumable(toy_data, tmp_path, *flags).state.global_step == 40


def test_the_progress_bar_shows_the_loss(toy_data, tmp_path, capsys):
    script.main(arguments(toy_data, tmp_path, *SHORT, "--no_eval_before", "--no_tqdm", "false"))
    losses = re.findall(r"2/2 .*loss=(\d\S*)\]", capsys.readouterr().err)
    assert losses and float(losses[-1]) > 0
