"""Examples that are packed into one row give the same loss and gradients as each example alone."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from helpers import CHECKPOINT
from PIL import Image
from transformers import BitsAndBytesConfig

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.collate import Collator, PackingCollator
from phi3v.data.conversations import ConversationDataset
from phi3v.model.adapters import add_adapter
from phi3v.model.packing import Group

ORIGINAL = 300  # tokens from which the long rotary factors are taken


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)


def picture(width, height, seed):
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture(scope="module")
def data(processor, tmp_path_factory):
    """Three questions about one image, one without images, two about a pair of images, two turns, a long one."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in {"a": (200, 90), "b": (60, 60), "c": (80, 160), "d": (150, 150)}.items():
        picture(*size, seed=ord(name)).save(folder / f"{name}.png")

    def turn(images, user, assistant):
        return {"images": [str(folder / f"{name}.png") for name in images], "user": user, "assistant": assistant}

    conversations = [
        [turn("a", "Which one?", "True")],
        [turn("a", "Which one? Say it. " * 3, "no")],
        [turn("a", "And that?", "yes yes no")],
        [turn("", "Is it?", "yes")],
        [turn("bc", "Alike?", "no")],
        [turn("bc", "Really alike?", "yes no")],
        [turn("d", "First?", "True"), turn("", "Second?", "no no")],
        [turn("b", "Long " * 320, "yes")],
        [turn("b", "Short?", "no")],
    ]
    return ConversationDataset([{"id": i, "conversations": turns} for i, turns in enumerate(conversations)], processor)


def build(mode, implementation, checkpointing):
    config = Phi3VConfig.from_pretrained(CHECKPOINT)
    half = config.hidden_size // config.num_attention_heads // 2
    config.original_max_position_embeddings = ORIGINAL
    config.max_position_embeddings = 4096
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / half for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)],
        "original_max_position_embeddings": ORIGINAL,
    }
    quantization = None
    if mode == "qlora":
        skipped = ["lm_head", ".*vision_embed_tokens"]
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    model = Phi3VForCausalLM.from_pretrained(
        CHECKPOINT,
        config=config,
        dtype=torch.float32,
        attn_implementation=implementation,
        quantization_config=quantization,
    )
    if mode == "frozen":
        model.model.vision_embed_tokens.requires_grad_(False)
    if "lora" in mode:
        from peft import LoraConfig

        torch.manual_seed(0)
        model = add_adapter(model, LoraConfig(r=4, target_modules=r".*(_proj|fc1|fc2|lm_head|img_projection\.[02])"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def gradients(model, batches, n):
    """Loss and gradients of all batches together, the mean over n targets."""
    model.zero_grad()
    total = 0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, data, indices):
    batches = [Collator(data.processor, "right")([data[i]]) for i in indices]
    n = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches)
    return gradients(model, batches, n), n


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, grad in expected[1].items():
        if not name.endswith("k_proj.bias"):  # whose exact gradient is zero
            assert (found[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["full", "frozen", "lora", "qlora"])
@pytest.mark.parametrize("share_images", [True, False])
def test_a_packed_row_is_its_examples(share_images, mode, implementation, checkpointing, data):
    model = build(mode, implementation, checkpointing)
    indices = list(range(len(data)))
    batch = PackingCollator(data.processor, ORIGINAL, share_images)(data.__getitems__(indices))
    groups = batch["packing"].groups
    assert [len(group.branches) for group in groups] == ([3, 0, 2, 0, 0, 0] if share_images else [0] * 9)
    assert [group.is_long for group in groups][-2:] == [True, False]  # the same image, but other rotary factors
    assert len(batch["image_sizes"]) == 5  # each encoded once
    assert "tiles" in batch and "pixel_values" not in batch
    expected, n = alone(model, data, indices)
    assert len(batch["labels"]) == n
    assert_equal(gradients(model, [batch], n), expected)


def test_one_example_beyond_4096_tokens(data, monkeypatch):
    """4096 is the length at which Phi-3.5-vision changes its rotary factors."""
    monkeypatch.setattr(sys.modules[__name__], "ORIGINAL", 4096)
    model = build("full", "sdpa", False)
    conversations = [
        *data.conversations[:3],
        {"id": 9, "conversations": [dict(data.conversations[0]["conversations"][0])]},
    ]
    conversations[-1]["conversations"][0]["user"] = "Long " * 4100
    longer = ConversationDataset(conversations, data.processor)
    batch = PackingCollator(data.processor, ORIGINAL, True)(longer.__getitems__([0, 1, 3, 2]))
    assert [(group.size > 4096, group.is_long) for group in batch["packing"].groups] == [
        (False, False),
        (True, True),
        (False, False),
    ]
    expected, n = alone(model, longer, [0, 1, 3, 2])
    assert_equal(gradients(model, [batch], n), expected)


def test_a_leak_between_examples_is_noticed(data):
    """Packs two examples as if they were one: their positions are right, but one attends to the other."""
    model = build("full", "sdpa", False)
    batch = PackingCollator(data.processor, ORIGINAL, False)(data.__getitems__([3, 0]))
    first, second = batch["packing"].groups
    size = first.size + second.size
    joined = Group(size, tail=size)
    rows = batch["packing"].label_rows
    kept = batch["packing"].kept_rows
    batch["packing"] = replace(
        batch["packing"], groups=(joined,), kept_rows=torch.arange(size), label_rows=kept[rows], _on_device={}
    )
    expected, n = alone(model, data, [3, 0])
    found = gradients(model, [batch], n)
    assert abs(found[0] - expected[0]) > 1e-3
    with pytest.raises(AssertionError):
        assert_equal(found, expected)


def test_an_example_without_targets_trains_nothing(data):
    model = build("full", "sdpa", False)
    collate = PackingCollator(data.processor, ORIGINAL, True)
    with_dummy = collate(data.__getitems__([0, ~3]))
    assert torch.equal(with_dummy["labels"], collate(data.__getitems__([0]))["labels"])
    expected, n = alone(model, data, [0])
    assert_equal(gradients(model, [with_dummy], n), expected)
    loss, grads = gradients(model, [collate(data.__getitems__([~3]))], n)
    assert loss == 0 and not any(grad.any() for grad in grads.values())


def test_the_loss_goes_through_its_chunks(monkeypatch, data):
    model = build("full", "sdpa", False)
    expected, n = alone(model, data, [0, 2, 6])
    monkeypatch.setattr("phi3v.model.functional.LOSS_CHUNK", 3)
    batch = PackingCollator(data.processor, ORIGINAL, True)(data.__getitems__([0, 2, 6]))
    assert_equal(gradients(model, [batch], n), expected)


def test_pinning_keeps_everything(data):
    batch = PackingCollator(data.processor, ORIGINAL, True)(data.__getitems__([0, 1]))
    packing = copy.copy(batch["packing"])
    assert hasattr(packing, "pin_memory") and packing.groups[0].branches
