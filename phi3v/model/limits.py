"""Which values the settings of a saved model may have. They come from other people's files, and a wrong one would end
in an allocation of terabytes, in a loop without an end, or in an error somewhere in a library.

The limits are generous: far beyond what any published model has.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import CLIPVisionConfig


@dataclass(frozen=True)
class Rule:
    """What a value must be: `fits` says whether it is, and `must_be` completes "hidden_size is 'abc', must be …"."""

    fits: Callable[[object], bool]
    must_be: str


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return is_whole(value) or isinstance(value, float) and math.isfinite(value)


def whole(least: int, most: int) -> Rule:
    return Rule(lambda v: is_whole(v) and least <= v <= most, f"a whole number from {least:,} to {most:,}")


def number(least: float, most: float, above: bool = False) -> Rule:
    """above: `least` itself is not allowed."""

    def fits(v):
        return is_number(v) and (least < v if above else least <= v) and v <= most

    return Rule(fits, f"a number above {least:g} and at most {most:g}" if above else f"a number, {least:g} to {most:g}")


def one_of(*values) -> Rule:
    def fits(v):  # in Python 1 == True, in a JSON file the two differ
        return any(type(v) is type(allowed) and v == allowed for allowed in values)

    return Rule(fits, " or ".join(map(json.dumps, values)))


def list_of(rule: Rule, most: int, least: int = 0) -> Rule:
    def fits(v):
        return isinstance(v, (list, tuple)) and least <= len(v) <= most and all(map(rule.fits, v))

    count = f"{least}" if least == most else f"{least} to {most:,}"
    return Rule(fits, f"a list of {count} elements, each {rule.must_be}")


def either(*rules: Rule) -> Rule:
    return Rule(lambda v: any(rule.fits(v) for rule in rules), ", or ".join(rule.must_be for rule in rules))


def or_null(rule: Rule) -> Rule:
    return either(one_of(None), rule)


TEXT = Rule(lambda v: isinstance(v, str), "a text")
SWITCH = Rule(lambda v: isinstance(v, bool), "true or false")
OBJECT = Rule(lambda v: isinstance(v, dict), "an object")
PATTERN = re.compile(r"(\.\*)?[\w.]+")  # a module's name, or how it ends

DTYPES = ("float32", "float16", "bfloat16", "float64")  # names in torch
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")
TOKEN = or_null(whole(0, 2**31))
SHARE = number(0, 1)
DTYPE = Rule(
    lambda v: v is None or str(v).removeprefix("torch.") in DTYPES,  # in Python, torch.bfloat16 itself
    f"null or one of {', '.join(DTYPES)}",
)

SIZES = {
    "hidden_size": whole(1, 2**17),
    "intermediate_size": whole(1, 2**20),
    "num_hidden_layers": whole(1, 1000),
    "num_attention_heads": whole(1, 4096),
    "hidden_act": one_of(*ACTIVATIONS),
    "attention_dropout": SHARE,
    "initializer_range": number(0, 100),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
# What transformers gives every configuration. The model has no use for other values of these.
COMMON = {
    "architectures": or_null(list_of(TEXT, 100)),
    "transformers_version": or_null(TEXT),
    "return_dict": one_of(None, True),
    "output_hidden_states": or_null(SWITCH),
    "output_attentions": or_null(SWITCH),
    "is_encoder_decoder": one_of(None, False),
    "chunk_size_feed_forward": one_of(None, 0),
    "problem_type": one_of(None),
    "num_labels": or_null(whole(0, 1000)),
    "id2label": or_null(Rule(lambda v: OBJECT.fits(v) and all(str(k).isdecimal() for k in v), "an object by numbers")),
    "label2id": or_null(OBJECT),
    "per_layer_config": one_of(None),
    "tie_word_embeddings": one_of(None, False),
}
DECODER = (
    SIZES
    | COMMON
    | {
        "vocab_size": whole(1, 2**22),
        "num_key_value_heads": or_null(whole(1, 4096)),
        "head_dim": or_null(whole(1, 2**17)),
        "max_position_embeddings": whole(1, 2**27),
        "original_max_position_embeddings": whole(2, 2**27),
        "sliding_window": or_null(whole(1, 2**31)),
        "resid_pdrop": SHARE,
        "embd_pdrop": SHARE,
        "rms_norm_eps": number(0, 1),
        "rope_theta": or_null(number(1, 1e12)),
        "partial_rotary_factor": or_null(number(0, 1, above=True)),
        "use_cache": or_null(SWITCH),
        "bos_token_id": TOKEN,
        "pad_token_id": TOKEN,
        "eos_token_id": either(TOKEN, list_of(whole(0, 2**31), 1000, least=1)),
        "rope_scaling": or_null(OBJECT),
        "rope_parameters": or_null(OBJECT),
        "embd_layer": or_null(OBJECT),
        "img_processor": or_null(OBJECT),
        "auto_map": or_null(OBJECT),
        "quantization_config": or_null(OBJECT),
        "model_type": one_of("phi3_v"),
        "transformers_weights": one_of(None),  # it would name another file to read weights from
        "configuration_files": one_of(None),  # likewise for the configuration
    }
)
OF_EVERY_CONFIG = {"model_type", "name_or_path", "vision_config", "_attn_implementation", "_experts_implementation"}
VISION = (
    SIZES
    | COMMON
    | {
        "projection_dim": whole(1, 2**17),
        "num_channels": one_of(3),
        "image_size": whole(1, 8192),
        "patch_size": whole(1, 8192),
        "layer_norm_eps": number(0, 1),
        "initializer_factor": number(0, 100),
    }
)
ROPE_TYPES = (None, "default", "su", "longrope")
FACTORS = list_of(number(0, 1e6, above=True), 2**16)
ROPE = {
    "type": one_of(*ROPE_TYPES),
    "rope_type": one_of(*ROPE_TYPES),
    "short_factor": FACTORS,
    "long_factor": FACTORS,
    "rope_theta": DECODER["rope_theta"],
    "partial_rotary_factor": DECODER["partial_rotary_factor"],
    "original_max_position_embeddings": or_null(DECODER["original_max_position_embeddings"]),
    "factor": or_null(number(0, 1e6, above=True)),
    "attention_factor": one_of(None),  # it follows from the lengths
}
COMPUTE = one_of("float32", "float16", "bfloat16")
QUANTIZATION = {  # what bitsandbytes writes for weights in 4 or 8 bits
    "quant_method": one_of("bitsandbytes"),
    "load_in_4bit": SWITCH,
    "load_in_8bit": SWITCH,
    "_load_in_4bit": SWITCH,
    "_load_in_8bit": SWITCH,
    "bnb_4bit_compute_dtype": COMPUTE,
    "bnb_4bit_quant_storage": one_of("uint8", "float32", "float16", "bfloat16"),
    "bnb_4bit_quant_type": one_of("nf4", "fp4"),
    "bnb_4bit_use_double_quant": SWITCH,
    "llm_int8_enable_fp32_cpu_offload": SWITCH,
    "llm_int8_has_fp16_weight": SWITCH,
    "llm_int8_threshold": number(0, 1e6),
    "llm_int8_skip_modules": or_null(
        list_of(Rule(lambda v: isinstance(v, str) and bool(PATTERN.fullmatch(v)), "the name of a module"), 1000)
    ),
}
COLOURS = list_of(number(-1000, 1000), 3, least=3)
IMAGES = {
    "num_crops": whole(1, 1024),
    "image_mean": COLOURS,
    "image_std": list_of(number(1e-6, 1000), 3, least=3),
    "image_size": VISION["image_size"],
    "patch_size": VISION["patch_size"],
    "do_convert_rgb": SWITCH,
    "exif_rotate": SWITCH,
}
OF_IMAGE_PROCESSORS = {"image_processor_type", "processor_class", "rescale_factor", "default_to_square"}
TOKENIZER = {  # in tokenizer_config.json
    "model_max_length": or_null(number(1, 1e31)),
    "padding_side": or_null(one_of("left", "right")),
    "split_special_tokens": one_of(None, False),
    "fast_tokenizer_files": one_of(None),  # it would name other files than tokenizer.json
}


def check(values: dict, rules: dict[str, Rule], where: str = "", closed: bool = False):
    """Raises ValueError for the first value that breaks its rule.

    where: stands before the names. closed: names without a rule are refused too.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}{values!r:.80} is not an object with settings")
    for name, value in values.items():
        if name in rules and not rules[name].fits(value):
            raise ValueError(f"{where}{name} is {value!r:.80}, must be {rules[name].must_be}")
        if closed and name not in rules:
            raise ValueError(f"{where}{name} is {value!r:.80}, but no setting of this name is known")


def check_config(values: dict, cls: type):
    """Checks the settings from which a Phi3VConfig is to be built.

    cls: Phi3VConfig, for the defaults of settings that are not given. Raises ValueError.
    """
    check(values, DECODER)
    refuse_attributes(values, cls, DECODER.keys() | OF_EVERY_CONFIG)

    def of(name):
        return values[name] if values.get(name) is not None else getattr(cls, name)

    width, heads = of("hidden_size"), of("num_attention_heads")
    kv_heads = values.get("num_key_value_heads") or heads
    if width % heads or heads % kv_heads or values.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"hidden_size {width}, num_attention_heads {heads}, num_key_value_heads {kv_heads} and head_dim "
            f"{values.get('head_dim')} contradict one another"
        )
    for name in ("rope_scaling", "rope_parameters"):
        check(values.get(name) or {}, ROPE, f"{name}: ", closed=True)
    rope = (values.get("rope_parameters") or {}) | (values.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and not {"short_factor", "long_factor"} <= rope.keys():
        raise ValueError(f"rope_scaling of type {kind} needs short_factor and long_factor")
    rotated = int(width // heads * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0))
    if rotated < 2 or rotated % 2:
        raise ValueError(f"hidden_size {width} and num_attention_heads {heads} rotate {rotated} dimensions of a head")
    for name in ("short_factor", "long_factor"):
        if name in rope and len(rope[name]) != rotated // 2:
            raise ValueError(f"rope_scaling: {name} has {len(rope[name])} elements, must have {rotated // 2}")
    if (quantization := values.get("quantization_config")) is not None:
        check({"quant_method": None} | quantization, QUANTIZATION, "quantization_config: ", closed=True)
    vision = {} if values.get("vision_config") is None else values["vision_config"]
    if isinstance(vision, CLIPVisionConfig):
        vision = {name: value for name, value in vars(vision).items() if name in VISION}
    check(vision, VISION, "vision_config: ")
    refuse_attributes(vision, CLIPVisionConfig, VISION.keys() | OF_EVERY_CONFIG, "vision_config: ")
    width, heads = (
        vision.get(name, getattr(CLIPVisionConfig, name)) for name in ("hidden_size", "num_attention_heads")
    )
    if width % heads:
        raise ValueError(f"vision_config: num_attention_heads {heads} do not divide hidden_size {width}")


def refuse_attributes(values: dict, cls: type, allowed: set[str], where: str = ""):
    """Raises ValueError for a setting that would replace a method or another attribute of the class."""
    for name, value in values.items():
        if name not in allowed and hasattr(cls, name):
            raise ValueError(f"{where}{name} is {value!r:.80}, but no setting of this name is known")
