"""The model gives the numbers of the official implementation; saving, loading and generation."""

import json
import os

import numpy as np
import pytest
import torch
from golden_cases import SUMMARY, case_inputs, load
from helpers import GOLDEN, TINY_MODEL
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import GenerationMixin

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.modeling_phi3v import GrowingLayer, Phi3VRotaryEmbedding

HUB_CONFIG_KEYS = {"rope_scaling", "rope_theta", "original_max_position_embeddings", "img_processor", "embd_layer"}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SUMMARY)
def test_golden_case(name, attn_implementation, monkeypatch):
    # With other ranks a text alone would take a blank crop along; an earlier test may have started a group of one.
    monkeypatch.setattr("phi3v.model.modeling_phi3v.dist.is_initialized", lambda: False)
    model = load(attn_implementation).train()
    inputs, saved = case_inputs(name)
    with torch.no_grad():
        logits = model(**inputs).logits
    rows, positions = saved["sel"].T
    torch.testing.assert_close(logits[rows, positions], torch.tensor(saved["logits_sel"]), rtol=0, atol=1e-4)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits.logsumexp(-1)[real], torch.tensor(saved["logsumexp"])[real], rtol=0, atol=1e-4)

    loss = model(**inputs, labels=torch.tensor(saved["labels"])).loss
    assert loss.item() == pytest.approx(SUMMARY[name]["loss"], abs=1e-5)
    loss.backward()
    expected = SUMMARY[name].get("grad_norms", {})
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in SUMMARY[name].get("grad_none", []):
            assert parameter.grad is None, parameter_name
        elif parameter_name in expected:
            # A key bias moves all scores of a query alike: its exact gradient is 0, and the rest is rounding.
            noise = 1e-6 if parameter_name.endswith("k_proj.bias") else 0
            assert parameter.grad.norm().item() == pytest.approx(expected[parameter_name], rel=1e-4, abs=noise)
    for key in [key for key in saved.files if key.startswith("grad/")]:
        ours = model.get_parameter(key.removeprefix("grad/")).grad
        torch.testing.assert_close(ours, torch.tensor(saved[key]).view_as(ours), rtol=1e-3, atol=1e-5)


def test_a_golden_case_with_the_norms_of_an_accelerator(monkeypatch):
    monkeypatch.setattr("phi3v.model.norms._is_on_cpu", lambda x: False)
    test_golden_case("img2_c4_nlvr2", "sdpa", monkeypatch)


def test_rotary_at_real_size():
    saved = np.load(GOLDEN / "rope_real_dims.npz")
    snapshot = os.environ.get("PHI3V_SNAPSHOT")
    if not snapshot:
        # Without the shipped factors, what does not depend on them: the factor on cos/sin, and where the long begin.
        rope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        rotary = Phi3VRotaryEmbedding(Phi3VConfig(rope_scaling=rope))
        assert rotary.attention_scaling == pytest.approx(1.190238, abs=1e-6)
        short = rotary(torch.zeros(1), torch.arange(4096)[None])
        long = rotary(torch.zeros(1), torch.arange(4097)[None])
        assert not torch.equal(short[0], long[0][:, :4096])
        mixed = rotary(torch.zeros(1), torch.stack([torch.arange(4097), torch.arange(4097).clamp(max=4095)]))
        assert torch.equal(mixed[0][0], long[0][0]) and torch.equal(mixed[0][1, :4096], short[0][0])
        return
    rotary = Phi3VRotaryEmbedding(AutoConfig.from_pretrained(snapshot))
    rotary = rotary.to(torch.bfloat16)  # must not round the frequencies
    for length in (4096, 4097):
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        rows = torch.tensor(saved[f"positions_{length}"])
        torch.testing.assert_close(cos[0][rows], torch.tensor(saved[f"cos_{length}"])[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(sin[0][rows], torch.tensor(saved[f"sin_{length}"])[0], rtol=0, atol=2e-5)


# Where config.json of Phi-3-vision-128k-instruct differs from that of Phi-3.5-vision-instruct.
OLDER = {"rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 47 + [64.0]}}
OLDER |= {"sliding_window": 131072, "_name_or_path": "Phi-3-vision-128k-instruct"}


@pytest.mark.parametrize("own", [{}, OLDER], ids=["Phi-3.5-vision-instruct", "Phi-3-vision-128k-instruct"])
def test_real_size_names_and_shapes(own):
    hub = json.loads((GOLDEN / "hub_tensor_shapes.json").read_text())
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(pad_token_id=32000, **own))
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == hub
    assert len(hub) == 592
    assert sum(p.numel() for p in model.parameters()) == 4_146_621_440
    assert model.model.vision_embed_tokens.grid == 12


def test_save_and_load(tmp_path):
    model = load()
    model.save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(GOLDEN / "tiny" / "model.safetensors", "pt") as hub,
    ):
        assert set(saved.keys()) == set(hub.keys())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is Phi3VForCausalLM
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    config, hub_config = (json.loads((p / "config.json").read_text()) for p in (tmp_path, GOLDEN / "tiny"))
    assert HUB_CONFIG_KEYS <= config.keys()
    for key in hub_config.keys() - {"_name_or_path", "transformers_version", "vision_config"}:
        assert config[key] == hub_config[key], key
    for target in config["auto_map"].values():
        assert target.startswith("microsoft/Phi-3.5-vision-instruct--") and target.count(".") == 2
    assert {"rope_parameters", "dtype"}.isdisjoint(config)


def test_wte_copy_of_the_embedding_is_accepted_and_not_written(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(GOLDEN / "tiny" / "model.safetensors")
    weights["model.vision_embed_tokens.wte.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDEN / "tiny" / "config.json").read_text())
    model, info = Phi3VForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not any("wte" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_crops_equal_the_official_layout(dtype):
    model = load().to(dtype)
    inputs, _ = case_inputs("img2_c4_nlvr2")
    expected = model(**inputs).logits
    counts = (inputs["image_sizes"] // 336).prod(-1) + 1
    inputs["pixel_values"] = torch.cat([p[:n] for p, n in zip(inputs["pixel_values"], counts, strict=True)])
    assert torch.equal(model(**inputs).logits, expected)


def image_ids(h, w, g=2):
    return [-1] * ((h * w + 1) * g * g + 1 + (h + 1) * g)


def tiny_examples():
    """Three prompts of different length: with one image, with two, and text only."""
    torch.manual_seed(1)
    texts = [torch.randint(3, 400, (n,)).tolist() for n in (5, 9, 14)]
    prompts = [image_ids(1, 2) + texts[0], texts[1][:4] + image_ids(2, 2) + image_ids(1, 1) + texts[1][4:], texts[2]]
    sizes = [[[56, 112]], [[112, 112], [56, 56]], []]
    crops = [torch.randn(3, 3, 56, 56), torch.randn(7, 3, 56, 56), torch.zeros(0, 3, 56, 56)]
    return prompts, sizes, crops


def batch_of(indices, side):
    prompts, sizes, crops = tiny_examples()
    length = max(len(prompts[i]) for i in indices)
    ids, mask = torch.zeros(len(indices), length, dtype=torch.long), torch.zeros(len(indices), length, dtype=torch.long)
    for row, i in enumerate(indices):
        n = len(prompts[i])
        span = slice(length - n, length) if side == "left" else slice(n)
        ids[row, span], mask[row, span] = torch.tensor(prompts[i]), 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([crops[i] for i in indices]),
        "image_sizes": torch.tensor(sum((sizes[i] for i in indices), [])).view(-1, 2),
    }


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_equals_its_examples(side, attn_implementation):
    torch.manual_seed(0)
    model = Phi3VForCausalLM._from_config(Phi3VConfig(**TINY_MODEL), attn_implementation=attn_implementation).eval()
    batch = batch_of([0, 1, 2], side)
    logits = model(**batch).logits
    for i in range(3):
        alone = model(**batch_of([i], side)).logits[0]
        torch.testing.assert_close(logits[i][batch["attention_mask"][i].bool()], alone, rtol=0, atol=2e-5)


def greedy(model, batch, n, stop_ids):
    """Greedy decoding without a cache: the model reads the whole sequence again for every token."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(n):
        logits = model(**batch | {"input_ids": ids, "attention_mask": mask}, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        if token.item() in stop_ids:
            break
    return ids[0, batch["input_ids"].shape[1] :].tolist()


def test_batched_generation_with_cache_equals_decoding_without():
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**TINY_MODEL)).eval()
    with torch.no_grad():
        wanted = [greedy(model, batch_of([i], "left"), 8, ()) for i in range(3)]
        stop = wanted[1][3]  # a token that one of the rows is known to write
        wanted = [greedy(model, batch_of([i], "left"), 8, (stop,)) for i in range(3)]
    batch = batch_of([0, 1, 2], "left")
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=[399, stop], pad_token_id=0)
    for row, expected in zip(ids[:, batch["input_ids"].shape[1] :].tolist(), wanted, strict=True):
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {0}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_the_cache_grows_in_pieces_and_gives_what_transformers_cache_gives(monkeypatch, options):
    monkeypatch.setattr(GrowingLayer, "room", 3)
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**TINY_MODEL)).eval()
    options |= {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    grown = model.generate(**batch_of([0, 1, 2], "left"), **options)
    assert all(type(layer) is GrowingLayer for layer in grown.past_key_values.layers)
    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", GenerationMixin._prepare_cache_for_generation)
    plain = model.generate(**batch_of([0, 1, 2], "left"), **options)
    assert not any(type(layer) is GrowingLayer for layer in plain.past_key_values.layers)
    assert grown.sequences.tolist() == plain.sequences.tolist()


def test_generation_switches_to_the_long_factors_at_an_examples_own_length():
    factors = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    settings = TINY_MODEL | {
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 128,
        "rope_scaling": factors,
    }
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**settings)).eval()
    with torch.no_grad():
        wanted = [greedy(model, batch_of([i], "left"), 16, ()) for i in range(3)]
    batch = batch_of([0, 1, 2], "left")
    assert batch["attention_mask"].sum(-1).tolist() == [22, 49, 14]
    ids = model.generate(**batch, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids[:, batch["input_ids"].shape[1] :].tolist() == wanted


def test_stop_tokens_of_the_shipped_generation_config_are_corrected(tmp_path):
    model = Phi3VForCausalLM(
        Phi3VConfig(**TINY_MODEL | {"vocab_size": 32064, "eos_token_id": 2, "pad_token_id": 32000})
    )
    assert model.generation_config.eos_token_id == [32007, 32000]
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000}')
    assert Phi3VForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [32007, 32000]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_used_parameter_gets_a_gradient(checkpointing):
    model = load().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs, saved = case_inputs("img1_c4_1x2")
    model(**inputs, labels=torch.tensor(saved["labels"])).loss.backward()
    for name, parameter in model.named_parameters():
        unused = "encoder.layers.2." in name or "post_layernorm" in name and "vision" in name
        assert parameter.requires_grad != unused, name
        if not unused:
            assert parameter.grad is not None and (parameter.grad.any() or name.endswith("k_proj.bias")), name


def test_checkpointing_changes_no_gradient():
    inputs, saved = case_inputs("img1_c4_1x2")
    gradients = []
    for checkpointing in (False, True):
        model = load().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=torch.tensor(saved["labels"])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_supervised_tokens_is_harmless():
    model = load().train()
    inputs, saved = case_inputs("text_only")
    loss = model(**inputs, labels=torch.full_like(torch.tensor(saved["labels"]), -100)).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "no images were given"),
        ({"image_sizes": None}, "need image_sizes"),
        ({"tiles": torch.zeros(1, 56, 56, 3, dtype=torch.uint8)}, "only one of them"),
        ({"pixel_values": None, "tiles": torch.zeros(1, 56, 56, 3, dtype=torch.uint8)}, "tiles need packing"),
        ({"image_sizes": torch.tensor([[56, 56]])}, "input_ids hold 17 image tokens"),
        ({"pixel_values": torch.zeros(2, 3, 56, 56)}, "the images have 2 crops"),
        ({"pixel_values": torch.zeros(2, 3, 3, 56, 56)}, "2 images in pixel_values, but 1 in image_sizes"),
    ],
)
def test_images_that_do_not_match(change, message):
    model = Phi3VForCausalLM(Phi3VConfig(**TINY_MODEL))
    with pytest.raises(ValueError, match=message):
        model(**batch_of([0], "left") | change)
