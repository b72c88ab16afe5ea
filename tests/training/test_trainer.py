"""The script trains the same in one process and in two, however a step is divided into micro-batches."""

import json
import re

import pytest
import torch
from helpers import (
    CHECKPOINT,
    SHORT,
    SIX_STEPS,
    arguments,
    assert_same_run,
    loss_by_hand,
    losses_of,
    train,
    train_losses,
    train_resumable,
    write_written_data,
)

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset


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


@pytest.mark.parametrize(("at_once", "loss_on"), [(1, "all"), (4, "all"), (4, "last")])
def test_the_loss_is_that_of_the_learned_answers_by_hand(at_once, loss_on, made_once, tmp_path):
    """With images inside of texts, a text of the system, a turn that is not learned, alone and in one packed row."""
    data = made_once("written", write_written_data)
    flags = f"--max_steps 1 --batch_size 4 --batch_size_per_gpu {at_once} --deepspeed none --no_eval_before"
    trainer = train(data, tmp_path, *flags.split(), "--loss_on", loss_on)
    assert losses_of(trainer) == [pytest.approx(loss_by_hand(data, loss_on), rel=1e-6)]


def test_micro_batches_of_four(toy_data, tmp_path, one_process):
    losses = train_losses(toy_data, tmp_path, *SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "4")
    assert_same_run(losses, tmp_path, one_process)


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


@pytest.mark.parametrize("mode", ["--use_lora", "--bf16"])
def test_weights_that_are_on_the_device_are_not_copied(mode, toy_data, tmp_path, monkeypatch):
    """Neither by the Trainer, nor by accelerate, nor by evaluations: at real size a copy takes 8.3 GB."""
    moved, to = [], torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        result = to(tensor, *args, **kwargs)
        if isinstance(tensor, torch.nn.Parameter) and result.dtype == tensor.dtype and result is not tensor:
            moved.append(tensor.shape)
        return result

    monkeypatch.setattr(torch.Tensor, "to", counted)
    train_losses(toy_data, tmp_path, *SHORT, "--max_eval_samples", "2", mode)
    assert not moved
