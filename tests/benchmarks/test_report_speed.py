"""The stages of benchmarks/gpu_report.py about speed, memory and several GPUs, on a CPU; and faults that they name."""

import dataclasses
import sys
from collections import Counter

import pytest
import torch
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import report_fast  # noqa: E402
import report_many  # noqa: E402
import report_memory  # noqa: E402
import report_profile  # noqa: E402
import report_runs  # noqa: E402
from report_parts import Check, LeftOut, Row, Setting  # noqa: E402

FAST = ("lora", "full", "qlora", "frozen", "small", "shared", "generation")


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", True, tmp_path, {"packages": {"deepspeed": "", "bitsandbytes": ""}})


def wrong(found) -> list[str]:
    return [x.wrong for x in found if isinstance(x, Check) and not x.passed]


def rows(found) -> list[dict]:
    return [x.cells for x in found if isinstance(x, Row)]


# ---- Speed


@pytest.mark.parametrize("name", FAST)
def test_every_stage_about_speed_runs(setting, name):
    found = getattr(report_fast, name)(setting)
    assert wrong(found) == [] or name in ("shared", "generation")  # which depend on how busy the machine is
    speeds = [next(cells[c] for c in ("examples/s", "images/s", "tokens/s") if c in cells) for cells in rows(found)]
    assert len(speeds) == (1 if name in report_runs.MODES else 2) and all(speed > 0 for speed in speeds)
    left_out = [x for x in found if isinstance(x, LeftOut)]
    assert [x.name for x in left_out] == ([f"{name}, flash"] if name in report_runs.MODES else [])
    assert all("Ampere" in x.why for x in left_out)


def test_a_document_has_the_tokens_of_the_published_speeds(tmp_path):
    real = Setting("cuda", False, tmp_path, {"capability": [9, 0]})
    page = report_runs.document(real)
    assert page.tokens == 2443 and page.image_tokens == 2377 and page.size.crops == 16
    example = report_runs.Examples(real, page, 1)[0]
    assert len(example["input_ids"]) == 2443 and example["tiles"].shape == (15, 336, 336, 3)


def test_images_and_steps_are_counted(setting):
    page = report_runs.document(setting)
    one = report_runs.train(setting, "lora", "sdpa", page, steps=3, examples=2, micro_batches=3)
    assert one.per_step["images"] == one.per_step["examples"] == 6 and one.per_step["tokens"] == 6 * page.tokens
    assert len(one.seconds) == 1 and len(one.losses) == 3  # two steps warm up
    flops = 3 * one.estimate.costs["none"].flops(one.estimate.workload_of_examples([page.size] * 2))
    assert one.per_step["flops"] == pytest.approx(flops, rel=1e-6)


def test_a_whole_step_that_does_not_fit_becomes_its_passes(setting, monkeypatch):
    monkeypatch.setattr(report_runs, "memory_to_use", lambda setting: 1e6)
    whole, alone = rows(report_fast.row_of(setting, "full", "sdpa", "sdpa"))
    assert whole["images/s"].startswith("does not fit") and alone["step"] == "passes alone" and alone["images/s"] > 0


def test_out_of_memory_is_a_row(setting, monkeypatch):
    def fails(*args, only_plan=False, **kwargs):
        if only_plan:
            return train(*args, only_plan=True, **kwargs)
        raise torch.OutOfMemoryError("no room")

    train = report_runs.train
    for module in (report_runs, report_fast, report_memory):
        monkeypatch.setattr(module, "train", fails)
    assert rows(report_fast.lora(setting))[0]["images/s"].startswith("out of memory")
    assert "estimate" in wrong(report_memory.lora(setting))[0]


def test_a_step_that_computes_nothing_right_is_named(setting, monkeypatch):
    from phi3v import Phi3VForCausalLM

    forward = Phi3VForCausalLM.forward

    def broken(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.loss = out.loss * 0
        return out

    monkeypatch.setattr(Phi3VForCausalLM, "forward", broken)
    assert "losses of lora with sdpa are not those of random weights" in wrong(report_fast.lora(setting))[0]


@pytest.mark.parametrize("mode, package", [("full", "deepspeed"), ("qlora", "bitsandbytes")])
def test_a_missing_package_is_said(tmp_path, mode, package):
    without = Setting("cpu", True, tmp_path, {"packages": {}})
    for stage in (getattr(report_fast, mode), getattr(report_memory, mode)):
        found = stage(without)
        assert all(isinstance(x, LeftOut) for x in found) and f"{package} is not installed" in found[0].why


# ---- Memory


@pytest.mark.parametrize("mode", ["full", "frozen", "lora", "qlora"])
def test_the_estimate_is_right_to_10_percent_and_a_wrong_one_is_named(setting, monkeypatch, mode):
    measured = []

    def kept(name, one):
        measured.append((name, one))
        return compared(name, one)

    compared = report_memory.compared
    monkeypatch.setattr(report_memory, "compared", kept)
    assert wrong(getattr(report_memory, mode)(setting)) == []
    (name, one) = measured[0]
    for term in ("passes", "weights", "optimizer"):
        memory = one.plan.memory
        share = 0.2 * memory.peak / getattr(memory, term)  # the whole is off by 20% because of one term
        off = dataclasses.replace(memory, **{term: getattr(memory, term) * (1 + share)})
        said = wrong(compared(name, dataclasses.replace(one, plan=one.plan._replace(memory=off))))
        assert len(said) == 2 and all(report_memory.TERMS[term] in line.split("Off: ")[-1] for line in said)
        assert "off by +2" in said[0] or "off by +1" in said[0]
    shift = 0.2 * memory.peak  # two terms whose errors cancel
    off = dataclasses.replace(memory, weights=memory.weights + shift, passes=memory.passes - shift)
    said = wrong(compared(name, dataclasses.replace(one, plan=one.plan._replace(memory=off))))
    assert all(report_memory.TERMS[term] in said[-1] for term in ("weights", "passes"))


def test_live_bytes_are_counted_and_given_back():
    with report_runs.LiveBytes() as live:
        x = torch.ones(1000)
        y = x.view(10, 100)
        assert live.bytes == 4000
        z = x + 1
        assert live.bytes == 8000
        del x, y, z
        assert live.bytes == 0 and live.peak == 8000


# ---- Profile


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_profile_finds_every_predicted_part_and_one_that_is_not_is_named(setting, monkeypatch, name):
    given = []

    def kept(*args):
        given.append(args)
        return compared(*args)

    compared = report_profile.compared
    monkeypatch.setattr(report_profile, "compared", kept)
    found = getattr(report_profile, name)(setting)
    assert [line for line in wrong(found) if "lacks" in line] == []
    parts = {cells["part"] for cells in rows(found)}
    expected = {"decoder attention", "decoder MLP", "norms", "head and loss", "vision tower", "projector", "optimizer"}
    assert expected <= parts and "the step, wall-clock" in parts
    assert any(cells.get("profile") for cells in rows(found))  # the part that differs most
    ((title, about, measured, predicted, wall),) = given
    del predicted["vision tower"]
    assert any(
        "lacks the part 'vision tower'" in line for line in wrong(compared(title, about, measured, predicted, wall))
    )


def test_what_differs_most_and_what_is_lost_are_named():
    predicted = {"norms": 0.1, "decoder MLP": 0.5, "head and loss": 0.2, "step": 0.8}
    found = report_profile.compared("x", "y", {"norms": 0.4, "decoder MLP": 0.5, "other": 0.3}, predicted, 1.3)
    assert rows(found)[-1]["part"] == "norms, by +300.0 ms"
    lines = wrong(found)
    assert "lacks the part 'head and loss'" in lines[0] and "25% of the device time of x" in lines[1]


def test_stages_have_names_of_their_own_and_take_25_minutes():
    """Of one H100, by the minutes that are predicted; stages of several GPUs are left out there."""
    from report_plan import STAGES

    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert sum(stage.minutes for stage in STAGES if stage.group != "many") <= 25


# ---- Several GPUs

LOSSES = [8.0, 7.5, 7.0]


def by_rank(**changed) -> dict:
    reached = {"one process": [{"losses": LOSSES, "weights": None}]}
    reached |= {kind: [{"losses": LOSSES, "weights": 1.5} for _ in range(2)] for kind in report_many.KINDS}
    return reached | changed


@pytest.mark.parametrize(
    "fault, said",
    [
        ({}, None),
        ({"ZeRO-1": [{"losses": LOSSES, "weights": 1.5}, {"losses": [8, 7, 6], "weights": 1.5}]}, "rank 1 of ZeRO-1"),
        ({"DDP": [{"losses": LOSSES, "weights": 1.5}, {"losses": LOSSES, "weights": 2}]}, "rank 1 of DDP has other"),
        ({"ZeRO-3": [{"losses": [8.0, 7.5, 7.01], "weights": 1}] * 2}, "ZeRO-3 on 2 ranks has other losses"),
        ({"ZeRO-3": [{"losses": [8.0, 7.5, float("nan")], "weights": 1}] * 2}, "ZeRO-3"),
        ({"ZeRO-2": [{"losses": LOSSES[:2], "weights": 1}] * 2}, "ZeRO-2 on 2 ranks has other losses"),
        ({"DDP": "exit status 1; NCCL Error"}, "DDP did not train: exit status 1; NCCL Error"),
        ({"DDP": [{"losses": LOSSES, "weights": 1.5}]}, "DDP ran on 1 ranks and not on 2"),
    ],
)  # fmt: skip
def test_ranks_and_kinds_that_disagree_are_named(fault, said):
    lines = wrong(report_many.compared(by_rank(**fault), 2))
    assert (lines == []) if said is None else any(said in line for line in lines)


def test_one_gpu_is_said(tmp_path):
    one = Setting("cuda", False, tmp_path, {"device_count": 1})
    for stage in (report_many.losses, report_many.scaling):
        (found,) = stage(one)
        assert isinstance(found, LeftOut) and "only one GPU" in found.why


def test_gpus_that_bring_nothing_are_named(tmp_path, monkeypatch):
    many = Setting("cuda", False, tmp_path, {"device_count": 4})
    rates = {1: [{"lora": {"images/s": 4.0}}], 4: [{"lora": {"images/s": 3.9}}]}
    monkeypatch.setattr(report_many, "torchrun", lambda setting, n, kinds, saved: {"scaling": rates[n]})
    found = report_many.scaling(many)
    assert "0.97 times" in wrong(found)[0]
    rates[4][0]["lora"]["images/s"] = 14.0
    found = report_many.scaling(many)
    assert wrong(found) == [] and rows(found)[-1]["of perfect scaling"] == "88%"


@pytest.mark.slow
def test_all_kinds_have_equal_losses_on_two_ranks(setting):
    found = report_many.losses(setting)
    assert wrong(found) == []
    assert Counter(type(x) for x in found)[Check] == 2 * len(report_many.KINDS)
    assert len({cells["losses"] for cells in rows(found)}) == 1 and len(rows(found)) == 5
