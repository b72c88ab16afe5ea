"""How answers are generated: greedily, up to the tokens that end an answer, whatever a model's folder asks for."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..console import say
from ..files import read_json
from .adapters import inner_model
from .processing_phi3v import Phi3VProcessor

# In every generation_config.json. These tokens come from the tokenizer.
NEUTRAL = {"_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}


def unused_settings(folder: Path) -> dict:
    """What a folder's generation_config.json asks for beside its special tokens and transformers' defaults."""
    path = folder / "generation_config.json"
    content = read_json(path) if path.exists() else {}
    defaults = GenerationConfig._get_default_generation_params() | {"use_cache": True}
    off = (None, False)
    return {
        name: value
        for name, value in content.items()
        if name not in NEUTRAL and value not in off and value != defaults.get(name)
    }


def name_unused_settings(folder: Path):
    """Says on rank 0 what of a folder's generation_config.json is not used, if there is anything."""
    if unused := unused_settings(folder):
        asked = ", ".join(f"{name:.80} {value!r:.80}" for name, value in list(unused.items())[:10])
        more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
        say(
            f"{folder / 'generation_config.json'} asks for {asked}{more}: not used, because answers are greedy and as "
            "long as --max_new_tokens says",
            to_stderr=True,
        )


def use_own_settings(model: torch.nn.Module, processor: Phi3VProcessor):
    """Gives a model, which may be a PeftModel, the special tokens of the tokenizer, and no other settings of
    generation.

    The rule for every model that is evaluated or saved: an answer ends at <|end|> or <|endoftext|>, and config.json and
    generation_config.json both say so. The Hub's files name </s> instead, which the model never writes.
    """
    inner, tokenizer = inner_model(model), processor.tokenizer
    tokens = {"eos_token_id": processor.stop_ids, "pad_token_id": tokenizer.pad_token_id}
    if tokenizer.bos_token_id is not None:
        tokens["bos_token_id"] = tokenizer.bos_token_id
    inner.generation_config = GenerationConfig(**tokens)
    for name, value in tokens.items():
        setattr(inner.config, name, value)
