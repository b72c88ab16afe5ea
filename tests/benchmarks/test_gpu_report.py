"""benchmarks/gpu_report.py on a CPU: its frame, and that every stage names a fault that is planted into the program."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flash_kernels import reference
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu_report  # noqa: E402
import report_machine  # noqa: E402
import report_page  # noqa: E402
import report_plan  # noqa: E402
import report_right  # noqa: E402
import report_trained  # noqa: E402
from report_parts import Check, LeftOut, Row, Setting, Stage, at_most, lacks, must_be, without_private  # noqa: E402

from phi3v.model import attention, functional, fused, image_processing_phi3v, modeling_phi3v, norms  # noqa: E402
from phi3v.model.modeling_phi3v import GrowingLayer, Phi3VImageEmbedding, Phi3VRotaryEmbedding  # noqa: E402
from phi3v.model.varlen import KERNELS  # noqa: E402

FACTS = {
    "device": "cpu",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "cpu": "A CPU",
    "cores": 2,
    "packages": {"torch": "2.14.1", "peft": "0.21.2"},
    "torch_built_for": "CPU",
    "device_count": 0,
    "device_name": "A CPU",
    "driver": None,
}
HOME = "/home/somebody"

# ---- The frame


class Stages:
    """Stages in place of the real ones, which are called in this process."""

    def __init__(self, monkeypatch, folder: Path):
        self.folder, self.called, self.results = folder, [], {}
        monkeypatch.setattr(gpu_report, "start", self.start)
        monkeypatch.setattr(gpu_report, "code", lambda: {"commit": "c0ffee", "changed": False, "digest": "d1"})

    def start(self, args, name, facts, minutes, log):
        if name == "machine":
            return {"facts": FACTS}
        self.called.append(name)
        result = self.results[name]
        if isinstance(result, BaseException):
            raise result
        return result if isinstance(result, dict) else {"found": as_json(result)}

    def report(self, *flags) -> int:
        self.called.clear()
        return gpu_report.main(["--device", "cpu", "--tiny", "--output_dir", str(self.folder), *flags])

    @property
    def page(self) -> str:
        return (self.folder / "report.md").read_text()


def as_json(found) -> list[dict]:
    return [{"kind": type(x).__name__, **vars(x)} for x in found]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    plan = [
        Stage("late", "fast", "m:f", "Late is proven", 3, 3),
        Stage("first", "right", "m:f", "First is proven", 1, 1),
        Stage("second", "right", "m:f", "Second is proven", 4, 2),
        Stage("gpus", "many", "m:f", "Many are proven", 1, 1, ("2 gpus",)),
    ]
    before = list(report_plan.STAGES)
    report_plan.STAGES[:] = plan
    made = Stages(monkeypatch, tmp_path / "out")
    made.results = {name: [must_be(name, 1, 1, "no")] for name in ("first", "second", "late")}
    yield made
    report_plan.STAGES[:] = before


def test_what_passed_is_not_run_again_and_what_failed_is(stages, capsys):
    wrong = at_most("a | distance", float("nan"), 0.5, "it is too far away")
    stages.results["second"] = [must_be("fine", 3, 3, "no"), wrong, Row("Speeds", {"mode": "full", "images/s": 12.345})]
    stages.results["late"] = {"error": f"its process ended with signal SIGKILL in {HOME}/project/x.py"}
    assert stages.report() == 1
    assert stages.called == ["first", "second", "late"]
    printed = capsys.readouterr().out
    assert "WRONG: a | distance: it is too far away (nan, allowed is 0.5)" in printed
    page = stages.page
    assert page.index("## Wrong") < page.index("| device |") < page.index("### Speeds") < page.index("## Left out")
    assert "**right/second**: a | distance: it is too far away (nan, allowed is 0.5)" in page
    assert "**fast/late**: the stage failed: its process ended with signal SIGKILL in …/x.py" in page
    assert "2 stages found something wrong: 2 of 3 checks passed, in 3 stages." in page
    assert "| full | 12.3 |" in page and "- many/gpus, because it needs 2 GPUs or more" in page
    assert "- many/gpus: that many are proven." in page and "- fast/late: that late is proven." in page
    assert "that first" not in page and "`--tiny`" in page and "| commit | c0ffee |" in page

    stages.results["second"] = stages.results["late"] = [
        must_be("fine", 3, 3, "no"),
        LeftOut("FA3", "it needs a Hopper"),
    ]
    assert stages.report() == 0
    assert stages.called == ["second", "late"]
    assert "Nothing is wrong: 3 of 3 checks passed, in 3 stages." in stages.page
    assert "- right/second: FA3, because it needs a Hopper" in stages.page
    assert stages.report() == 0 and stages.called == []


@pytest.mark.parametrize("change", ["code", "machine", "tiny"])
def test_results_of_another_commit_machine_or_size_do_not_count(stages, change, monkeypatch):
    assert stages.report() == 0
    if change == "code":
        monkeypatch.setattr(gpu_report, "code", lambda: {"commit": "c0ffee", "changed": True, "digest": "d2"})
    elif change == "machine":
        monkeypatch.setitem(FACTS, "packages", {"torch": "2.6.0"})
    else:
        monkeypatch.setitem(FACTS, "device", "xpu")  # a CPU has the tiny size alone
        content = json.loads((stages.folder / "results.json").read_text())
        content["key"]["machine"]["device"], content["key"]["tiny"] = "xpu", False
        (stages.folder / "results.json").write_text(json.dumps(content))
    assert stages.report() == 0 and stages.called == ["first", "second", "late"]


def test_a_report_that_is_stopped_keeps_what_it_has(stages):
    stages.results["second"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stages.report()
    assert "**right/second**: the stage failed: the report was stopped while it ran" in stages.page
    assert "- fast/late, because it was not reached" in stages.page
    stages.results["second"] = [must_be("second", 1, 1, "no")]
    assert stages.report() == 0 and stages.called == ["second", "late"]


def test_minutes_leave_out_what_matters_least(stages):
    assert stages.report("--minutes", "0.4") == 1  # with --tiny a stage counts as half a minute at most
    assert (
        stages.called == []
        and "- fast/late, because it takes about 0.5 minutes, which --minutes did not leave" in stages.page
    )
    assert stages.report("--stages", "second,fast", "--minutes", "1") == 0
    assert stages.called == ["second", "late"] and "- right/first, because it takes" in stages.page
    given = []
    stages.start, start = lambda *args: (given.append(args[3]), start(*args))[1], stages.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "start", stages.start)
        assert stages.report("--stages", "first", "--minutes", "3") == 0
    assert 2.9 < given[-1] <= 3  # a stage gets no more than what is left


def test_stages_that_were_not_asked_for_are_named(stages):
    assert stages.report("--stages", "first") == 0
    assert "- right/second, because it is not among --stages" in stages.page
    assert stages.report("--stages", "many") == 1  # nothing ran, so nothing is proven


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "a model of the real size takes hours on a CPU: add --tiny"),
        (["--stages", "golden,fats"], "--stages fats is unknown: choose from right, fast, memory, many, golden"),
        (["--stages", ""], "--stages names no stage"),
        (["--minutes", "0"], "--minutes 0 must be more than 0"),
        (["--output_dir", "/dev/null/out"], "--output_dir /dev/null/out can't be written"),
    ],
)
def test_a_request_that_can_not_be_met_is_one_line(flags, message, capsys):
    assert gpu_report.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1 and not printed.out


def test_two_reports_in_one_folder_are_refused(stages, capsys):
    with gpu_report._alone(stages.folder):
        assert stages.report() == 2
    assert "another report is being written in" in capsys.readouterr().err


def test_a_device_that_is_not_there(capsys, monkeypatch, tmp_path):
    with pytest.raises(report_machine.NotHere, match="finds no device 'xpu' on this machine"):
        report_machine.find_facts("xpu")
    monkeypatch.setattr(gpu_report, "start", lambda *_: {"not_here": "torch finds no GPU on this machine"})
    assert gpu_report.main(["--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: torch finds no GPU on this machine\n"


def test_what_a_machine_lacks():
    v100 = {"device": "cuda", "capability": [7, 0], "device_count": 1, "packages": {"peft": "1"}}
    assert lacks(("cuda", "peft"), v100) is None
    assert lacks(("cuda", "bf16"), v100) == "an Ampere GPU or newer, for bf16"
    assert lacks(("2 gpus",), v100) == "2 GPUs or more"
    assert lacks(("bitsandbytes",), v100) == "the package bitsandbytes"
    assert lacks(("cuda",), FACTS) == "a CUDA GPU" and lacks(("bf16",), FACTS) is None


@pytest.mark.parametrize(
    ("text", "public"),
    [
        (f"File '{HOME}/a b/phi3v/run.py', line 3", "File '…/a b/phi3v/run.py', line 3"),
        (f"{HOME}/.venv/lib/python3.11/site-packages/torch/x.py:12: in f", "…/x.py:12: in f"),
        ("images/s and 3/4 of 1e-4, docs/hardware.md", "images/s and 3/4 of 1e-4, docs/hardware.md"),
        ("on node-17 for somebody, not somebody-else", "on … for …, not somebody-else"),
        ("~/work/x", "…/x"),
    ],
)
def test_paths_and_names_are_not_public(text, public):
    assert without_private(text, ("node-17", "somebody")) == public


def test_the_page_of_this_machine_has_nothing_private(stages, monkeypatch):
    facts = report_machine.find_facts("cpu")
    monkeypatch.setitem(globals(), "FACTS", facts)
    monkeypatch.setattr(gpu_report, "_private_words", lambda: ("myhost", "somebody"))
    stages.results["first"] = {"error": f"no {ROOT}/x on myhost, {stages.folder}"}
    assert stages.report() == 1
    for text in (stages.page, (stages.folder / "results.json").read_text()):
        assert not any(word in text for word in (str(ROOT), str(stages.folder), "myhost", "somebody"))
        assert facts["packages"]["torch"] in text


def test_every_stage_is_a_function_with_a_sentence():
    for stage in report_plan.STAGES:
        module, _, function = stage.function.partition(":")
        assert callable(getattr(__import__(module), function)) and stage.group in report_plan.GROUPS
        assert stage.proves[0].isupper() and not stage.proves.endswith(".") and stage.minutes > 0
    names = [stage.name for stage in report_plan.STAGES]
    assert len({*names, *report_plan.GROUPS}) == len(names) + len(report_plan.GROUPS)
    assert sum(stage.minutes for stage in report_plan.STAGES) <= 25


@pytest.mark.slow
def test_a_stage_is_a_process_with_a_time_limit(tmp_path, capsys):
    args = gpu_report.parse(["--device", "cpu", "--tiny"])
    stopped = gpu_report.start(args, "machine", {}, 0.003, tmp_path / "logs" / "machine.log")
    assert stopped == {"error": "it was stopped after its time limit of 0.0 minutes"}
    assert gpu_report.main(["--device", "cpu", "--tiny", "--stages", "crops", "--output_dir", str(tmp_path)]) == 0
    assert "right/crops: 9 of 9 checks passed" in capsys.readouterr().out
    assert (tmp_path / "logs" / "crops.log").exists() and "| crops |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_nothing_that_a_stage_has_started_is_left():
    stage = subprocess.Popen(
        ["bash", "-c", "setsid sleep 1000 & echo $!; wait"],
        env=os.environ | {gpu_report.TOKEN: "abc"},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    started = int(stage.stdout.readline())
    gpu_report.end_all(stage.pid, "abc")
    assert stage.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 300
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        while "Z" not in Path(f"/proc/{started}/stat").read_text().split(")")[-1]:
            assert time.monotonic() < deadline, "a process in another group lives on"
            time.sleep(0.01)


# ---- Group right: each stage passes, and names planted faults


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Fewer precisions and steps than the report has, so that this takes seconds."""
    monkeypatch.setattr(report_right, "HALF", {"bf16": torch.bfloat16})
    monkeypatch.setattr(report_trained, "STEPS", 16)
    few = {mode: flags for mode, flags in report_trained.MODES.items() if mode in ("full", "QLoRA")}
    monkeypatch.setattr(report_trained, "MODES", few)
    every = [f for f in fused.Fused.every if "rotate" not in f.name]
    monkeypatch.setattr(fused.Fused, "every", every)
    monkeypatch.setattr("phi3v.model.modeling_phi3v.dist.is_initialized", lambda: False)
    return Setting("cpu", True, tmp_path, FACTS | {"packages": {"bitsandbytes": "1", "peft": "1"}})


def problems(found) -> list[str]:
    return report_page.problems_of({"status": "done", "found": as_json(found)})


@pytest.fixture
def golden_cases(monkeypatch):
    import golden_cases

    fewer = {"img2_c4_nlvr2": golden_cases.SUMMARY["img2_c4_nlvr2"]}
    monkeypatch.setattr(golden_cases, "SUMMARY", fewer)


def fault_norm(monkeypatch):
    plain = norms._RMSNorm.apply
    monkeypatch.setattr(norms, "rms_norm", lambda x, w, eps: plain(x, w, 1e-2))
    monkeypatch.setattr(modeling_phi3v, "rms_norm", lambda x, w, eps: plain(x, w, 1e-2))


def fault_rounded_positions(monkeypatch):
    plain = Phi3VRotaryEmbedding.forward

    def forward(self, x, position_ids, packing=None):
        cos, sin = plain(self, x, position_ids, packing)
        return (cos, sin) if x.dtype == torch.float32 else (cos * 1.1, sin * 1.1)

    monkeypatch.setattr(Phi3VRotaryEmbedding, "forward", forward)


def fault_leak(monkeypatch):
    """Attention sees the whole row."""
    plain = attention._sdpa

    def packed_attention(module, query, key, value, packing, trimmed, dropout):
        states = (x.transpose(1, 2) for x in (query, key, value))
        mask = torch.ones(key.shape[1], key.shape[1], dtype=torch.bool).tril_()
        mask = mask[packing.kept_rows] if trimmed else mask
        return plain(*states, mask, False, 0.0, module.scaling, False).transpose(1, 2)

    monkeypatch.setattr(modeling_phi3v, "packed_attention", packed_attention)


def fault_branches(monkeypatch):
    """A question about an image sees the other questions about it."""

    def mask(common, branches, device):
        n = sum(branches)
        return torch.ones(n, common + n, dtype=torch.bool).tril_(common)

    monkeypatch.setattr(attention, "_branch_mask", mask)


def fault_eager(monkeypatch):
    plain = attention._eager
    monkeypatch.setattr(
        attention, "_eager", lambda *args, scaling, **rest: plain(*args, scaling=scaling * 1.05, **rest)
    )


def fault_kernel(monkeypatch):
    """A flash kernel whose backward pass forgets a block of keys."""
    right = reference(torch.bfloat16)

    def backward(*args):
        query, key, value = right.backward(*args)
        key[64:128] = 0
        return query, key, value

    kernel = right._replace(backward=backward)
    monkeypatch.setitem(KERNELS, "varlen", kernel)
    missing = {"varlen": None, "flash_attention_2": "the package"}
    monkeypatch.setattr(report_right, "_missing_for_flash", lambda kind, precision: missing[kind])


def fault_gradient_of_a_function(monkeypatch):
    plain = functional._quick_gelu_backward
    monkeypatch.setattr(functional, "_quick_gelu_backward", lambda grad, x: plain(grad, x * 1.01))


def fault_fused(monkeypatch):
    (function,) = [f for f in fused.Fused.every if f.name == "swiglu"]
    monkeypatch.setattr(function, "pure", lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1])


def fault_normalisation(monkeypatch):
    plain = image_processing_phi3v.crops_of_tiles

    def crops_of_tiles(tiles, grids, mean, std, dtype=torch.float32):
        return plain(tiles, grids, mean[::-1], std, dtype)

    monkeypatch.setattr(report_right, "crops_of_tiles", crops_of_tiles)


def fault_cache(monkeypatch):
    """The newest token overwrites the one before it."""
    plain = GrowingLayer.update

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = plain(self, key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] == 1:
            keys[:, :, -2] = keys[:, :, -1]
        return keys, values

    monkeypatch.setattr(GrowingLayer, "update", update)


def fault_batch(monkeypatch):
    """Padding is seen."""
    plain = modeling_phi3v.Phi3VModel.forward

    def forward(self, *args, attention_mask=None, **kwargs):
        mask = torch.ones_like(attention_mask) if attention_mask is not None else None
        return plain(self, *args, attention_mask=mask, **kwargs)

    monkeypatch.setattr(modeling_phi3v.Phi3VModel, "forward", forward)


def fault_lost_gradient(monkeypatch):
    plain = Phi3VImageEmbedding.encode_crops
    monkeypatch.setattr(Phi3VImageEmbedding, "encode_crops", lambda self, crops: plain(self, crops).detach())


def fault_infinite_gradient(monkeypatch):
    plain = functional._swiglu_backward
    monkeypatch.setattr(functional, "_swiglu_backward", lambda grad, x: plain(grad, x) * torch.inf)


def fault_overflow(monkeypatch):
    """A gradient that becomes infinite in fp16."""
    plain = functional._swiglu_backward
    monkeypatch.setattr(
        functional, "_swiglu_backward", lambda grad, x: plain(grad, x) * (1e8 if x.dtype == torch.float16 else 1)
    )


def fault_four_bits(monkeypatch):
    import bitsandbytes as bnb

    plain = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: plain(self, x) * 1.05)


STAGE_FAULTS = [
    (
        "report_right:golden",
        fault_norm,
        "logits, img2_c4_nlvr2, sdpa: the model computes something else than the official",
    ),
    ("report_right:half", fault_rounded_positions, "logits, bf16: bf16 differs from fp32 by more than rounding"),
    (
        "report_right:packing",
        fault_leak,
        "one example changed, loss of another: an example of a packed row attends to its",
    ),
    (
        "report_right:sharing",
        fault_branches,
        "gradients, shared against not shared: examples that share images are not",
    ),
    ("report_right:attention", fault_eager, "gradients, eager in fp32, separate: eager attention differs from sdpa"),
    (
        "report_right:attention",
        fault_kernel,
        "varlen, torch's own in bf16, separate: this attention kernel differs from",
    ),
    ("report_right:functions", fault_gradient_of_a_function, "quick_gelu in fp32: quick_gelu or its gradient is wrong"),
    ("report_right:functions", fault_fused, "a fused function differs from the plain one or can't be compiled: plain"),
    ("report_right:crops", fault_normalisation, "images of 56x56: crops are normalised on the device in another way"),
    ("report_right:generation", fault_cache, "generation with a cache gives other logits than the whole sequence"),
    ("report_right:generation", fault_batch, "a prompt gets another answer in a batch than alone"),
    (
        "report_trained:gradients",
        fault_lost_gradient,
        "tensors with no gradient, such as model.vision_embed_tokens.img_processor",
    ),
    ("report_trained:gradients", fault_infinite_gradient, "tensors with NaN or infinity, such as model."),
    ("report_trained:fp16", fault_overflow, "steps that loss scaling skipped: gradients in fp16 hold infinity or NaN"),
    ("report_trained:qlora", fault_four_bits, "in bf16: bitsandbytes computes something else than the dequantised"),
]


@pytest.mark.parametrize("function", list(dict.fromkeys(case[0] for case in STAGE_FAULTS)))
def test_a_stage_passes(function, setting, golden_cases):
    module, _, name = function.partition(":")
    found = getattr(sys.modules[module], name)(setting)
    assert not problems(found) and sum(isinstance(x, Check) for x in found) >= 2


@pytest.mark.parametrize(("function", "fault", "message"), STAGE_FAULTS, ids=[f[1].__name__ for f in STAGE_FAULTS])
def test_a_planted_fault_is_named(function, fault, message, setting, golden_cases, monkeypatch):
    fault(monkeypatch)
    module, _, name = function.partition(":")
    found = problems(getattr(sys.modules[module], name)(setting))
    assert any(message in line for line in found), found


# Takes the place of a training: 12 steps in which weights move by the state of an optimizer, which a checkpoint keeps.
TRAINING = """
import json, pathlib, sys, time
import numpy as np
from safetensors.numpy import load_file, save_file
out, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
out.mkdir(exist_ok=True)
weights, momentum, first = np.zeros(4), 1.0, 1
if (out / "checkpoint-4").exists() and fault != "begins again":
    print(f"resuming from {out}/checkpoint-4")
    weights, first = load_file(out / "checkpoint-4" / "model.safetensors")["w"], 5
    momentum = 1.0 if fault == "loses the optimizer" else json.loads((out / "checkpoint-4" / "state").read_text())
if fault == "fails" and first > 1:
    sys.exit("error: a fault of this machine")
for step in range(first, 13):
    momentum *= 0.9
    weights = weights + momentum
    if step == 4 and not (out / "checkpoint-4").exists():
        (out / "unfinished").mkdir(exist_ok=True)
        save_file({"w": weights}, out / "unfinished" / "model.safetensors")
        (out / "unfinished" / "state").write_text(json.dumps(momentum))
        (out / "unfinished").rename(out / "checkpoint-4")
        time.sleep(1)
save_file({"w": weights}, out / "model.safetensors")
"""


@pytest.fixture
def trainings(monkeypatch):
    """trainings(fault): trainings are small programs, of which those that resume have this fault."""
    make = subprocess.run

    def put(fault):
        def start_script(setting, data, out):
            with out.with_suffix(".log").open("a") as log:
                return subprocess.Popen([sys.executable, "-c", TRAINING, str(out), fault], stdout=log, stderr=log)

        monkeypatch.setattr(report_trained, "start_script", start_script)
        monkeypatch.setattr(subprocess, "run", lambda command, **_: make(["true"]))

    return put


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", None),
        (
            "loses the optimizer",
            "moved after the checkpoint: a run that was killed and resumed ends with other weights",
        ),
        ("begins again", "it resumed from the checkpoint: the second start began from nothing"),
        ("fails", "a training ended with status 1: error: a fault of this machine"),
    ],
)
def test_resuming(fault, message, setting, trainings):
    trainings(fault)
    try:
        found = problems(report_trained.resume(setting))
    except RuntimeError as e:
        found = [str(e)]
    assert any(message in line for line in found) if message else not found, found


def test_the_real_trainings_flags_are_known(setting):
    """Those of the stage `resume`, which is too slow for a test."""
    from helpers import arguments, parse_command

    import finetune_hf_trainer_hateful_memes as script

    args, training_args = parse_command(
        script, arguments("data", setting.folder / "out", *report_trained.FLAGS.split())
    )
    assert (args.batch_size, training_args.max_steps, training_args.save_steps) == (4, 12, 4)
