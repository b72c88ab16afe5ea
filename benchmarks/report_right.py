"""The stages of gpu_report.py about right results of the model: forward and backward passes, and generation."""

import contextlib
import statistics
import sys
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from report_models import (
    about_one_image,
    exact_products,
    gradient_errors,
    has_exact_zero_gradient,
    image_processor,
    loss_and_gradients,
    make_config,
    make_example,
    make_model,
    on_device,
    packed,
    padded,
    use_attention,
)
from report_parts import ROOT, Check, LeftOut, Row, Setting, at_most, must_be
from torch import nn

from phi3v.model import functional, fused, norms, varlen
from phi3v.model.image_processing_phi3v import crops_of_tiles
from phi3v.training.hardware import _missing_for_flash, describe_attention

Found = list[Check | Row | LeftOut]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FOR_EAGER = {"img2_c4_nlvr2", "batch2_rightpad"}  # golden cases
LAYERS = 3  # of the decoder, where a few are enough


def half_dtypes(setting: Setting) -> dict[str, torch.dtype]:
    """The kinds of half precision that this device has: no bf16 on a GPU before Ampere."""
    old = setting.device == "cuda" and setting.facts["capability"] < [8, 0]
    return {name: dtype for name, dtype in HALF.items() if not (old and name == "bf16")}


def original_length(setting: Setting) -> int:
    """Tokens from which an example takes the long rotary factors, in the rows of this file."""
    return 130 if setting.tiny else 1400


def short_model(setting: Setting, dtype=torch.float32, **fields):
    """A model of the full width with few layers."""
    fields = {"original_max_position_embeddings": original_length(setting)} | fields
    return make_model(setting, make_config(setting, LAYERS, **fields), dtype)


def row_of(setting: Setting, examples: list[dict], share_images: bool = True) -> dict:
    """The packed row of these examples for `short_model`."""
    return packed(setting, examples, share_images, original_length(setting))


def worst(errors: dict[str, float]) -> tuple[float, str]:
    """The largest of these errors by parameter, and the parameter's name; NaN counts as the largest."""
    name = max(errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n])
    return errors[name], name


def compare(name: str, found, expected, loss: float, gradients: float, wrong: str) -> Found:
    """Checks of the loss and of the gradients that `loss_and_gradients` returns. loss: limit of its relative error;
    gradients: limit of the norm of a gradient's error, as a share of the gradient's norm."""
    error, parameter = worst(gradient_errors(found[1], expected[1]))
    return [
        at_most(f"loss, {name}", abs(found[0] - expected[0]) / abs(expected[0]), loss, f"{wrong}: another loss"),
        at_most(f"gradients, {name}", error, gradients, f"{wrong}: another gradient of {parameter}"),
    ]


# ---- Golden cases


def tests_golden():
    """The module of the tests that reads the golden cases."""
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "golden")]
    import golden_cases

    return golden_cases


def golden(setting: Setting) -> Found:
    """The golden cases in fp32, without TF32, against the numbers of the official implementation."""
    golden_cases, found = tests_golden(), []
    with exact_products():
        for kind, names in (("sdpa", golden_cases.SUMMARY), ("eager", FOR_EAGER & golden_cases.SUMMARY.keys())):
            model = golden_cases.load(kind).to(setting.device).train()
            for name in sorted(names):
                found += golden_case(
                    setting, model, name, kind, golden_cases.SUMMARY[name], *golden_cases.case_inputs(name)
                )
    return found


def golden_case(setting, model, name, kind, summary, inputs, saved) -> Found:
    inputs, case = on_device(setting, inputs), f"{name}, {kind}"
    with torch.no_grad():
        logits = model(**inputs).logits.cpu()
    rows, positions = saved["sel"].T
    real = inputs["attention_mask"].bool().cpu()
    error = (logits[rows, positions] - torch.tensor(saved["logits_sel"])).abs().max()
    sums = (logits.logsumexp(-1) - torch.tensor(saved["logsumexp"]))[real].abs().max()
    wrong = "the model computes something else than the official implementation"
    found = [at_most(f"logits, {case}", max(error, sums), 1e-4, f"{wrong}: other logits")]
    loss, gradients = loss_and_gradients(
        model, inputs | {"labels": torch.tensor(saved["labels"]).to(setting.device)}, None
    )
    found.append(at_most(f"loss, {case}", abs(loss - summary["loss"]), 1e-4, f"{wrong}: another loss"))
    if norms_wanted := summary.get("grad_norms"):
        errors = {}
        for parameter, norm in norms_wanted.items():
            if not has_exact_zero_gradient(parameter):
                own = gradients[parameter].norm().item() if parameter in gradients else float("inf")
                errors[parameter] = abs(own - norm) / norm
        for key in saved.files:
            if key.startswith("grad/"):
                expected = torch.tensor(saved[key]).to(setting.device)
                own = gradients.get(key[5:], torch.full_like(expected, float("nan")))
                errors[key[5:]] = ((own.view_as(expected) - expected).norm() / expected.norm()).item()
        error, parameter = worst(errors)
        found.append(at_most(f"gradients, {case}", error, 1e-3, f"{wrong}: another gradient of {parameter}"))
    return found


# ---- Half precision


def half(setting: Setting) -> Found:
    """Weights and activations in bf16 and fp16 against fp32 of the same device, with the same weights."""
    golden_cases = tests_golden()
    case, _ = golden_cases.case_inputs("img2_c4_nlvr2")
    case = on_device(setting, case)
    random = torch.Generator().manual_seed(0)
    examples = [make_example(setting, random, [(1, 2)], 40, 13), make_example(setting, random, [], 60, 50)]
    batch, found = row_of(setting, examples), []
    questions = {name: x for name, x in padded(setting, examples).items() if name != "labels"}
    real = questions["attention_mask"].bool()
    with exact_products():
        small = golden_cases.load().to(setting.device)
        with torch.no_grad():
            official = small(**case).logits
        for name, dtype in half_dtypes(setting).items():
            results = []
            with torch.no_grad():  # its weights are bf16's numbers, which fp16 can hold too
                error = (small.to(dtype)(**case).logits.float() - official).norm() / official.norm()
            wrong = f"{name} differs from fp32 by more than rounding"
            found.append(at_most(f"logits of a golden case, {name}", error, 4 * torch.finfo(dtype).eps, wrong))
            for own in (torch.float32, dtype):
                # Weights that both precisions can hold, so that only the computation differs.
                model = short_model(setting, dtype).to(own)
                with torch.no_grad():
                    logits = model(**questions).logits[real].float()
                results.append((logits, *loss_and_gradients(model, batch, 63)))
                del model
            (exact, *expected), (rounded, *other) = results
            few = torch.finfo(dtype).eps
            error = (rounded - exact).norm() / exact.norm()
            found.append(at_most(f"logits, {name}", error, 4 * few, f"{wrong}: other logits"))
            loss = abs(other[0] - expected[0]) / expected[0]
            found.append(at_most(f"loss, {name}", loss, few, f"{wrong}: another loss"))
            # Not each alone: in the gradients of some of the tower's biases, almost everything cancels.
            errors = gradient_errors(other[1], expected[1])
            median = statistics.median(errors.values())
            found.append(
                at_most(f"gradients, median over tensors, {name}", median, 16 * few, f"{wrong}: other gradients")
            )
            error = together(other[1], expected[1])
            found.append(at_most(f"all gradients together, {name}", error, 16 * few, f"{wrong}: other gradients"))
    return found


def together(found: dict, expected: dict) -> float:
    """The norm of the difference of all gradients, as a share of the norm of the expected ones."""
    squares = [
        ((found[name].float() - grad.float()).square().sum().item(), grad.float().square().sum().item())
        for name, grad in expected.items()
    ]
    return (sum(own for own, _ in squares) / sum(whole for _, whole in squares)) ** 0.5


# ---- Packed rows


def alone(setting: Setting) -> list[dict]:
    """Examples that share no image: text alone, one token after an image, most of it supervised, and a long one."""
    random, long = torch.Generator().manual_seed(1), original_length(setting) + 50
    cases = [
        ([], 30, 4),
        ([(1, 2)], 2, 1),
        ([(2, 1), (1, 1)], 60, 50),
        ([(1, 1)], long, 3),
        ([(1, 1)], 7, 0),
    ]
    return [make_example(setting, random, *case) for case in cases]


def about_images(setting: Setting) -> list[dict]:
    """Examples of which neighbours have the same images: four questions about one image, and two about two images."""
    random = torch.Generator().manual_seed(2)
    page = about_one_image(setting, random, [(2, 2)], "a", (20, 5), (31, 7), (12, 0), (9, 9))
    pair = about_one_image(setting, random, [(1, 2), (1, 1)], "b", (25, 3), (original_length(setting) + 80, 30))
    same = about_one_image(setting, random, [(1, 2)], "c", (20, 6), (17, 3), (15, 1))
    for own in same[1:]:  # with the same question: its last token predicts the first token of every answer
        own["input_ids"][-len(own["input_ids"]) :][:-11] = same[0]["input_ids"][: len(own["input_ids"]) - 11]
    return [*page, *pair, *same]


def supervised_tokens(examples: list[dict]) -> int:
    return sum((example["labels"] >= 0).sum().item() for example in examples)


def separately(setting: Setting, model, examples: list[dict]):
    """The loss and gradients of examples that go through the model one by one, padded and not packed."""
    targets, loss, gradients = supervised_tokens(examples), 0.0, {}
    for example in examples:
        own_loss, own = loss_and_gradients(model, padded(setting, [example]), targets)
        loss += own_loss
        for name, grad in own.items():
            gradients[name] = gradients[name] + grad if name in gradients else grad
    return loss, gradients


def packing(setting: Setting) -> Found:
    """A packed row against its examples one by one, and against the same examples with padding."""
    examples, model = alone(setting), short_model(setting)
    wrong = "an example of a packed row is not computed as it is alone"
    with exact_products():
        row = row_of(setting, examples)
        targets = supervised_tokens(examples)
        found = loss_and_gradients(model, row, targets)
        checks = compare("packed against one by one", found, separately(setting, model, examples), 1e-5, 1e-3, wrong)
        for side in ("left", "right"):
            batch = loss_and_gradients(model, padded(setting, examples, side), targets)
            checks += compare(f"packed against padding on the {side}", found, batch, 1e-5, 1e-3, wrong)
        checks.append(leak(setting, model, examples))
    return checks


def leak(setting: Setting, model, examples: list[dict]) -> Check:
    """Changing one example of a row must not change the loss of another."""
    alone_supervised = [
        e | ({} if i == 2 else {"labels": torch.full_like(e["labels"], -100)}) for i, e in enumerate(examples)
    ]
    changed = list(alone_supervised)
    changed[0] = make_example(setting, torch.Generator().manual_seed(9), [], 30, 0)
    losses = []
    with torch.no_grad():
        for own in (alone_supervised, changed):
            losses.append(model(**row_of(setting, own), num_items_in_batch=1).loss.item())
    wrong = "an example of a packed row attends to its neighbour"
    return at_most("one example changed, loss of another", abs(losses[1] - losses[0]) / losses[0], 1e-6, wrong)


def sharing(setting: Setting) -> Found:
    """Examples that share their images in a packed row against the same examples without sharing, and one by one."""
    examples, model = about_images(setting), short_model(setting)
    targets, wrong = supervised_tokens(examples), "examples that share images are not computed as without sharing"
    with exact_products():
        row = row_of(setting, examples)
        plain = row_of(setting, examples, share_images=False)
        found = loss_and_gradients(model, row, targets)
        without = loss_and_gradients(model, plain, targets)
        return [
            at_most(
                "tokens of the shared row",
                row["input_ids"].numel(),
                plain["input_ids"].numel() - 1,
                "nothing is shared",
            ),
            *compare("shared against not shared", found, without, 1e-5, 1e-3, wrong),
            *compare("shared against one by one", found, separately(setting, model, examples), 1e-5, 1e-3, wrong),
        ]


# ---- Attention


@contextlib.contextmanager
def without_flash_attention_3():
    """torch's own varlen kernel runs within, even if FlashAttention-3 is installed. It must not have run yet."""
    with mock.patch.object(varlen, "_flash_attention_3", lambda: (False, "")):
        yield


FA3 = "varlen, FlashAttention-3"


def kernels(setting: Setting, precision: str) -> tuple[dict, list[LeftOut]]:
    """For every attention kernel that can run here in this precision: its name in the report, the name of
    `attn_implementation`, and a context in which it runs; and those that can't run."""
    there, missing = {"eager": ("eager", contextlib.nullcontext)}, []
    for kind in varlen.KERNELS:
        if lacking := _missing_for_flash(kind, precision):
            missing.append(LeftOut(f"{kind} in {precision}", f"it needs {lacking}"))
        elif kind == "varlen":
            there["varlen, torch's own"] = (kind, without_flash_attention_3)
        else:
            there[kind] = (kind, contextlib.nullcontext)
    if "varlen, torch's own" in there and varlen._has_flash_attention_3():
        there[FA3] = ("varlen", contextlib.nullcontext)
    elif precision == "bf16":
        missing.append(LeftOut("FlashAttention-3", "it needs a Hopper GPU and the package flash_attn_interface"))
    return there, missing


def attention(setting: Setting) -> Found:
    """Every attention kernel that is there against sdpa: as near to fp32 as sdpa in the same precision is."""
    rows = {"separate": alone(setting), "shared images": [*alone(setting), *about_images(setting)]}
    found, left_out, sdpa = [], [], {}
    with exact_products():
        found += eager_in_fp32(setting, rows)
        # FlashAttention-3 stays in the place of torch's kernel once it has run, also for sdpa. So it is the last.
        for wanted in (lambda name: name != FA3, lambda name: name == FA3):
            for precision, dtype in half_dtypes(setting).items():
                there, missing = kernels(setting, precision)
                left_out += [x for x in missing if x not in left_out]
                for name, examples in rows.items():
                    if own := {kernel: how for kernel, how in there.items() if wanted(kernel)}:
                        case = (precision, name)
                        batch, targets = row_of(setting, examples), supervised_tokens(examples)
                        exact = loss_and_gradients(short_model(setting, dtype).float(), batch, targets)
                        model = short_model(setting, dtype)
                        if case not in sdpa:
                            sdpa[case] = errors_of(model, batch, targets, exact)
                        found += nearness(setting, model, batch, targets, exact, own, sdpa[case], *case)
                        del exact, model
    return found + left_out


def eager_in_fp32(setting: Setting, rows: dict[str, list[dict]]) -> Found:
    found, model = [], short_model(setting)
    for name, examples in rows.items():
        batch, targets = row_of(setting, examples), supervised_tokens(examples)
        results = [loss_and_gradients(use_attention(model, kind), batch, targets) for kind in ("eager", "sdpa")]
        found += compare(f"eager in fp32, {name}", *results, 1e-5, 1e-3, "eager attention differs from sdpa")
    return found


def errors_of(model, batch, targets, exact) -> tuple[float, dict[str, float]]:
    """The relative errors of the loss and of every gradient."""
    loss, gradients = loss_and_gradients(model, batch, targets)
    return abs(loss - exact[0]) / abs(exact[0]), gradient_errors(gradients, exact[1])


def nearness(setting, model, batch, targets, exact, there, sdpa, precision: str, name: str) -> Found:
    """Checks that the errors of these kernels are not larger than sdpa's, to a factor of four and some rounding."""
    eps, found = torch.finfo(next(model.parameters()).dtype).eps, []
    for kernel, (kind, context) in there.items():
        with context():
            own = errors_of(use_attention(model, kind), batch, targets, exact)
            cells = {"kernel": kernel, "precision": precision, "row": name, "code": describe_attention(kind)}
        ratio, parameter = worst({name: error / (sdpa[1][name] + eps) for name, error in own[1].items()})
        label, wrong = (
            f"{kernel} in {precision}, {name}",
            "this attention kernel differs from sdpa by more than rounding",
        )
        found += [
            Row("Attention kernels that ran", cells),
            at_most(f"loss, {label}", own[0], 4 * max(sdpa[0], eps), wrong),
            at_most(
                f"errors of gradients as multiples of sdpa's, {label}",
                ratio,
                4,
                f"{wrong}, most in the gradient of {parameter}",
            ),
        ]
    return found


# ---- Functions


def plain_functions():
    """For each function with a hand-written gradient: itself, the formula for autograd, and shapes of its arguments."""

    def rms(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rotated(qkv, cos, sin):
        half, out = cos.shape[-1] // 2, []
        for i, heads in enumerate(qkv.unflatten(-1, (-1, 96)).split([2, 2, 2], dim=-2)):
            if i < 2:
                turned = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
                heads = heads * cos[:, None] + turned * sin[:, None]
            out.append(heads.flatten(-2))
        return torch.cat(out, dim=-1)

    def ours(qkv, cos, sin):
        parts = functional.rotate(qkv * 1, cos, sin, (2, 2, 2), 96)  # it changes its argument
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)

    angles = torch.rand(70, 48).repeat(1, 2) * 6
    return {
        "quick_gelu": (functional.QuickGELU(), lambda x: x * torch.sigmoid(1.702 * x), [torch.randn(70, 4096) * 4]),
        "swiglu": (
            functional.swiglu,
            lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            [torch.randn(70, 2048) * 4],
        ),
        "rotate": (ours, rotated, [torch.randn(70, 576), angles.cos(), angles.sin()]),
        "rms_norm": (lambda x, w: norms.rms_norm(x, w, 1e-5), rms, [torch.randn(70, 3072), torch.rand(3072) + 0.5]),
        "layer_norm": (
            lambda x, w, b: norms.layer_norm(x, w, b, 1e-5, True),
            lambda x, w, b: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * w + b
            ),
            [torch.randn(70, 1024), torch.rand(1024) + 0.5, torch.randn(1024)],
        ),
    }


def functions(setting: Setting) -> Found:
    """Functions with hand-written gradients against plain formulas with autograd's; fused functions against plain."""
    torch.manual_seed(0)
    found = []
    with exact_products():
        for name, (ours, formula, arguments) in plain_functions().items():
            results = []
            for function in (ours, formula):
                own = [x.to(setting.device, copy=True) for x in arguments]
                for i, x in enumerate(own):
                    x.requires_grad_(not i or x.dim() == 1)
                output = function(*own)
                weights = torch.linspace(-1, 1, output.numel(), device=setting.device).view_as(output)
                (output * weights).sum().backward()
                results.append([output.detach(), *(x.grad for x in own if x.requires_grad)])
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
            found.append(at_most(f"{name} in fp32", error, 1e-5, f"{name} or its gradient is wrong"))
        found.append(cross_entropy(setting))
    return found + fused_functions(setting)


def cross_entropy(setting: Setting) -> Check:
    """The loss that computes logits in chunks, and its gradients, against torch's."""
    head = nn.Linear(192, 400, bias=False).to(setting.device)
    hidden = torch.randn(functional.LOSS_CHUNK + 70, 192, device=setting.device)
    targets = torch.randint(0, 400, (len(hidden),), device=setting.device)
    results = []
    for ours in (True, False):
        head.zero_grad()
        x = hidden.clone().requires_grad_()
        if ours:
            loss = functional.cross_entropy(x, targets, len(hidden), head)
        else:
            loss = F.cross_entropy(head(x), targets)
        loss.backward()
        results.append([loss.detach(), x.grad, head.weight.grad.clone()])
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    return at_most("cross_entropy in chunks, in fp32", error, 1e-5, "the loss or its gradient is wrong")


def fused_functions(setting: Setting) -> Found:
    """Each function compiled for the device, and a whole step with and without fused functions."""
    # Training fuses on an accelerator alone. A CPU compares the forms that would be compiled, and compiles nothing.
    backend = "aot_eager" if setting.device == "cpu" else "inductor"
    random, found = torch.Generator().manual_seed(0), []
    examples = [make_example(setting, random, [(1, 2)], 40, 13), make_example(setting, random, [], 60, 50)]
    batch = row_of(setting, examples)
    for precision, dtype in half_dtypes(setting).items():
        problems = fused.turn_on(torch.device(setting.device), dtype, backend)
        wrong = f"a fused function differs from the plain one or can't be compiled: {'; '.join(problems)}"
        found.append(must_be(f"problems of fused functions, {precision}", len(problems), 0, wrong))
        exact = short_model(setting, dtype).float()
        with exact_products():
            reference = loss_and_gradients(exact, batch, 63)
        del exact
        model, errors = short_model(setting, dtype), []
        for on in (True, False):
            if not on:
                fused.turn_off()
            errors.append(errors_of(model, batch, 63, reference))
        (loss, gradients), (plain_loss, plain) = errors
        eps = torch.finfo(dtype).eps
        error, parameter = worst({name: own / (plain[name] + eps) for name, own in gradients.items()})
        wrong = "a step with fused functions differs from one with plain functions by more than rounding"
        found.append(at_most(f"loss, fused, {precision}", loss, 4 * max(plain_loss, eps), wrong))
        name = f"errors of gradients as multiples of the plain functions', {precision}"
        found.append(at_most(name, error, 4, f"{wrong}, most in the gradient of {parameter}"))
    return found


def crops(setting: Setting) -> Found:
    """Crops normalised on the device against those that the image processor makes on the CPU."""
    sys.path += [str(ROOT / "tests" / "golden")]
    import golden_inputs

    processor, found = image_processor(setting), []
    statistics = processor.image_mean, processor.image_std
    side = processor.image_size
    wrong = "crops are normalised on the device in another way than by the image processor"
    for sizes in ([(side, side)], [(4 * side, 3 * side)], [(640, 480), (333, 1000), (100, 90)]):
        images = [golden_inputs.pil_image(*size) for size in sizes]
        tiles = torch.cat([processor.tiles(image) for image in images]).to(setting.device)
        grids = [processor.crop_grid(*size) for size in sizes]
        expected = torch.cat([processor.crops(image) for image in images])
        name = "images of " + ", ".join(f"{w}x{h}" for w, h in sizes)
        there = crops_of_tiles(tiles, grids, *statistics).cpu()
        found.append(at_most(name, (there - expected).abs().max(), 1e-4, wrong))
        for precision, dtype in half_dtypes(setting).items():
            there = crops_of_tiles(tiles, grids, *statistics, dtype).float().cpu()
            limit = torch.finfo(dtype).eps * expected.abs().max().item()
            found.append(at_most(f"{name}, {precision}", (there - expected).abs().max(), limit, wrong))
    return found


# ---- Generation


def prompts(setting: Setting) -> list[dict]:
    """Eight prompts of different length, with no image, one or two."""
    random = torch.Generator().manual_seed(3)
    images = [[], [(1, 2)], [(2, 2)], [(1, 1), (2, 1)]] * 2
    lengths = (5, 9, 14, 7, original_length(setting) - 3, 11, 3, 21)  # the fifth grows longer than the original length
    return [make_example(setting, random, own, n, 0) for own, n in zip(images, lengths, strict=True)]


def generate(setting: Setting, model, examples: list[dict], n: int):
    """Greedy answers: tokens (batch, n), and the logits of which each is the largest (batch, n, vocabulary)."""
    batch = {name: x for name, x in padded(setting, examples, "left").items() if name != "labels"}
    options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return made.sequences[:, batch["input_ids"].shape[1] :], torch.stack(made.logits, 1).float()


def without_cache(setting: Setting, model, example: dict, tokens: torch.Tensor) -> torch.Tensor:
    """The logits (n, vocabulary) from which each of these tokens is chosen, from whole sequences, without a cache."""
    logits = []
    for i in range(len(tokens)):
        own = example | {"input_ids": torch.cat([example["input_ids"], tokens[:i].cpu()])}
        own |= {"labels": torch.full_like(own["input_ids"], -100)}
        batch = {name: x for name, x in padded(setting, [own]).items() if name != "labels"}
        logits.append(model(**batch, logits_to_keep=1, use_cache=False).logits[0, -1].float())
    return torch.stack(logits)


@torch.no_grad()
def generation(setting: Setting) -> Found:
    """Answers with a cache against whole sequences without one, and a batch of 8 against each prompt alone."""
    examples, found, n = prompts(setting), [], 6
    with exact_products():
        model = short_model(setting).eval()
        tokens, logits = generate(setting, model, examples, n)
        found += against_whole(setting, model, examples, tokens, logits, "sdpa in fp32", 1e-4)
        alone = [generate(setting, model, [example], n) for example in examples]
        same = sum(torch.equal(own[0][0], row) for own, row in zip(alone, tokens, strict=True))
        wrong = "a prompt gets another answer in a batch than alone"
        found.append(must_be("answers that are the same in a batch of 8 and alone, fp32", same, len(examples), wrong))
        for precision, dtype in half_dtypes(setting).items():
            model = short_model(setting, dtype).eval()
            kinds = ["sdpa"] if _missing_for_flash("flash_attention_2", precision) else ["sdpa", "flash_attention_2"]
            for kind in kinds:
                results = generate(setting, use_attention(model, kind), examples, n)
                name = f"{kind} in {precision}"
                found += against_whole(setting, model, examples, *results, name, 4 * torch.finfo(dtype).eps)
    return found


def against_whole(setting, model, examples, tokens, logits, precision: str, limit: float) -> Found:
    """Checks the logits of answers. limit: for the norm of their error, as a share of their norm."""
    errors = []
    for example, row, own in zip(examples, tokens, logits, strict=True):
        whole = without_cache(setting, model, example, row)
        errors.append(((own - whole).norm() / whole.norm()).item())
    wrong = "generation with a cache gives other logits than the whole sequence without one"
    longest = max(range(len(errors)), key=errors.__getitem__)
    row = Row(
        "Generation: errors of logits with a cache, by prompt",
        {"computed with": precision, "median": statistics.median(errors), "largest": errors[longest]},
    )
    name = f"logits with a cache in a batch of {len(examples)}, {precision}"
    return [row, at_most(name, np.max(errors), limit, f"{wrong}, most for prompt {longest + 1}")]
