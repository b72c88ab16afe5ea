"""Loads a saved model or adapter, in 4 bits or not, and refuses a model that lacks weights."""

from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from ..errors import InputError
from ..files import read_json
from .adapters import load_adapter
from .modeling_phi3v import Phi3VForCausalLM


def not_quantized(quantize_vision: bool) -> list[str]:
    """Name patterns of the modules that QLoRA leaves in half precision: the output layer and, without
    `quantize_vision`, the tower and the projector, which lose accuracy in 4 bits."""
    return ["lm_head"] + ([] if quantize_vision else [".*vision_embed_tokens"])


def nf4_config(compute_dtype: torch.dtype, quantize_vision: bool = False) -> BitsAndBytesConfig:
    """The quantisation of QLoRA's base: weights in NF4 with quantised scales (Dettmers et al., 2023, arXiv 2305.14314).

    compute_dtype: in which matrix products are computed; quantize_vision: as in `not_quantized`.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=not_quantized(quantize_vision),
    )


def check_complete(loading_info: dict, name: str):
    """Raises InputError if weights were missing, because `from_pretrained` gives these random values.

    loading_info: what `from_pretrained(…, output_loading_info=True)` returns beside the model.
    name: the model's name in the message.
    """
    if missing := sorted(loading_info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{name} lacks the weights {', '.join(missing[:3])}{more}: is it a whole Phi-3.5-vision?")


def base_and_adapter(name: str) -> tuple[str, Path | None]:
    """(base model, folder of the adapter) if `name` is a folder with an adapter; (name, None) for anything else.

    Raises InputError if the adapter does not name its base.
    """
    config = Path(name) / "adapter_config.json"
    if not config.is_file():
        return name, None
    try:
        base = read_json(config)["base_model_name_or_path"]
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
):
    """Loads what a run has saved: a Phi3VForCausalLM, or a PeftModel that wraps the base of a saved adapter.

    name: a folder, or a repository on the Hub.
    device: where the weights are loaded to. `quantization` needs it.
    Raises InputError if weights are missing, and whatever `from_pretrained` raises.
    """
    source, adapter = base_and_adapter(name)
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
