"""How large micro-batches are, what is measured before training, and what is said when memory runs out."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import CHECKPOINT, arguments, parse_command, real_size_model, train_resumable
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VProcessor
from phi3v.arguments import parse_arguments
from phi3v.data.annotations import read_conversations
from phi3v.data.collate import PackingCollator
from phi3v.data.conversations import ConversationDataset
from phi3v.data.sizes import Size, all_sizes
from phi3v.errors import InputError
from phi3v.training import micro_batches as micro_batches_module
from phi3v.training.estimate import Estimate
from phi3v.training.micro_batches import MicroBatches
from phi3v.training.settings import fills_by_default
from phi3v.training.workload import workload_of_packing

PLAIN = ["--deepspeed", "none", "--batch_size", "8"]
NOT_RECOMPUTED = ["--activation_checkpointing", "false"]


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


@pytest.fixture
def gpu(monkeypatch):
    """torch reports a GPU, on which nothing is computed: `measured` says what each micro-batch takes."""
    found = SimpleNamespace(share=1.0, measured=[], others=[])

    def measured_passes(model, batch, device, dtype, kind):
        found.measured.append((batch["input_ids"].shape[1], kind, dtype))
        expected = found.estimate.passes(workload_of_packing(batch["packing"]), kind)
        return found.share(expected) if callable(found.share) else found.share * expected

    monkeypatch.setattr(micro_batches_module, "measured_passes", measured_passes)
    monkeypatch.setattr(micro_batches_module, "gather_object", lambda own: own + [f * own[0] for f in found.others])
    return found


def planned_on(gpu, monkeypatch, dataset, folder, *flags, room=1500, stored=None, checkpoint=None) -> MicroBatches:
    """The micro-batches of a run with a GPU where `room` tokens fit without activation checkpointing."""
    args, training_args = parse_command(script, arguments(folder, folder / "out", *PLAIN, *flags))
    if args.max_tokens_per_gpu is None and "--batch_size_per_gpu" not in flags:
        args.max_tokens_per_gpu = "auto"
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        estimate = micro_batches_module.estimate_run(args, training_args, dataset.sizes, script.choose_trained)
        budget = estimate.memory(estimate.workload_of_tokens(room), "none").peak
        patch.setattr(micro_batches_module, "device_memory", lambda: budget)
        found = MicroBatches(args, training_args, dataset, script.choose_trained, checkpoint, stored or {})
    found.divide(4096)
    known = {name: getattr(training_args, name) for name in ("process_index", "world_size")}
    found.training_args = SimpleNamespace(device=torch.device("cuda", 0), **known, **vars(training_args))
    gpu.estimate = found.estimate
    return found


def collator(dataset) -> PackingCollator:
    return PackingCollator(dataset.processor, 4096, share_images=True)


@pytest.mark.parametrize(("flags", "kind"), [("", None), ("true", "all"), ("false", "none")])
def test_memory_decides_on_activation_checkpointing_unless_the_flag_is_given(flags, kind, dataset, tmp_path):
    """TrainingArguments makes False of a value that was not given."""
    flags = ["--activation_checkpointing", flags] if flags else []
    found = micro_batches(dataset, tmp_path, *flags)
    assert found.kind == kind and found.plan.checkpointing == (kind or "none")
    found.budget = found.estimate.memory(found.plan.workload, "all").peak
    found._plan()
    assert found.plan.checkpointing == (kind or "all")


def test_a_limit_that_fits_stays(gpu, monkeypatch, dataset, tmp_path):
    found = planned_on(gpu, monkeypatch, dataset, tmp_path, *NOT_RECOMPUTED)
    before = found.plan
    (line,) = found.measure(torch.nn.Linear(1, 1), collator(dataset))
    assert found.plan is before and len(gpu.measured) == 1 and 1000 < before.tokens <= 1500
    assert line.startswith(
        f"limit      up to {before.tokens:,} tokens in a micro-batch, as many as fit; the two passes of"
    )
    assert gpu.measured[0][1:] == ("none", None)  # fp32 takes no autocast


@pytest.mark.parametrize("cause", ["estimate", "other rank"])
def test_what_takes_more_than_expected_lowers_the_limit(cause, gpu, monkeypatch, dataset, tmp_path):
    found = planned_on(gpu, monkeypatch, dataset, tmp_path, *NOT_RECOMPUTED)
    before = found.plan
    if cause == "estimate":
        gpu.share = 1 / 0.7
    else:
        gpu.others = [1 / 0.7]
    found.measure(torch.nn.Linear(1, 1), collator(dataset))
    assert before.tokens * 0.5 < found.plan.tokens < before.tokens * 0.85
    assert found.sampler.max_tokens == found.plan.tokens and found.plan.memory.peak <= found.plan.budget
    tokens = [tokens for tokens, *_ in gpu.measured]
    assert len(tokens) > 1 and tokens == sorted(tokens, reverse=True)


def test_memory_that_does_not_suffice_for_a_measurement_lowers_the_limit(gpu, monkeypatch, dataset, tmp_path):
    found = planned_on(gpu, monkeypatch, dataset, tmp_path, *NOT_RECOMPUTED)
    first = found.estimate.passes(found.plan.workload, "none")
    gpu.share = lambda expected: expected if expected < first / 2 else float("inf")
    before = found.plan.tokens
    (line,) = found.measure(torch.nn.Linear(1, 1), collator(dataset))
    assert found.plan.tokens < before and "GiB, and" in line
    gpu.share = float("inf")
    with pytest.raises(
        InputError, match=r"memory ran out when .* were tried before training: no micro-batch can be|--act"
    ):
        found.measure(torch.nn.Linear(1, 1), collator(dataset))


def test_nothing_is_measured_under_zero3_and_more_is_left_free(gpu, monkeypatch, dataset, tmp_path):
    without = planned_on(gpu, monkeypatch, dataset, tmp_path, *NOT_RECOMPUTED)
    monkeypatch.setattr(Estimate, "is_measurable", False)
    monkeypatch.setattr("phi3v.training.estimate.UNMEASURED_SHARE", 0.99)  # most of it is the context of the GPU
    found = planned_on(gpu, monkeypatch, dataset, tmp_path, *NOT_RECOMPUTED)
    (line,) = found.measure(torch.nn.Linear(1, 1), collator(dataset))
    assert not gpu.measured and "nothing is measured under ZeRO-3" in line
    assert found.plan.budget == pytest.approx(0.99 * without.plan.budget) and found.plan.tokens < without.plan.tokens


def test_zero3_can_not_be_measured():
    model, sizes = real_size_model("full", torch.bfloat16), [Size(2443, 2400, 17, 10, 0)]
    stages = [Estimate(model, sizes, 8, 2, {"zero_optimization": {"stage": n}}) for n in range(4)]
    assert [found.is_measurable for found in stages] == [True, True, True, False]
    on_cpu = Estimate(model, sizes, 8, 2, {"zero_optimization": {"stage": 3}}, on_gpu=False)
    budget = 22 * 2**30
    plans = [found.plan_to_fill(64, "auto", "all", budget) for found in (on_cpu, *stages[2:])]
    assert [plan.budget for plan in plans] == [budget, budget, 0.85 * budget]
    assert plans[2].tokens < stages[3].plan(64, 1, "auto", "all", budget).tokens
    smallest = stages[3].memory(stages[3].largest_workload(1), "all").peak
    plan = stages[3].plan_to_fill(64, "auto", "all", 1.01 * smallest)  # there is nothing to leave free
    assert plan.budget == 1.01 * smallest and plan.memory.peak <= plan.budget


def test_a_resumed_run_keeps_its_limit(gpu, monkeypatch, dataset, tmp_path):
    """Only what is recomputed may change."""
    gpu.share = 2.0
    found = planned_on(gpu, monkeypatch, dataset, tmp_path, stored={"tokens": 1400}, checkpoint=tmp_path)
    assert (found.plan.tokens, found.plan.checkpointing) == (1400, "none")
    (line,) = found.measure(torch.nn.Linear(1, 1), collator(dataset))
    assert found.plan.tokens == 1400 and found.plan.checkpointing != "none" and "as this run began" in line


@pytest.mark.parametrize(
    ("given", "size", "deepspeed", "stored", "fills"),
    [
        (set(), 1, None, None, True),
        (set(), 1, {"gradient_accumulation_steps": "auto"}, None, True),
        (set(), 1, {"gradient_accumulation_steps": 4}, None, False),
        ({"batch_size_per_gpu"}, 1, None, None, False),  # on the command line or in a preset
        (set(), 4, None, None, False),  # a default that was changed in the script
        (set(), 1, None, {"tokens": 900}, True),
        (set(), 1, None, {"tokens": None}, False),  # a number of examples
        (set(), 1, None, {}, False),  # a checkpoint from before there was a limit
    ],
)
def test_when_micro_batches_are_filled_by_default(given, size, deepspeed, stored, fills):
    args = SimpleNamespace(batch_size_per_gpu=size)
    checkpoint = None if stored is None else Path("checkpoint-2")
    assert fills_by_default(args, given, deepspeed, checkpoint, stored or {}) == fills


def test_the_default_depends_on_the_device_and_on_the_preset(tmp_path, monkeypatch):
    def asked(*flags, presets=script.PRESETS, fresh=None):
        argv = arguments(tmp_path, fresh or tmp_path / "out", *PLAIN, *flags)
        return parse_arguments(script.RecipeArguments, script.TRAINING, presets, script.__doc__, argv)[0]

    assert asked().max_tokens_per_gpu is None  # on a CPU
    assert asked("--estimate").max_tokens_per_gpu == "auto"  # for a machine with GPUs
    assert asked("--estimate", "--batch_size_per_gpu", "1").max_tokens_per_gpu is None
    chosen = {"full": {"batch_size_per_gpu": 1}}
    assert asked("--estimate", "--preset", "full", presets=chosen).max_tokens_per_gpu is None
    assert asked("--estimate", "--preset", "full", presets={"full": {}}).max_tokens_per_gpu == "auto"


def test_the_micro_batch_that_takes_most_is_found(dataset, tmp_path):
    """Not the one with most tokens, if another has more crops: here sizes are exchanged for planted ones."""
    found = micro_batches(dataset, tmp_path, "--max_tokens_per_gpu", "700")
    found.divide(4096)
    every = list(found.sampler.every_micro_batch())
    assert sorted(i for own in every for i in own) == list(range(len(dataset)))  # an epoch
    largest = found.largest()

    def expected(own):
        batch = collator(dataset)(dataset.__getitems__(own))
        return found.estimate.passes(workload_of_packing(batch["packing"]), found.plan.checkpointing)

    assert expected(largest) == max(map(expected, every))
    batch = collator(dataset)(dataset.__getitems__(largest))
    assert found.sampler.crops(largest) == sum(h * w + 1 for h, w in batch["packing"].grids)


def advice_of(dataset, folder, *flags, checkpoint=None) -> str:
    found = micro_batches(dataset, folder, *flags)
    found.divide(4096)
    return found.advice(checkpoint)


def test_advice_when_memory_has_run_out(dataset, tmp_path):
    longest = max(size.tokens for size in dataset.sizes)
    advice = advice_of(dataset, tmp_path, "--max_tokens_per_gpu", "700", checkpoint="OUT/checkpoint-3")
    lower = int(re.search(r"give --max_tokens_per_gpu (\d+) and ", advice)[1])
    assert longest <= lower < 700
    assert advice.endswith(" --resume_from_checkpoint OUT/checkpoint-3 --resume_anyway")
    assert "in place of --batch_size_per_gpu" in advice_of(dataset, tmp_path, "--batch_size_per_gpu", "4")
    assert "start again with --activation_checkpointing true;" in advice_of(dataset, tmp_path)
    advice = advice_of(dataset, tmp_path, "--activation_checkpointing", "true")
    assert advice.startswith(
        f"no micro-batch can be smaller than the longest example, which has {longest} tokens; docs"
    )


def test_what_to_do_when_memory_runs_out_works(toy_data, tmp_path, monkeypatch):
    """Memory runs out in step 3. The flags that the error names resume the run, to the same weights up to rounding."""
    flags = ["--deepspeed", "none", "--max_tokens_per_gpu", "1200", "--max_steps", "4", "--save_steps", "1"]
    flags += ["--optim", "sgd", "--learning_rate", "0.05"]
    train_resumable(toy_data, tmp_path / "whole", *flags)
    original = transformers.Trainer.training_step

    def training_step(self, *args):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", training_step)
        with pytest.raises(InputError, match="memory ran out in optimizer step 3: give ") as error:
            train_resumable(toy_data, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "report.html").is_file() and "\n" not in str(error.value)
    named = re.search(r"give (.*) and (--resume.*)$", str(error.value))
    again = [*flags, *named[1].split(), *named[2].split()]
    assert str(tmp_path / "out" / "checkpoint-2") in again
    trainer = train_resumable(toy_data, tmp_path / "out", *again)
    assert trainer.state.global_step == 4
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_memory_that_runs_out_before_the_first_micro_batch_is_not_blamed_on_it(toy_data, tmp_path, monkeypatch):
    def create_optimizer(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(transformers.Trainer, "create_optimizer", create_optimizer)
    with pytest.raises(torch.OutOfMemoryError):  # for which `exit_on_input_error` has a line
        train_resumable(toy_data, tmp_path, "--deepspeed", "none")
