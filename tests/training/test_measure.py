"""A measurement before training finds the memory of a micro-batch, and leaves no trace."""

import copy

import pytest
import torch
from helpers import CHECKPOINT, arguments, digest_of_weights, parse_command, train_resumable

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.collate import PackingCollator
from phi3v.data.conversations import ConversationDataset
from phi3v.run import Run
from phi3v.training import measure

CPU = torch.device("cpu")
LORA = ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1", "--max_steps", "2", "--batch_size_per_gpu", "2"]


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(measure, "memory_in_use", lambda: 30)
    monkeypatch.setattr(measure, "peak_memory_since_release", lambda: 100)


@pytest.fixture(scope="module")
def batch(toy_data) -> dict:
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=2)
    data = ConversationDataset(read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images"), processor)
    found = PackingCollator(processor, 4096, share_images=True)([data[0], data[1]])
    found.pop("problems")
    return found


def adapted_model(tmp_path):
    args, _ = parse_command(script, arguments(tmp_path, tmp_path / "out", *LORA))
    return script.choose_trained(Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32), args)


def state(model) -> tuple:
    modes = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    return torch.get_rng_state().tolist(), modes, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["none", "all"])
def test_the_model_is_as_before(kind, batch, tmp_path):
    model = adapted_model(tmp_path).eval()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    seen = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    assert measure.measured_passes(model, batch, CPU, torch.bfloat16, kind) == 70
    assert len(seen) == sum(p.requires_grad for p in model.parameters())  # there was a backward pass
    assert state(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_too_little_memory_is_infinitely_much(batch, tmp_path, monkeypatch):
    model = adapted_model(tmp_path).eval()
    before = state(model)

    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "backward", fails)
    assert measure.measured_passes(model, batch, CPU, None, "all") == float("inf")
    assert state(model) == before
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure.measured_passes(model, batch, CPU, None, "none")
    assert state(model) == before


def test_training_does_not_depend_on_a_measurement(toy_data, tmp_path, monkeypatch):
    """Adapters with dropout, of which every step draws random numbers."""
    train_resumable(toy_data, tmp_path / "without", *LORA)
    fit, measured = Run.fit, []

    def measuring_fit(run, model, collate):
        rows = run.micro_batches.train_dataset.__getitems__([0, 1, 2])
        batch = collate(rows)
        batch.pop("problems")
        measured.append(measure.measured_passes(model, batch, CPU, None, "decoder"))
        return fit(run, model, collate)

    monkeypatch.setattr(Run, "fit", measuring_fit)
    train_resumable(toy_data, tmp_path / "with", *LORA)
    assert measured and digest_of_weights(tmp_path / "with") == digest_of_weights(tmp_path / "without")
