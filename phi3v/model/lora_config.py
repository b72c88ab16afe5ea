"""What a saved adapter's config and weights say, checked before PEFT sees them.

An adapter is loaded only if that gives exactly the model that was trained: LoRA on linear layers, as the scripts and
the official recipe write it with current and older versions of PEFT. Everything else is an error.
"""

import re
import time
from dataclasses import replace
from pathlib import Path

import regex
from peft import LoraConfig
from torch import nn

from ..errors import InputError
from ..files import read_json
from .limits import OBJECT, SWITCH, TEXT, Rule, check, either, is_number, is_whole, list_of, number, one_of, or_null
from .weights import Shape, check_shapes, shapes_in

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of an adapter's weights
SECONDS = 2  # to compare the names of a model's modules with the patterns of an adapter

MOST = 2_000  # names or patterns
PATTERN = Rule(lambda v: isinstance(v, str) and len(v) <= 20_000, "a text of at most 20,000 characters")
NAMES = list_of(TEXT, MOST)
INDEX = Rule(lambda v: is_whole(v) and 0 <= v, "a whole number")


def by_name(fits, must_be: str) -> Rule:
    return Rule(
        lambda v: OBJECT.fits(v) and len(v) <= MOST and all(map(PATTERN.fits, v)) and all(map(fits, v.values())),
        f"an object with at most {MOST:,} {must_be}, by modules' names",
    )


ALPHA = number(0, 1e9, above=True)
RULES = {
    "peft_type": one_of("LORA"),
    "task_type": one_of(None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),  # without weights of their own
    "base_model_name_or_path": TEXT,
    "revision": or_null(TEXT),
    "r": Rule(lambda v: is_whole(v) and v > 0, "a whole number above 0"),
    "lora_alpha": ALPHA,
    "lora_dropout": number(0, 1),
    "target_modules": either(PATTERN, NAMES),
    "exclude_modules": or_null(either(PATTERN, NAMES)),
    "layers_to_transform": or_null(either(INDEX, list_of(INDEX, MOST))),
    "layers_pattern": or_null(either(one_of("layers", ""), list_of(one_of("layers"), 1))),
    "modules_to_save": or_null(NAMES),
    "rank_pattern": or_null(by_name(lambda v: is_whole(v) and v > 0, "ranks")),
    "alpha_pattern": or_null(by_name(lambda v: is_number(v) and v > 0, "numbers above 0")),
    "use_rslora": SWITCH,
    "use_dora": SWITCH,
    "lora_bias": SWITCH,
    "bias": one_of("none"),
    # The first weights of the adapter, which loading replaces. Other ways of making them change the base model too.
    "init_lora_weights": either(SWITCH, one_of("gaussian", "orthogonal", "eva")),
}
# These say how the adapter was made or served, and nothing about its weights.
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "fan_in_fan_out", "megatron_core"}
WITHOUT_EFFECT |= {"qalora_group_size", "runtime_config", "eva_config"}
HELP = {
    "peft_type": "only LoRA adapters are read",
    "init_lora_weights": "such an adapter needs a changed base: convert it to plain LoRA with PEFT's save_pretrained("
    "path_initial_model_for_weight_conversion=…)",
}


def read_adapter_config(folder: Path) -> dict:
    """The content of adapter_config.json. Raises InputError for whatever can't be loaded exactly."""
    path = folder / "adapter_config.json"
    content = read_json(path)
    try:
        check(content, RULES)
    except ValueError as e:
        help = next((f": {text}" for name, text in HELP.items() if str(e).startswith(f"{name} is")), "")
        raise InputError(f"{path}: {e}{help}") from None
    for name, value in content.items():
        # A value that switches something off is as good as none, also in a version of PEFT that is newer than ours.
        if name not in RULES and name not in WITHOUT_EFFECT and value not in (None, False, {}, []):
            raise InputError(f"{path}: {name} is {value!r:.80}, which is not read: only plain LoRA is loaded exactly")
    for name in ("peft_type", "r", "target_modules"):
        if name not in content:
            raise InputError(f"{path} has no {name}: is it an adapter that PEFT has saved?")
    return content


def adapter_shapes(folder: Path) -> dict[str, Shape]:
    """The shapes of an adapter's weights, by their names without PREFIX. Raises InputError if they can't be read."""
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        more = ": adapter_model.bin is a pickle, which is not read: convert it to safetensors" if pickled else ""
        raise InputError(f"{folder} has no {WEIGHTS}{more}")
    shapes = shapes_in([path])
    if others := [name for name in shapes if not name.startswith(PREFIX)]:
        raise InputError(f"{path} holds {others[0]:.200}, but the names of an adapter's weights start with {PREFIX}")
    # Some versions of PEFT wrote DoRA's magnitudes with ".weight", others without.
    return {
        name.removeprefix(PREFIX).replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): shape
        for name, shape in shapes.items()
    }


class Patterns:
    """Compares names of modules with an adapter's patterns: a stranger's regular expression may take for ever."""

    def __init__(self, source: Path):
        self.source, self.end = source, time.monotonic() + SECONDS

    def matches(self, pattern: str, name: str, head: str = "") -> bool:
        try:
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return bool(regex.fullmatch(f"{head}(?:{pattern})", name, timeout=left))
        except TimeoutError:
            raise InputError(f"{self.source}: the pattern {pattern!r:.80} takes longer than {SECONDS} s") from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as e:
            raise InputError(f"{self.source}: {pattern!r:.80} is no regular expression ({e})") from None

    def names(self, wanted: str | list[str] | None, name: str) -> bool:
        """As PEFT does: a text is a pattern for the whole name, a list has names or their last parts."""
        if isinstance(wanted, str):
            return self.matches(wanted, name)
        return any(name == own or name.endswith(f".{own}") for own in wanted or ())

    def value(self, by_pattern: dict | None, name: str, default):
        """The value of the first pattern that matches the end of a name."""
        own = (value for key, value in (by_pattern or {}).items() if self.matches(key, name, r"(?:.*\.)?"))
        return next(own, default)


def modules_to_save(config: dict, path: Path, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the adapter holds whole, by name: as in PEFT, all whose names end like one in the list."""
    wanted = config.get("modules_to_save") or []
    found = {name: module for name, module in model.named_modules() if name.endswith(tuple(wanted))}
    for own in wanted:
        if not own or not any(name.endswith(own) for name in found):
            raise InputError(f"{path}: modules_to_save has {own!r:.80}, which is no module of the model")
    for name in found:
        if nested := [other for other in found if other.startswith(f"{name}.")]:
            raise InputError(f"{path}: modules_to_save has {name}, and with it {nested[0]} a second time")
    return found


def lora_config(folder: Path, model: nn.Module) -> LoraConfig:
    """The config with which PEFT loads a saved adapter exactly.

    model: what the adapter is for, also one on the meta device. Raises InputError if adapter_config.json asks for
    something else, and if the saved weights are not exactly those that it describes.
    """
    folder = Path(folder)
    config, found = read_adapter_config(folder), adapter_shapes(folder)
    path, patterns, layers = folder / "adapter_config.json", Patterns(folder / "adapter_config.json"), {}
    indices = config.get("layers_to_transform")
    indices = [indices] if is_whole(indices) else indices
    if indices and isinstance(config["target_modules"], str):
        raise InputError(f"{path}: layers_to_transform needs target_modules to be a list of names")
    whole_modules = modules_to_save(config, path, model)
    for name, module in model.named_modules():
        if not patterns.names(config["target_modules"], name) or patterns.names(config.get("exclude_modules"), name):
            continue
        if any(f"{name}.".startswith(f"{saved}.") for saved in whole_modules):
            continue
        number_in_name = re.search(r"\.layers\.(\d+)\.", name)
        if indices and not (number_in_name and int(number_in_name[1]) in indices):
            continue
        if not isinstance(module, nn.Linear):
            raise InputError(f"{path}: target_modules match {name}, which is no linear layer")
        layers[name] = module
    if not layers:
        raise InputError(f"{path}: target_modules match no layer of the model")
    ranks, alphas, wanted = {}, {}, {}
    for name, module in layers.items():
        r = ranks[name] = patterns.value(config.get("rank_pattern"), name, config["r"])
        alphas[name] = patterns.value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        wanted |= {f"{name}.lora_A.weight": (r, module.in_features), f"{name}.lora_B.weight": (module.out_features, r)}
        if config.get("lora_bias"):
            wanted[f"{name}.lora_B.bias"] = (module.out_features,)
        if config.get("use_dora"):
            wanted[f"{name}.lora_magnitude_vector"] = (module.out_features,)
    # PEFT may save the base's embedding and output layer too, as in the official recipe.
    for name in {"lm_head", "model.embed_tokens"} - whole_modules.keys():
        key = f"{name}.base_layer.weight" if name in layers else f"{name}.weight"
        if key in found:
            wanted[key] = tuple(model.get_parameter(f"{name}.weight").shape)
    for name, module in whole_modules.items():
        wanted |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    check_shapes(found, wanted, f"{folder / WEIGHTS}", ": its weights are not those that adapter_config.json describes")
    rank, alpha = config["r"], config.get("lora_alpha", 8)
    return LoraConfig(
        task_type="CAUSAL_LM" if config.get("task_type") == "CAUSAL_LM" else None,
        base_model_name_or_path=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=list(layers),
        rank_pattern={_pattern_of(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={_pattern_of(name): own for name, own in alphas.items() if own != alpha},
        modules_to_save=list(whole_modules) or None,
        use_rslora=config.get("use_rslora", False),
        use_dora=config.get("use_dora", False),
        lora_bias=config.get("lora_bias", False),
    )


def config_of_layer(config: LoraConfig, name: str, new_name: str) -> LoraConfig:
    """The config of one of the layers of an adapter, in a model that has this layer alone, as `new_name`.

    config: as `lora_config` returns it.
    """
    return replace(
        config,
        r=config.rank_pattern.get(_pattern_of(name), config.r),
        lora_alpha=config.alpha_pattern.get(_pattern_of(name), config.lora_alpha),
        target_modules=[new_name],
        rank_pattern={},
        alpha_pattern={},
        modules_to_save=None,
        task_type=None,
        base_model_name_or_path=None,
        init_lora_weights=False,
    )


def _pattern_of(name: str) -> str:
    """What PEFT compares with the names of layers, and fits this layer alone."""
    return f"^{re.escape(name)}"
