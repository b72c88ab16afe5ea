"""Models with random weights and examples of its own, for the stages of gpu_report.py."""

import contextlib
import sys
from collections.abc import Iterator

import torch
from report_parts import Setting

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor
from phi3v.model.image_processing_phi3v import num_image_tokens
from phi3v.model.packing import IGNORE_INDEX, pack

# A decoder with heads of 96 numbers, as the real one has, and with two stages of rotary factors.
TINY = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,  # of a width of 192, so that scores of attention are as large as the real model's
}
TINY_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
# The published factors are not in this repository. These differ from each other and between short and long as those do.
ROPE = {"type": "su", "short_factor": [1 + i / 100 for i in range(48)], "long_factor": [1 + i for i in range(48)]}
MODES = {  # flags of the scripts
    "full": {},
    "frozen": {"freeze_vision_model": True},
    "lora": {"use_lora": True},
    "qlora": {"use_lora": True, "use_qlora": True},
}


def make_config(setting: Setting, layers: int | None = None, **fields) -> Phi3VConfig:
    """The real model's configuration, or a small one with --tiny.

    layers: of the decoder, and one more of the tower, whose last layer is not used; default: all of them.
    """
    own = {"rope_scaling": ROPE, "original_max_position_embeddings": 4096}
    vision = dict(TINY_VISION) if setting.tiny else {}
    own |= TINY if setting.tiny else {"pad_token_id": 32000}
    if layers is not None:
        own["num_hidden_layers"], vision["num_hidden_layers"] = layers, layers + 1
    base = Phi3VConfig().vision_config.to_dict()
    return Phi3VConfig(**own | fields, vision_config=base | vision)


def make_model(
    setting: Setting, config: Phi3VConfig, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0
) -> Phi3VForCausalLM:
    """A model with random weights on the device, in training mode."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(setting.device):
            model = Phi3VForCausalLM._from_config(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)
    return model.to(setting.device, dtype).train()


def choose_trained(model: Phi3VForCausalLM, **flags):
    """What the scripts' flags make of the model: parts frozen, or adapters added."""
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints lines when it is imported
        import finetune_hf_trainer_docvqa as script
    return script.choose_trained(model, script.RecipeArguments(**flags))


def quantize(model: Phi3VForCausalLM, compute_dtype: torch.dtype) -> Phi3VForCausalLM:
    """The model with the decoder's layers in 4 bits, as `from_pretrained` with `nf4_config` loads it."""
    import bitsandbytes as bnb

    from phi3v.model.loading import nf4_config

    wanted = nf4_config(compute_dtype)
    device = next(model.parameters()).device
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            options = {
                "quant_type": wanted.bnb_4bit_quant_type,
                "compress_statistics": wanted.bnb_4bit_use_double_quant,
            }
            layer = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=compute_dtype, **options)
            layer.in_features, layer.out_features, layer.bias = module.in_features, module.out_features, module.bias
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, **options)
            layer.weight.module = layer
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, layer.to(device))
    model.is_loaded_in_4bit = model.is_quantized = True
    return model.requires_grad_(False)


def image_processor(setting: Setting, num_crops: int = 16) -> Phi3VImageProcessor:
    return Phi3VImageProcessor(num_crops=num_crops, image_size=56) if setting.tiny else Phi3VImageProcessor(num_crops)


def use_attention(model, kind: str):
    """The model, with attention of this kind from now on, in the tower too."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = kind
            if hasattr(module.config, "vision_config"):
                module.config.vision_config._attn_implementation = kind
    return model


# ---- Examples


def make_example(
    setting: Setting, random: torch.Generator, grids=(), text=40, supervised=13, key=None, tiles=None
) -> dict:
    """An example as `ConversationDataset` encodes it, with random words after random images.

    grids: (down, across) sub-crops of each image; supervised: how many of the `text` tokens at the end are the answer;
    key: equal for examples of the same images; tiles: of such an example, in place of new ones.
    """
    processor = image_processor(setting)
    g, side = processor.crop_tokens_per_side, processor.image_size
    images = [torch.full((num_image_tokens(h, w, g),), -1 - k) for k, (h, w) in enumerate(grids)]
    words = 399 if setting.tiny else 32000
    ids = torch.cat([*images, torch.randint(3, words, (text,), generator=random)])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
    if tiles is None:
        shape = (sum(h * w for h, w in grids), side, side, 3)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    return {"input_ids": ids, "labels": labels, "tiles": tiles, "grids": list(grids), "images_key": key}


def about_one_image(setting: Setting, random: torch.Generator, grids, key, *lengths) -> list[dict]:
    """Examples with the same images. lengths: of each, how many words it has, and how many of them are supervised."""
    first = make_example(setting, random, grids, *lengths[0], key)
    return [first, *(make_example(setting, random, grids, *own, key, first["tiles"]) for own in lengths[1:])]


def packed(setting: Setting, examples: list[dict], share_images: bool = True, original_length: int = 4096) -> dict:
    """The micro-batch of these examples in one row, as training makes it, on the device."""
    processor = image_processor(setting)
    statistics = tuple(processor.image_mean), tuple(processor.image_std)
    batch = pack(examples, original_length, share_images, *statistics)
    sizes = torch.tensor(batch["packing"].grids, dtype=torch.long).view(-1, 2) * processor.image_size
    if not len(sizes):
        batch["tiles"] = batch["image_index"] = None
        return on_device(setting, batch)
    return on_device(setting, batch | {"image_sizes": sizes})


def padded(setting: Setting, examples: list[dict], side: str = "right") -> dict:
    """The same examples with padding and normalised crops, as most code makes them, on the device."""
    processor = image_processor(setting)
    length = max(len(example["input_ids"]) for example in examples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        own = example | {"attention_mask": torch.ones_like(example["input_ids"])}
        missing = length - len(own["input_ids"])
        pad = (missing, 0) if side == "left" else (0, missing)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE_INDEX)):
            batch[name].append(torch.nn.functional.pad(own[name], pad, value=fill))
    batch = {name: torch.stack(rows) for name, rows in batch.items()}
    if grids := [grid for example in examples for grid in example["grids"]]:
        tiles = torch.cat([example["tiles"] for example in examples])
        batch["pixel_values"] = processor.crops_of_tiles(tiles, grids)
        batch["image_sizes"] = torch.tensor(grids) * processor.image_size
    return on_device(setting, batch)


def on_device(setting: Setting, batch: dict) -> dict:
    return {k: v.to(setting.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# ---- Comparing


def loss_and_gradients(model, batch: dict, targets: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, divided by the number of supervised tokens, and every parameter's gradient."""
    model.zero_grad(set_to_none=True)  # gradients that were returned earlier stay as they are
    loss = model(**batch, num_items_in_batch=targets).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def has_exact_zero_gradient(name: str) -> bool:
    """The tower's key biases: they move all scores of a query alike, so what remains is rounding."""
    return "k_proj" in name and name.endswith("bias")


def gradient_errors(found: dict, expected: dict) -> dict[str, float]:
    """For each parameter, the norm of the difference as a share of the expected norm; infinite if one is missing."""
    errors = {}
    for name in found.keys() | expected.keys():
        if has_exact_zero_gradient(name):
            continue
        if name not in found or name not in expected:
            errors[name] = float("inf")
            continue
        a, b = found[name].float(), expected[name].float()
        errors[name] = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    return errors


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of fp32 are computed in fp32 within, and not in TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
