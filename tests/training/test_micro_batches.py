"""How large micro-batches are, what is measured before training, and what is said when memory runs out."""

import pytest
from helpers import CHECKPOINT, arguments, parse_command

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import ConversationDataset
from phi3v.data.sizes import all_sizes
from phi3v.training.micro_batches import MicroBatches

PLAIN = ["--deepspeed", "none", "--batch_size", "8"]


@pytest.fixture(scope="module")
def dataset(toy_data) -> ConversationDataset:
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    data = ConversationDataset(read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images"), processor)
    all_sizes(data, "", disable_tqdm=True)
    return data


def micro_batches(dataset, folder, *flags, checkpoint=None, stored=None) -> MicroBatches:
    args, training_args = parse_command(script, arguments(folder, folder / "out", *PLAIN, *flags))
    return MicroBatches(args, training_args, dataset, script.choose_trained, checkpoint, stored or {})


def test_on_a_cpu_micro_batches_have_a_number_of_examples(dataset, tmp_path):
    found = micro_batches(dataset, tmp_path)
    found.divide(4096)
    assert found.plan.tokens is None and found.training_arguments().gradient_accumulation_steps == 8
    assert all(len(own) == 1 for own in found.sampler)
