"""The stages of gpu_report.py that profile a step by part of the model, beside what trace.py predicts."""

import bisect
import contextlib
import importlib.util
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from prediction import GPU, GPUS, kernel_seconds, predict
from report_fast import best_attention, missing, passes
from report_models import image_processor
from report_parts import Check, LeftOut, Row, Setting
from report_runs import Examples, Found, configuration, document, plan_of, precision, train

from phi3v.model import modeling_phi3v
from phi3v.model.adapters import inner_model
from phi3v.model.packing import pack
from phi3v.training.hardware import DTYPES, peak_flops, wait_for_device

# The standard library has a module `trace` as well.
_spec = importlib.util.spec_from_file_location("benchmarks_trace", Path(__file__).with_name("trace.py"))
trace = importlib.util.module_from_spec(_spec)
sys.modules["benchmarks_trace"] = trace
_spec.loader.exec_module(trace)

PREFIX, NODE = "part: ", "autograd::engine::evaluate_function: "
GRADIENTS = "gradients"  # sums and copies of them, also into the buckets in which ranks exchange them
OTHER = "other"  # what belongs to no part of the model
LARGEST_OTHER = 0.15  # of the step's device time
NOTABLE = 0.01  # of the step's device time: a smaller part that the prediction lacks is not worth a word


class Ranges:
    """Marks in a profile what the modules of a model compute. In the backward pass, which calls no module, a part
    follows from the numbers of autograd's nodes, which are numbered in the order of the forward pass."""

    def __init__(self):
        self.open, self.marks, self.hooks = [], [], []

    def follow(self, module: torch.nn.Module, part: str):
        """As `tracer.Tracer.follow`."""
        self.hooks += [
            module.register_forward_pre_hook(lambda *_: self._enter(part)),
            module.register_forward_hook(lambda *_: self._leave(), always_call=True),
        ]

    def following(self, function, part: str):
        """As `tracer.Tracer.following`."""

        def follow(*args, **kwargs):
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return follow

    def _enter(self, part: str):
        range_ = torch.profiler.record_function(PREFIX + part)
        range_.__enter__()
        self.open.append((part, range_))
        self.marks.append((torch._C._autograd._get_sequence_nr(), part))

    def _leave(self):
        self.open.pop()[1].__exit__(None, None, None)
        part = self.open[-1][0] if self.open else OTHER
        self.marks.append((torch._C._autograd._get_sequence_nr(), part))

    def part_of_node(self, number: int) -> str:
        """The part in whose forward pass autograd's node with this number was made."""
        at = bisect.bisect_right(self.marks, number, key=lambda mark: mark[0])
        return self.marks[at - 1][1] if at else OTHER


def part_of(event, ranges: Ranges) -> str:
    """The part that an event of a profile belongs to."""
    while event is not None:
        if "ddp.reducer" in event.name:
            return GRADIENTS
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith(NODE):
            # Nodes that only fill `.grad` have no number of their own.
            return ranges.part_of_node(event.sequence_nr) if event.sequence_nr >= 0 else GRADIENTS
        event = event.cpu_parent
    return OTHER


def seconds_by_part(profile, ranges: Ranges, on_device: bool) -> Counter:
    """Seconds of the device for each part: of its kernels, or on a CPU of its operations."""
    found = Counter()
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if on_device:
            seconds = sum(kernel.duration for kernel in event.kernels) / 1e6
        else:
            is_operation = "::" in event.name and not event.name.startswith(NODE)  # others are Python's own time
            seconds = event.self_cpu_time_total / 1e6 if is_operation else 0.0
        if seconds:
            found[part_of(event, ranges)] += seconds
    return found


def device_model(setting: Setting) -> tuple[str, GPU]:
    """What trace.py assumes of this device. For a device that it does not know, the rates of a large matrix product and
    of a copy are measured, and attention is taken to be as fast as a matrix product."""
    name = setting.facts.get("device_name", "")
    for known, gpu in GPUS.items():
        if setting.device == "cuda" and known in name:
            return f"assumed of {known}", gpu
    if setting.device == "cuda" and "H200" in name:
        return "assumed of H100, with 1.43 times the memory's speed", replace(
            GPUS["H100"], bandwidth=GPUS["H100"].bandwidth * 4.8 / 3.35
        )
    dtype = DTYPES[precision(setting)]
    peak, _ = peak_flops(dtype)
    n = 2**22 if setting.device == "cpu" else 2**28
    x, y, best = (
        torch.ones(n, dtype=dtype, device=setting.device),
        torch.empty(n, dtype=dtype, device=setting.device),
        9e9,
    )
    for _ in range(4):
        wait_for_device()
        started = time.perf_counter()
        y.copy_(x)
        wait_for_device()
        best = min(best, time.perf_counter() - started)
    bandwidth = 2 * n * dtype.itemsize / best
    return "with rates measured here", GPU(peak, 1.0, 1.0, 1.0, bandwidth, 2e-6, 1e11, 0.0)


def predicted_by_part(
    setting: Setting, mode: str, attention: str, one: Found, gpu: GPU, whole: bool
) -> dict[str, float]:
    """Seconds for each part of a step, and `step` for its wall-clock time."""
    kind = "flash" if attention in ("flash_attention_2", "varlen") else "sdpa"
    data = Examples(setting, document(setting), one.micro_batch)
    processor = image_processor(setting)

    def packed(examples):
        batch = pack(examples, 4096, True, tuple(processor.image_mean), tuple(processor.image_std))
        return batch | {"image_sizes": torch.tensor(batch["packing"].grids) * processor.image_size}

    recompute = {"none": "none", "decoder": "decoder", "all": "everything"}[one.plan.checkpointing]
    with mock.patch.object(trace, "pack_examples", packed):
        model = trace.make_model(configuration(setting), mode, kind)
        examples = [data[i] for i in range(one.micro_batch)]
        counted = trace.trace(model, examples, recompute, mode == "qlora", setting.device != "cpu")
    found = Counter()
    for kernel in counted.kernels:
        found[kernel.part] += kernel_seconds(kernel, gpu) * one.micro_batches
    prediction = predict(counted, gpu, one.micro_batches, 1)
    found["step"] = one.micro_batches * prediction["micro_batch"]
    if whole:
        size = 4 if counted.adapters else 2
        sums = (one.micro_batches - 1) * 3 * size * counted.trained / gpu.bandwidth
        found[GRADIENTS] = sums if counted.adapters else one.micro_batches * prediction["buckets"]
        found["optimizer"], found["step"] = prediction["optimizer"], prediction["step"]
    return dict(found)


def compared(name: str, about: str, measured: dict[str, float], predicted: dict[str, float], wall: float):
    """Measured and predicted seconds of each part: rows, and checks that every part is in both."""
    table = f"One step of {name} by part of the model (predictions {about})"
    busy, rows, found = sum(measured.values()), [], []
    parts = sorted((measured.keys() | predicted.keys()) - {"step"}, key=lambda part: -measured.get(part, 0))
    for part in parts:
        own, guess = measured.get(part, 0.0), predicted.get(part)
        cells = {"part": part, "measured ms": own * 1e3, "share": f"{own / busy:.1%}"}
        cells |= {"predicted ms": None if guess is None else guess * 1e3}
        cells |= {"measured / predicted": own / guess if guess else None}
        rows.append(Row(table, cells))
    step = {
        "part": "the step, wall-clock",
        "measured ms": wall * 1e3,
        "share": f"device busy {min(busy / wall, 1):.0%}",
    }
    step |= {"predicted ms": predicted["step"] * 1e3, "measured / predicted": wall / predicted["step"]}
    worst = max((p for p in parts if p != OTHER), key=lambda p: abs(measured.get(p, 0) - predicted.get(p, 0)))
    most = f"{worst}, by {(measured.get(worst, 0) - predicted.get(worst, 0)) * 1e3:+.1f} ms"
    rows.append(Row(table, step))
    rows.append(Row("Where the prediction was most wrong", {"profile": name, "part": most}))
    for part in parts:
        if part not in (OTHER, GRADIENTS) and part not in predicted and measured[part] > NOTABLE * busy:
            wrong = f"the prediction lacks the part {part!r}, which took {measured[part] * 1e3:.1f} ms in {name}"
            found.append(Check(f"{name}: {part} is predicted", "lacking", "predicted", False, wrong))
        elif part in predicted and part != GRADIENTS and predicted[part] > NOTABLE * busy and not measured.get(part):
            wrong = f"the profile of {name} lacks the part {part!r}, which was predicted to take time"
            found.append(Check(f"{name}: {part} is measured", "lacking", "measured", False, wrong))
    other = measured.get(OTHER, 0.0) / busy
    wrong = f"{other:.0%} of the device time of {name} belong to no part of the model"
    found.append(Check(f"{name}: time of no part", other, LARGEST_OTHER, other <= LARGEST_OTHER, wrong))
    return [*rows, *found]


@contextlib.contextmanager
def followed(ranges: Ranges, model):
    """The model's parts are marked within."""
    inner = inner_model(model)
    trace.follow_parts(ranges, inner)
    names = [n for n, f in vars(modeling_phi3v).items() if n.startswith("rotate") and callable(f)]
    with contextlib.ExitStack() as stack:
        for name in names:
            wrapped = ranges.following(getattr(modeling_phi3v, name), "rotary")
            stack.enter_context(mock.patch.object(modeling_phi3v, name, wrapped))
        yield
    for hook in ranges.hooks:
        hook.remove()


def profiled(setting: Setting, mode: str, whole: bool) -> list[Check | Row | LeftOut]:
    """Profiles a step of a mode, or with `whole` false its forward and backward pass alone."""
    if why := missing(setting, mode):
        return [LeftOut(f"profile of {mode}", why)]
    attention, page, at = best_attention(setting), document(setting), 2
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device != "cpu":
        activities.append(getattr(torch.profiler.ProfilerActivity, setting.device.upper()))
    ranges, kept = Ranges(), {}  # kept: the model and the profile

    @contextlib.contextmanager
    def around(step: int):
        if step != at:
            yield
            return
        wait_for_device()
        with torch.profiler.profile(activities=activities) as kept["profile"], followed(ranges, kept["model"]):
            yield
            wait_for_device()

    options = {"around_step": around}
    if whole:
        options |= {"steps": at + 2, "examples": 2 if setting.tiny else None, "largest": 4}
        one = train(setting, mode, attention, page, on_model=lambda model: kept.update(model=model), **options)
    else:
        one = passes(setting, mode, attention, page, on_model=lambda model: kept.update(model=model), **options)
    measured = seconds_by_part(kept["profile"], ranges, setting.device != "cpu")
    kept.clear()
    name = f"{mode}, {attention}" + ("" if whole else ", passes alone")
    if not measured:
        return [LeftOut(f"profile of {name}", "torch's profiler has seen no kernels: its CUPTI does not work here")]
    about, gpu = device_model(setting)
    predicted = predicted_by_part(setting, mode, attention, one, gpu, whole)
    # The wall-clock time is that of the steps without the profiler, which makes the host slower.
    return compared(name, about, measured, predicted, one.step)


def full(setting: Setting) -> list[Check | Row | LeftOut]:
    """The whole model: a whole step where it fits, else the passes alone."""
    plan = plan_of(setting, "full", best_attention(setting), document(setting)).plan
    return profiled(setting, "full", whole=plan.memory.peak <= plan.budget)


def lora(setting: Setting) -> list[Check | Row | LeftOut]:
    return profiled(setting, "lora", whole=True)
