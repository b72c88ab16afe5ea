"""Loading a model that may be an adapter on a base, in 4 bits or not, and refusing one that lacks weights."""

import json
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from ..errors import InputError
from .adapters import load_adapter
from .modeling_phi3v import Phi3VForCausalLM


def not_quantized(quantize_vision: bool) -> list[str]:
    """Patterns of the names of the modules that QLoRA leaves in half precision: the output layer, and unless
    `quantize_vision` the tower and the projector, which lose accuracy in 4 bits."""
    return ["lm_head"] + ([] if quantize_vision else [".*vision_embed_tokens"])


def nf4_config(compute_dtype: torch.dtype, quantize_vision: bool = False) -> BitsAndBytesConfig:
    """QLoRA's base: weights in NF4, whose scales are quantised too (Dettmers et al., 2023, arXiv 2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=not_quantized(quantize_vision),
    )


def check_complete(loading_info: dict, name: str):
    """Raises InputError if weights were missing, which `from_pretrained` would leave at random values.

    loading_info: what `from_pretrained(…, output_loading_info=True)` returns beside the model.
    """
    if missing := sorted(loading_info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{name} lacks the weights {', '.join(missing[:3])}{more}: is it a whole Phi-3.5-vision?")


def base_and_adapter(name: str) -> tuple[str, Path | None]:
    """(the base model, the adapter's folder) for a folder that holds an adapter; (name, None) for anything else.

    Raises InputError if the adapter does not name its base.
    """
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return name, None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise InputError(f"{config} does not name a base_model_name_or_path")
    return base, Path(name)


def load_saved(
    name: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | str | None = None,
    base: str | None = None,
):
    """A model as a run has saved it: a Phi3VForCausalLM, or a PeftModel with the saved adapter around its base.

    name: a folder or a repository on the Hub; base: an adapter's base, if not the one that the adapter names;
    device: where the weights are loaded to, which `quantization` needs.
    Raises InputError if weights are missing, and what `from_pretrained` raises.
    """
    named_base, adapter = base_and_adapter(name)
    source = base or named_base
    model, loading_info = Phi3VForCausalLM.from_pretrained(
        source,
        use_safetensors=True,  # never unpickles
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization,
        device_map=None if device is None else {"": device},
    )
    check_complete(loading_info, source)
    return load_adapter(model, adapter) if adapter else model
