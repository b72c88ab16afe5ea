"""Flash attention of packed rows gives what SDPA attention gives. A reference takes the place of the kernels."""

import flash_kernels
import pytest
import torch
from golden_cases import SUMMARY, case_inputs
from golden_cases import load as load_golden
from helpers import TINY_MODEL
from packaging.version import Version

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.model import varlen
from phi3v.model.image_processing_phi3v import num_image_tokens
from phi3v.model.packing import IGNORE_INDEX, pack
from phi3v.model.varlen import KERNELS, _aligned, _torch_backward, _torch_forward, layout_of, varlen_attention

FLASH = list(KERNELS)
torchs_kernel = pytest.mark.skipif(
    Version(torch.__version__).release < (2, 10), reason="flash attention of torch needs torch 2.10 or newer"
)
ORIGINAL = 90  # tokens from which the long rotary factors are taken, in the rows of this file


@pytest.fixture
def kernels(monkeypatch):
    """kernels(*dtypes): puts references that take these dtypes in the place of both kernels; returns them by name."""

    def put(*dtypes):
        used = {"flash_attention_2": flash_kernels.install_flash_attn(monkeypatch, *dtypes)}
        used["varlen"] = flash_kernels.reference(*dtypes)
        monkeypatch.setitem(KERNELS, "varlen", used["varlen"])
        return used

    return put


def use(model, kind):
    """The model, with attention of this kind from now on, in the tower too."""
    model.config._attn_implementation = kind
    model.config.vision_config._attn_implementation = kind
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = kind
    return model


def loss_and_gradients(model, batch, n):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=n).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, loss, gradients):
    """Relative differences of the loss, and of every parameter's gradient."""
    assert found[0] == pytest.approx(expected[0], rel=loss)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, grad in expected[1].items():
        if not name.endswith("k_proj.bias"):  # whose exact gradient is zero
            assert (found[1][name] - grad).norm() <= gradients * grad.norm(), name


# ---- Golden cases


def packed_case(name):
    """The examples of a golden case in one row, and how many supervised tokens it has."""
    inputs, saved = case_inputs(name)
    examples = []
    for ids, mask, labels in zip(
        inputs["input_ids"], inputs["attention_mask"], torch.tensor(saved["labels"]), strict=True
    ):
        real = mask.bool()
        examples.append({"input_ids": ids[real], "labels": labels[real], "images_key": None})
        examples[-1] |= {"tiles": torch.zeros(0), "grids": []}
    batch = pack(examples, 4096, True)
    del batch["tiles"], batch["image_index"]
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    return batch | pixels, len(batch["labels"])


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in SUMMARY for k in FLASH if (n, k) != ("len4097", "varlen")])
def test_golden_case(name, kind, kernels, monkeypatch):
    """The padded batch, which transformers computes, and the packed row."""
    monkeypatch.setattr("phi3v.model.modeling_phi3v.dist.is_initialized", lambda: False)
    used, model = kernels(torch.float32), load_golden().train()
    inputs, saved = case_inputs(name)
    padded = inputs | {"labels": torch.tensor(saved["labels"])}
    n = (padded["labels"][:, 1:] != IGNORE_INDEX).sum().item()
    row, n_in_row = packed_case(name)
    assert n_in_row == n
    expected = loss_and_gradients(model, padded, n)
    with torch.no_grad():
        logits = model(**inputs).logits
    use(model, kind)
    assert_close(loss_and_gradients(model, row, n), expected, loss=2e-6, gradients=1e-5)
    assert len(used[kind].forward.calls) == model.config.num_hidden_layers
    if kind == "flash_attention_2" and name != "len4097":  # with "varlen", SDPA attention computes padded batches
        assert_close(loss_and_gradients(model, padded, n), expected, loss=2e-6, gradients=1e-5)
        with torch.no_grad():
            found = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], logits[real], rtol=0, atol=1e-5 * logits[real].abs().max().item())
        assert len(used[kind].forward.calls) == model.config.num_hidden_layers  # still: it was not packed


# ---- Rows of a small model


def tiny_model(dtype=torch.float32, **config):
    torch.manual_seed(0)
    return (
        Phi3VForCausalLM._from_config(Phi3VConfig(**TINY_MODEL | config), attn_implementation="sdpa").to(dtype).train()
    )


def example(generator, grids, text, supervised, key=None, tiles=None):
    """`text` random words after images of these (down, across) sub-crops, the last of them supervised."""
    images = [torch.full((num_image_tokens(h, w, 2),), -1 - k) for k, (h, w) in enumerate(grids)]
    ids = torch.cat([*images, torch.randint(3, 399, (text,), generator=generator)])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
    if tiles is None:
        shape = (sum(h * w for h, w in grids), 56, 56, 3)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": list(grids), "images_key": key}


def row_of(examples, share_images=True):
    batch = pack(examples, ORIGINAL, share_images, (0.5,) * 3, (0.5,) * 3)
    return batch | {"image_sizes": torch.tensor(batch["packing"].grids, dtype=torch.long).view(-1, 2) * 56}


def alone():
    """Examples that share no image: of text alone, of one token after an image, supervised in its larger part, long."""
    g = torch.Generator().manual_seed(1)
    found = [example(g, [], 30, 4), example(g, [(1, 2)], 1, 1), example(g, [(2, 1), (1, 1)], 60, 50)]
    return [*found, example(g, [(1, 1)], 100, 3), example(g, [(1, 1)], 7, 0)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FLASH)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_row_without_shared_images(key_heads, kind, checkpointing, kernels):
    used, model, row = kernels(torch.float32), tiny_model(num_key_value_heads=key_heads), row_of(alone())
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    expected = loss_and_gradients(model, row, 58)
    assert_close(loss_and_gradients(use(model, kind), row, 58), expected, loss=1e-6, gradients=1e-5)
    ends = [0, 30, 48, 140, 253, 273]
    assert used[kind].forward.calls[:2] == [(ends, ends, True), ([0, 5, 7, 99, 103, 104], ends, True)]


def about_one_image(seed, grids, key, *lengths):
    """Examples that share images. lengths: of each, how many words it has, and how many of them are supervised."""
    g = torch.Generator().manual_seed(seed)
    first = example(g, grids, *lengths[0], key)
    return [first, *(example(g, grids, *own, key, first["tiles"]) for own in lengths[1:])]


def alike(seed, key):
    """Examples with the same question and different answers. The last token of the question predicts them all."""
    found = about_one_image(seed, [(1, 2)], key, (20, 6), (17, 3), (15, 1))
    for own in found[1:]:
        own["input_ids"][18:32] = found[0]["input_ids"][18:32]
    return found


PAGE = about_one_image(2, [(2, 2)], "a", (20, 5), (31, 7), (12, 0), (9, 9))
PAIR = about_one_image(3, [(1, 2), (1, 1)], "b", (25, 3), (40, 30))
SHARED = {
    "one page": PAGE,
    "two branches": PAIR,
    "the same question": alike(4, "c"),
    "two groups, because two examples are long": about_one_image(5, [(1, 2)], "d", (20, 5), (31, 5), (90, 7), (95, 8)),
    "several groups among others": [*alone(), *PAGE, alone()[2], *PAIR, *alike(4, "c"), alone()[0]],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "key_heads"), [("flash_attention_2", 4), ("varlen", 4), ("varlen", 2)])
@pytest.mark.parametrize("name", SHARED)
def test_a_row_with_shared_images(name, kind, key_heads, checkpointing, kernels):
    """Against SDPA attention with its mask of branches, and against a row without sharing."""
    used, model = kernels(torch.float32), tiny_model(num_key_value_heads=key_heads)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    row, separate = (row_of(SHARED[name], share_images) for share_images in (True, False))
    n = len(row["labels"])
    assert any(group.branches for group in row["packing"].groups)
    by_mask, by_example = (loss_and_gradients(model, own, n) for own in (row, separate))
    found = loss_and_gradients(use(model, kind), row, n)
    assert_close(found, by_mask, loss=1e-6, gradients=1e-5)
    assert_close(found, by_example, loss=1e-6, gradients=1e-5)
    assert {is_causal for _, _, is_causal in used[kind].forward.calls} == {True, False}


def test_the_layout_of_a_row_with_shared_images():
    """The first branch goes with the common part; the others attend to it as well."""
    packing = row_of([*alone()[:1], *PAGE, *PAIR])["packing"]
    assert [(g.length, g.branches) for g in packing.groups] == [(30, ()), (27, (20, 31, 12, 9)), (30, (25, 40))]
    whole, last = (layout_of(packing, trimmed, "cpu") for trimmed in (False, True))
    keys = [0, 30, 77, 108, 120, 129, 184, 224]
    assert whole.own.query_ends.tolist() == whole.own.key_ends.tolist() == last.own.key_ends.tolist() == keys
    assert last.own.query_ends.tolist() == [0, 5, 26, 57, 69, 78, 103, 143]
    for layout, starts in ((whole, (77, 184)), (last, (26, 103))):
        assert layout.shared.query_ends.tolist() == [0, 52, 92] and layout.shared.key_ends.tolist() == [0, 27, 57]
        assert layout.query_rows.tolist() == [*range(starts[0], starts[0] + 52), *range(starts[1], starts[1] + 40)]
        assert layout.key_rows.tolist() == [*range(30, 57), *range(129, 159)]
        assert layout.own.is_causal and not layout.shared.is_causal
    one = layout_of(row_of(PAIR)["packing"], False, "cpu")
    assert (one.query_rows, one.key_rows) == (slice(55, 95), slice(0, 30))  # nothing is copied


@pytest.mark.parametrize("share_images", [False, True])
@pytest.mark.parametrize("dtype", flash_kernels.HALF, ids=str)
@pytest.mark.parametrize("weights", ["fp32", "half"])
def test_half_precision(weights, dtype, share_images, kernels):
    """The kernels get half precision alone: from fp32 weights under autocast, and from weights in half precision. The
    result is as near to that in fp32 as SDPA attention's."""
    kernels(dtype)
    row = row_of([*alone(), *PAGE, *PAIR], share_images)
    expected = loss_and_gradients(tiny_model(), row, 58)
    model, errors = tiny_model(torch.float32 if weights == "fp32" else dtype), []
    for kind in ("sdpa", "varlen"):
        with torch.autocast("cpu", dtype, enabled=weights == "fp32"):
            loss, grads = loss_and_gradients(use(model, kind), row, 58)
        assert loss == pytest.approx(expected[0], rel=1e-3)
        errors.append({name: ((grads[name] - grad).norm() / grad.norm()).item() for name, grad in expected[1].items()})
    for name, error in errors[1].items():
        if not name.endswith("k_proj.bias"):
            assert error <= 2 * errors[0][name], name


def test_fp32_states_are_converted_under_autocast(kernels):
    """As when a layer in 4 bits returns fp32."""
    kernels(torch.bfloat16)
    model = use(tiny_model(), "varlen")
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.register_forward_hook(lambda module, inputs, output: output.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_and_gradients(model, row_of(alone()), 58)[1]


def test_dropout_takes_sdpa(kernels):
    used, model = kernels(torch.float32), use(tiny_model(attention_dropout=0.1), "varlen")
    assert loss_and_gradients(model, row_of(alone()), 58)[1] and not used["varlen"].forward.calls
    with torch.no_grad():
        model.eval()(**row_of(alone()))
    assert used["varlen"].forward.calls


# ---- What kernels must not be given


def test_rows_outside_of_all_segments_are_refused(kernels):
    kernels(torch.float32)
    row = row_of(alone())
    states = torch.zeros(1, row["input_ids"].shape[1] + 1, 4, 16)
    with pytest.raises(
        ValueError, match="274 queries, 274 keys and 274 values for segments of 273 queries and 273 keys"
    ):
        varlen_attention(KERNELS["varlen"], states, states, states, row["packing"], False, 1.0)


def test_states_begin_at_multiples_of_16_bytes():
    whole = torch.zeros(10, 4, 16, dtype=torch.bfloat16)
    for aligned in (whole, whole[2:], whole[:, 1:3], whole.transpose(0, 1), torch.zeros(10, 24, 16)[:, 4:8]):
        assert _aligned(aligned) is aligned
    shifted = torch.zeros(641, dtype=torch.bfloat16)[1:].view(10, 4, 16)
    wide = torch.zeros(10, 68, dtype=torch.bfloat16)[:, :64].view(10, 4, 16)
    for other in (shifted, wide, whole.transpose(1, 2).contiguous().transpose(1, 2)):
        copy = _aligned(other)
        assert copy.data_ptr() % 16 == 0 and copy.is_contiguous() and torch.equal(copy, other)
    with pytest.raises(ValueError, match="heads of a multiple of 8 numbers, not 20"):
        _aligned(torch.zeros(10, 4, 20, dtype=torch.float16))


@torchs_kernel
@pytest.mark.parametrize("dtype", flash_kernels.HALF, ids=str)
def test_the_operations_of_the_installed_torch(dtype):
    """On the meta device torch checks the arguments and gives the shapes and dtypes of the results."""
    layout = layout_of(row_of([*alone(), *PAGE])["packing"], True, "meta")
    for segments in (layout.own, layout.shared):
        assert segments.query_ends.dtype == segments.key_ends.dtype == torch.int32
        query = torch.empty(segments.queries, 32, 96, dtype=dtype, device="meta")
        key, value = torch.empty(2, segments.keys, 32, 96, dtype=dtype, device="meta")
        output, lse = _torch_forward(query, key, value, segments, 0.1)
        assert output.shape == query.shape and output.dtype == dtype
        assert lse.shape == (32, segments.queries) and lse.dtype == torch.float32
        grads = _torch_backward(torch.empty_like(output), query, key, value, output, lse, segments, 0.1)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (query, key, value)]


@torchs_kernel
def test_flash_attention_3_that_cannot_be_loaded_leaves_torchs_kernel(monkeypatch):
    monkeypatch.setattr(varlen, "_has_flash_attention_3", lambda: True)
    monkeypatch.setattr(varlen, "_flash_attention_3", varlen._flash_attention_3.__wrapped__)  # without its cache
    assert varlen._flash_attention_3() == (False, "No module named 'flash_attn_interface'")
    assert "FlashAttention-3 is installed and can't be used: No module" in KERNELS["varlen"].describe()
