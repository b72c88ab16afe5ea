"""What --estimate prints, and the memory that it expects."""

import itertools
import json
import random
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import ROOT, parse_command, real_size_model

import finetune_hf_trainer_ucf101 as ucf101
from phi3v.data.sizes import Size
from phi3v.errors import InputError
from phi3v.training.estimate import Estimate, Plan
from phi3v.training.forecast import describe
from phi3v.training.hardware import held_memory
from phi3v.training.outline import estimate_run
from phi3v.training.peak import peak_bytes


def test_an_estimate(capfd, tmp_path):
    """What --estimate prints for the real size; activation checkpointing and more GPUs lower the memory."""
    sizes = [Size(2443, 2400, 17, 10, 0)] * 3
    model = real_size_model("full", torch.bfloat16)
    estimates = [Estimate(model, sizes, n, 2, {"zero_optimization": {"stage": 2}}) for n in (1, 8)]
    workload = estimates[0].largest_workload(1)
    peaks = [estimates[1].memory(workload, kind).peak for kind in ("none", "decoder", "all")]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] < estimates[0].memory(workload, "none").peak
    text = describe(estimates[1], workload, 2)
    assert "4,146,621,440, of which 4,134,023,168 train" in text and "V100 32 GB" in text
    assert estimates[1].flops_per_example("none") == pytest.approx(
        77.9e12, rel=0.1
    )  # the recipe's own count is 77.9 TFLOP
    plan = estimates[1].plan(64, 1, "auto", None, 72e9)
    assert plan.tokens >= 2443 and plan.memory.peak <= 72e9


def test_the_plan_is_that_of_a_search_through_all_candidates():
    """Random sizes, budgets and kinds of training; each kind of plan occurs."""
    rng, found = random.Random(0), set()
    models = [real_size_model("full", torch.bfloat16, attention=a, num_hidden_layers=2) for a in ("sdpa", "eager")]
    for model, stage in itertools.product(models, (None, 2, 3)):
        sizes = [
            Size(rng.randint(30, 9000), 20, rng.randint(0, 80), rng.randint(0, 30), 0) for _ in range(rng.randint(1, 9))
        ]
        config = stage and {"zero_optimization": {"stage": stage}}
        estimate = Estimate(model, sizes, rng.choice([1, 8]), 2, config)
        base = estimate.memory(estimate.workload_of_tokens(1), "all").peak
        for _ in range(5):
            batch_size, budget, kind = rng.randint(1, 24), base + 2 ** rng.uniform(31, 44), rng.choice([None, "all"])
            plan = estimate.plan(batch_size, 1, "auto", kind, budget)
            longest = max(s.tokens for s in sizes)
            share = -(-batch_size // estimate.world_size) * longest

            def fits(tokens, kind, estimate=estimate, budget=budget):
                return estimate.memory(estimate.workload_of_tokens(tokens), kind).peak <= budget

            for of in [kind] if kind else ("none", "decoder", "all"):
                fitting = [n for n in range(longest, max(share, longest) + 256, 256) if fits(n, of)]
                if fitting and (of == "all" or fitting[-1] >= min(8192, share)):
                    break
            assert plan.tokens == (fitting[-1] if fitting else longest)
            found.add((plan.checkpointing, bool(fitting), plan.tokens > longest))
    assert len(found) >= 4


def test_planning_looks_at_each_example_a_few_times():
    """And not once for each number of tokens that a micro-batch may have."""
    looked_at = 0

    class Counted(Size):
        @property
        def crops(self):
            nonlocal looked_at
            looked_at += 1
            return self[2]

    sizes = [Counted(2443, 2400, 17, 10, 0)] * 1000
    estimate = Estimate(real_size_model("lora", torch.bfloat16, num_hidden_layers=4), sizes, 1, 2)
    assert estimate.plan(64, 1, "auto", None, 72e9).tokens > 4 * 2443
    assert 1000 <= looked_at <= 2010


def test_memory_under_deepspeed():
    """What DeepSpeed 0.19 keeps for the whole model: states, buckets of 5e8 in pairs, gathered parameters."""
    model, sizes = real_size_model("full", torch.bfloat16), [Size(2443, 2400, 17, 10, 0)]
    whole, trained, largest = 4146621440, 4134023168, 32064 * 3072

    def memory(name, n):
        config = json.loads((ROOT / "ds_config" / f"{name}.json").read_text())
        estimate = Estimate(model, sizes, n, 2, config)
        workload = estimate.largest_workload(1)
        found = estimate.memory(workload, "all")
        return found, found.passes - peak_bytes(estimate.costs["all"], workload)

    found, buffers = memory("zero1", 8)
    assert (found.gradients, found.optimizer, found.update) == (trained * 2, trained * 1.5, trained * 0.75)
    assert buffers == pytest.approx(2e9 + trained / 4)  # with this rank's part of the reduced gradients
    found, buffers = memory("zero2", 8)
    assert (found.gradients, found.optimizer, found.update) == (trained / 4, trained * 1.5, trained * 0.75)
    assert buffers == pytest.approx(2e9 + trained / 4)  # with the gradients of the micro-batch at hand
    found, buffers = memory("zero2_offload", 8)
    assert (found.gradients, found.optimizer, found.update) == (2 * largest, 0, 0)
    assert buffers == pytest.approx(2e9)
    assert memory("zero2_offload", 1)[0] == found  # all that is divided is on the host
    found, buffers = memory("zero3", 8)
    assert (found.weights, found.gradients, found.optimizer) == (whole / 4, trained / 4, trained * 1.5)
    assert buffers == pytest.approx(2 * 3072**2 + 2e9)  # the bucket as the Trainer fills it in
    assert memory("zero3", 1)[0].update == 6e9  # a group of parameters after the other


def test_an_estimate_for_a_gpu_works_on_a_machine_without_one(tmp_path):
    """A CPU has neither fp16 nor flash attention. Eager attention needs more memory, because it keeps its weights."""
    common = ["--data_dir", str(tmp_path), "--model_name_or_path", str(ROOT / "demo" / "base_checkpoint"), "--estimate"]

    def estimate(*flags):
        args, training_args = parse_command(ucf101, [*common, *flags])
        estimated = estimate_run(args, training_args, [Size(200, 26, 4, 5, 0)], ucf101.choose_trained)
        return estimated.memory(estimated.largest_workload(1), "none").peak

    half = estimate("--bf16")
    assert estimate("--fp16", "--use_flash_attention") == estimate() == half < estimate("--fp32")
    assert estimate("--attn_implementation", "eager") > half
    with pytest.raises(InputError, match="--bf16 and --fp16 contradict"):
        estimate("--bf16", "--fp16")
    with pytest.raises(InputError, match="auto depends on a GPU's memory"):
        estimate("--max_tokens_per_gpu", "auto")


def test_the_expected_peak_counts_what_the_process_holds_already():
    memory = SimpleNamespace(peak=0.04 * 2**30)
    plan = Plan(None, "none", None, memory, 6.0 * 2**30, held_memory())
    resident = psutil.Process().memory_info().rss / 2**30
    assert resident > 0.2 and f"expected peak memory {resident + 0.04:.1f} of {resident + 6:.1f} GiB" in str(plan)
