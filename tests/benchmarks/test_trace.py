"""benchmarks/trace.py and what it consists of, on operations and a small model that can be counted by hand."""

import importlib.util
import math
import sys

import pytest
import torch
from helpers import ROOT

from phi3v import Phi3VConfig

sys.path.append(str(ROOT / "benchmarks"))
import prediction  # noqa: E402
from one_kernel import replaced  # noqa: E402
from tracer import Kernel, Tracer  # noqa: E402

# The standard library has a module `trace` as well.
_spec = importlib.util.spec_from_file_location("benchmarks_trace", ROOT / "benchmarks" / "trace.py")
trace = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trace)

WIDTH, INNER, LAYERS, VOCABULARY, CROP_WIDTH = 64, 96, 3, 50, 32
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": CROP_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


def counted(work) -> list[Kernel]:
    with replaced(), Tracer() as tracer:
        work()
    return tracer.kernels


def traced(*flags: str) -> trace.Trace:
    options = trace.parse(["--crops", "1x1", "--micro_batch", "2", "--text_tokens", "40", *flags])
    return trace.run(options, Phi3VConfig(**CONFIG, vision_config=VISION))


def rows(n=100, width=64, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(n, width, dtype=dtype, device="meta")


MEMORY = {  # an operation: the bytes that it reads and writes, as multiples of a tensor of 100 x 64 numbers in bf16
    "add": (lambda x, y: x + y, 3),
    "in place": (lambda x, y: x.mul_(y), 3),
    "in place with a number": (lambda x, y: x.mul_(2), 2),
    "out": (lambda x, y: torch.mul(x, y, out=rows()), 3),
    "copy": (lambda x, y: x.copy_(y), 2),
    "to fp32": (lambda x, y: x.float(), 3),
    "broadcast": (lambda x, y: x + y[:1].expand(100, 64), 2.01),
    "half of it": (lambda x, y: x[:50] * y[:50], 1.5),
    "gather": (lambda x, y: x[torch.empty(50, dtype=torch.long, device="meta")], 1 + 50 * 8 / (100 * 64 * 2)),
    "cat": (lambda x, y: torch.cat([x, y]), 4),
    "zeros": (lambda x, y: torch.zeros_like(x), 1),
    "rms_norm": (lambda x, y: torch.nn.functional.rms_norm(x, (64,)), 2),
    "compiled": (lambda x, y: torch.compile(lambda a, b: (a * b).sigmoid() + a, dynamic=True)(x, y), 3),
    "compiled in place": (lambda x, y: torch.compile(lambda a, b: a.mul_(b).add_(1))(x, y), 3),
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_memory_bound_operation_is_one_launch_with_the_bytes_that_it_moves(name):
    work, times = MEMORY[name]
    (kernel,) = counted(lambda: work(rows(), rows()))
    assert kernel.kind == "memory" and kernel.flops == 0
    assert kernel.moved == pytest.approx(times * 100 * 64 * 2, abs=1)


def test_views_and_what_the_host_computes_are_free():
    def work():
        x = rows()
        x.view(64, 100).t()[3:].unsqueeze(0).expand(5, -1, -1).split(10, dim=1)
        torch.empty_like(x)
        torch.arange(10) + 1

    assert counted(work) == []


def test_the_gradient_of_a_slice_writes_the_whole_tensor():
    def work():
        x = rows().requires_grad_()
        x[:10].backward(rows(10))

    (kernel,) = [k for k in counted(work) if k.name == "slice_backward"]
    assert kernel.phase == "backward" and kernel.moved == (100 + 2 * 10) * 64 * 2


def attended(**options) -> list[float]:
    def work():
        x = torch.empty(2, 4, 100, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(x, x, x, **options).sum().backward()

    return [k.flops for k in counted(work) if k.kind == "attention"]


def test_attention_kernels_compute_the_pairs_that_attend():
    """Two products forward and five backward, of 32 multiplications and additions for each pair and head."""
    product = 2 * 2 * 4 * 32  # for one pair of a query and a key
    assert attended() == [2 * product * 100 * 100, 5 * product * 100 * 100]
    assert attended(is_causal=True) == [2 * product * 5050, 5 * product * 5050]
    mask = torch.empty(100, 100, dtype=torch.bool, device="meta")
    assert attended(attn_mask=mask) == attended()  # the kernel computes what the mask then hides


def _torch_varlen(x, ends):
    torch.ops.aten._flash_attention_forward(x, x, x, ends, ends, 6, 6, 0.0, True, False)


def _package_varlen(x, ends):
    from flash_attn import flash_attn_varlen_func

    flash_attn_varlen_func(x, x, x, ends, ends, 6, 6, causal=True)


def _below_autograd(x, ends):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    assert _flash_attn_varlen_forward(x, x, x, ends, ends, 6, 6, 0.0, 1.0, True)[1].shape == (2, 10)


@pytest.mark.parametrize("kernel", [_torch_varlen, _package_varlen, _below_autograd])
def test_kernels_for_packed_rows_compute_the_pairs_within_examples(kernel):
    """Two examples, of 4 and 6 tokens: 10 and 21 pairs, in 2 heads of 8 numbers."""

    def work():
        ends = torch.tensor([0, 4, 10]).to("meta", torch.int32)
        kernel(torch.empty(10, 2, 8, dtype=torch.bfloat16, device="meta"), ends)

    assert [k.flops for k in counted(work) if k.kind == "attention"] == [2 * 2 * 2 * 8 * (10 + 21)]


@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_the_flops_of_a_small_model_are_those_counted_by_hand(attention):
    found = traced("--attention", attention)
    crops, patches, image_tokens = 4, 577, 144 * 2 + 1 + 2 * 12
    n, kept, targets = 2 * (image_tokens + 40), 2 * (13 + 1), 2 * 13
    layer = WIDTH * 3 * WIDTH, WIDTH * WIDTH + WIDTH * 2 * INNER + INNER * WIDTH  # before attention and after it
    decoder = n * LAYERS * layer[0] + (n * (LAYERS - 1) + kept) * layer[1]
    tower = crops * patches * 2 * (4 * CROP_WIDTH**2 + 2 * CROP_WIDTH * 48)
    patches_embedded = crops * 576 * 3 * 14**2 * CROP_WIDTH
    projector = (crops * 144 + 2) * (4 * CROP_WIDTH * WIDTH + WIDTH**2)
    # Forward, and a gradient of the input and of the weight; but pixels need no gradient.
    products = 3 * (decoder + tower + projector + targets * WIDTH * VOCABULARY) + 2 * patches_embedded
    assert found.total("flops", kind="matrix") == 2 * products

    one, tail = n // 2, 14  # tokens of an example, and those that the last layer computes
    pairs = (LAYERS - 1) * one * (one + 1) // 2
    pairs += tail * one - (tail * (tail - 1) // 2 if attention == "flash" else 0)
    forward = 4 * (2 * pairs * WIDTH + 2 * crops * patches**2 * CROP_WIDTH)
    assert found.total("flops", kind="attention") == 3.5 * forward
    assert found.total("flops", phase="forward", kind="attention") == forward


def test_every_phase_and_part_of_a_small_model_is_found():
    none, everything = traced(), traced("--recompute", "everything")
    assert {k.part for k in none.kernels if k.phase == "backward"} == {
        "vision tower", "projector", "embedding and images", "decoder attention", "decoder MLP", "norms", "rotary",
        "elementwise", "head and loss",
    }  # fmt: skip
    assert none.total("launches", phase="recomputation") == 0
    again = {k.part for k in everything.kernels if k.phase == "recomputation"}
    assert again == {"vision tower", "decoder attention", "decoder MLP", "norms", "rotary", "elementwise"}
    for phase in ("forward", "backward"):
        assert everything.total("launches", phase=phase) == none.total("launches", phase=phase)
    # A layer's last product is not computed again, because no gradient in the layer needs its result.
    attention = {"part": "decoder attention", "kind": "attention"}
    assert everything.total("flops", phase="recomputation", **attention) == none.total(
        "flops", phase="forward", **attention
    )
    decoder = traced("--recompute", "decoder")
    assert {k.part for k in decoder.kernels if k.phase == "recomputation"} == again - {"vision tower"}


def test_what_is_frozen_has_no_backward_pass_and_weights_in_4_bits_are_dequantised():
    frozen, lora, qlora = (traced("--mode", mode) for mode in ("frozen", "lora", "qlora"))
    assert frozen.total("launches", part="vision tower", phase="backward") == 0
    assert lora.adapters and not frozen.adapters
    weights = LAYERS * 4 * 2  # four linear layers in each, forward and backward
    assert len(qlora.kernels) == len(lora.kernels) + weights
    assert qlora.total("launches", name="dequantize") == weights


GPU = prediction.GPU(100e12, 0.5, 0.4, 0.2, 1e12, 1e-5, 1e11, 0.002)


@pytest.mark.parametrize(
    "kernel, seconds",
    [
        (("matrix", "mm", 50e12, 0.0), 1.0),
        (("matrix", "mm", 50e9, 2e12), 2.0),
        (("attention", "flash", 40e12, 0.0), 1.0),
        (("attention", "flash_backward", 40e12, 0.0), 2.0),
        (("memory", "add", 0.0, 1e12), 1.0),
        (("memory", "add", 0.0, 8.0), 1e-5),
    ],
)
def test_a_kernel_takes_the_time_of_its_flops_or_of_its_bytes(kernel, seconds):
    assert prediction.kernel_seconds(Kernel("part", "forward", *kernel), GPU) == seconds


def test_the_assumptions_stay_as_they_are():
    """Predictions of two versions of the code can be compared only if nothing but the code differs."""
    fixed = {
        "A100": (312e12, 0.77, 0.52, 0.45, 1.75e12, 2.5e-6, 185e9, 12e-3, True),
        "H100": (989e12, 0.66, 0.36, 0.30, 2.9e12, 2.0e-6, 319e9, 7e-3, True),
    }
    assert {name: tuple(vars(prediction.GPUS[name]).values()) for name in fixed} == fixed
    empty = prediction.Trace([], dict.fromkeys(("forward", "backward"), 0), None, 0.0, int(prediction.WHOLE), False)
    seconds = [prediction.predict(empty, prediction.GPUS[name], 1, gpus=8)["optimizer"] for name in fixed]
    assert seconds == pytest.approx([0.048, 0.028], abs=1e-4)


def test_a_prediction_adds_up():
    kernels = [Kernel("x", "forward", "matrix", "mm", 50e12, 0.0), Kernel("x", "backward", "matrix", "mm", 100e12, 0.0)]
    operations = {"forward": 10, "backward": 10, "recomputation": 0}
    trained = int(prediction.WHOLE)
    found = prediction.Trace(kernels, operations, None, 150e12, trained, adapters=False)
    all_reduce = 2 * 2 * trained * 3 / 4 / 1e11
    optimizer = trained / 4 * 30 / 1e12 + trained * 2 * 3 / 4 / 1e11
    step = 8 * (1.0 + 2.0 + 0.002) + optimizer
    two = prediction.predict(found, GPU, 8, gpus=4)
    assert two["step"] == pytest.approx(step) and two["all_reduce"] == pytest.approx(all_reduce)
    assert two["mfu"] == pytest.approx(8 * 150e12 / step / 100e12)
    # Where the all-reduce takes longer than the backward pass, ZeRO-1 waits for it once a step, ZeRO-2 every time.
    slow = prediction.GPU(100e12, 0.5, 0.4, 0.2, 1e12, 1e-5, 1e9, 0.002)
    two, one = (prediction.predict(found, slow, 8, gpus=4, zero=zero)["step"] for zero in (2, 1))
    added = 3 * 2 * trained / 1e12  # gradients of a micro-batch to those of earlier ones
    assert two - one == pytest.approx(7 * (100 * all_reduce - 2.0 + 0.002 - added))
    # Many operations without work take the time of the host.
    idle = prediction.Trace([], {"forward": 1000, "backward": 1000, "recomputation": 0}, None, 1.0, 0, adapters=False)
    host = 1000 * (prediction.HOST_FORWARD + prediction.HOST_BACKWARD)
    assert math.isclose(prediction.predict(idle, GPU, 1, gpus=1)["step"], host)


def test_flags_are_printed_with_what_they_decide(capsys):
    options = trace.parse(["--task", "images", "--gpus", "2"])
    assert (options.crops, options.micro_batch, options.batch_size) == ("1x2", 16, 64)
    trace.report(traced("--by", "part"), trace.parse(["--by", "part"]))
    printed = capsys.readouterr().out
    assert "PREDICTED, not measured" in printed and "Assumptions" in printed and "vision tower" in printed
    with pytest.raises(SystemExit):
        trace.parse(["--batch_size", "60"])
