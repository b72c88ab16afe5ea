"""Merges a saved adapter into its base model tensor by tensor: neither model is ever in memory as a whole.

PEFT itself merges. It is given one layer after the other, with the base's weight of that layer and the adapter's.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import bitsandbytes as bnb
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight, replace_with_bnb_linear

from ..errors import InputError
from ..files import let_others_read, replacing, write_json
from ..hub import INDEX
from . import weights
from .configuration_phi3v import Phi3VConfig
from .loading import Saved, outline_of
from .lora_config import PREFIX, WEIGHTS, config_of_layer, lora_config
from .modeling_phi3v import Phi3VForCausalLM
from .vision_parts import files_beside, parts_beside
from .weights import OF_QUANTIZED, weight_files

FORMAT = {"format": "pt"}  # what transformers says in files of weights


def _open(files: Iterable[Path]) -> dict:
    """For the name of each tensor in safetensors files, the opened file that holds it. Files are memory-mapped."""
    opened = [safe_open(path, "pt") for path in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict


def save_model(outline: Phi3VForCausalLM, weight_of: Callable[[str], torch.Tensor], folder: Path, doing: str):
    """Saves a model as `Phi3VForCausalLM.save_pretrained` would, with the weights of one shard at a time in memory.

    outline: the model on the meta device, in the dtype that is saved. weight_of: computes a weight, given its name.
    doing: what the progress bar says. Raises InputError if the disk has no room for the model.
    """
    outlines, dtype = outline.state_dict(), outline.dtype
    size, free = sum(tensor.nbytes for tensor in outlines.values()), shutil.disk_usage(folder).free
    if size > free:
        raise InputError(f"{folder.parent} has {free / 2**30:.1f} GiB of room, the model needs {size / 2**30:.1f}")
    outline.config.dtype, outline.config.architectures = dtype, [type(outline).__name__]
    outline.config.save_pretrained(folder)
    outline.generation_config.save_pretrained(folder)
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=weights.SHARD_SIZE)
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), 1):
        bar = tqdm(names, desc=f"{doing} shard {number} of {len(split.filename_to_tensors)}", unit="tensor")
        with replacing(folder / file) as partial:
            save_file({name: weight_of(name).to(dtype).contiguous() for name in bar}, partial, FORMAT)
    if split.is_sharded:
        metadata = {"total_parameters": outline.num_parameters()} | split.metadata
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename}, sort_keys=True)
    let_others_read(folder)


class MergedWeights:
    """The weights of a base model after an adapter is merged into them; each is computed when it is asked for.

    outline: the merged model on the meta device, where it takes no memory.
    """

    def __init__(
        self,
        saved: Saved,
        dtype: torch.dtype = torch.float32,
        quantization: BitsAndBytesConfig | None = None,
        device: torch.device | str = "cpu",
    ):
        """Opens the files, which stay memory-mapped, and looks at the adapter.

        saved: an adapter and its base, as `find_saved` returns them.
        dtype: to which the base's weights are rounded first. All of them are merged in fp32.
        quantization: rounds the base's linear layers to 4 bits, as loading with it would do, on `device`.
        Raises InputError for an adapter that can't be loaded exactly, or that holds NaN or infinity.
        """
        self.dtype, self.device, self.adapter = dtype, device, saved.adapter
        config = Phi3VConfig.from_pretrained(saved.base_folder)
        config.vision_config.dtype = dtype  # as `from_pretrained` would set it, and `save` writes it
        self.outline = outline_of(config)
        self.config = lora_config(saved.adapter, self.outline)
        self.rounded = {}  # the linear layers that are rounded to 4 bits, by name, on the meta device
        if quantization and not getattr(config, "quantization_config", None):  # otherwise it is rounded already
            in_4_bits = replace_with_bnb_linear(outline_of(config), quantization.llm_int8_skip_modules, quantization)
            self.rounded = {n: m for n, m in in_4_bits.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        self.base = _open(weight_files(saved.base_folder))
        self.of_adapter = _open([saved.adapter / WEIGHTS])
        parts_beside(self.outline, saved.adapter)  # checks them
        self.trained_fully = _open(files_beside(saved.adapter))
        self.beside = {}  # what bitsandbytes has saved beside a weight in 4 or 8 bits, by the layer's name
        for name in self.base:
            if match := OF_QUANTIZED.fullmatch(name):
                self.beside.setdefault(match[1], []).append(name)
        for file in (self.of_adapter, self.trained_fully):
            for name in file:
                if ("lora_" in name or file is self.trained_fully) and not file[name].get_tensor(name).isfinite().all():
                    raise InputError(f"{saved.adapter}: the adapter's weights {name} hold NaN or infinity")

    def __getitem__(self, name: str) -> torch.Tensor:
        """A weight of the merged model, which may be a view of the base's file. Raises InputError if its layer can't
        be merged."""
        module, _, kind = name.rpartition(".")
        if module in self.config.target_modules and (kind == "weight" or self.config.lora_bias):
            return self._merge(module).get_parameter(kind).detach()
        return self._unmerged(name)

    def _unmerged(self, name: str) -> torch.Tensor:
        """A weight before merging. An adapter may hold some of the base's weights itself."""
        module, _, kind = name.rpartition(".")
        for key in (f"{PREFIX}{name}", f"{PREFIX}{module}.base_layer.{kind}"):
            if key in self.of_adapter:
                return self.of_adapter[key].get_tensor(key)
        if name in self.trained_fully:
            return self.trained_fully[name].get_tensor(name)
        tensor = self.base[name].get_tensor(name)
        if kind == "weight" and module in self.beside:
            tensor = self._dequantize(module, tensor)
        tensor = tensor.to(self.dtype)
        if kind == "weight" and module in self.rounded:
            options = self.rounded[module].weight.__dict__
            in_4_bits = bnb.nn.Params4bit(tensor.to(self.device), requires_grad=False, **options).to(self.device)
            tensor = dequantize_bnb_weight(in_4_bits).to(self.dtype).cpu()
        return tensor

    def _dequantize(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of a layer that the base's file holds in 4 or 8 bits."""
        beside = {key.removeprefix(f"{module}."): self.base[key].get_tensor(key) for key in self.beside[module]}
        if "SCB" in beside:
            return bnb.functional.int8_vectorwise_dequant(weight, beside["SCB"])
        return dequantize_bnb_weight(bnb.nn.Params4bit.from_prequantized(weight, beside, device="cpu"))

    @torch.no_grad()
    def _merge(self, name: str) -> nn.Linear:
        """A linear layer in fp32 with its adapter merged into it by PEFT."""
        shape = self.outline.get_submodule(name)
        with torch.device("meta"):
            layer = nn.Linear(shape.in_features, shape.out_features, shape.bias is not None)
        # Copies, because PEFT changes the weights in place, and these may be views of the base's file.
        weights = {k: self._unmerged(f"{name}.{k}").to(torch.float32, copy=True) for k in layer.state_dict()}
        layer.load_state_dict(weights, assign=True)
        adapted = get_peft_model(nn.ModuleDict({"layer": layer}), config_of_layer(self.config, name, "layer"))
        start = f"{PREFIX}{name}."
        keys = [key for key in self.of_adapter if key.startswith(f"{start}lora_")]
        own = {f"{PREFIX}layer.{key.removeprefix(start)}": self.of_adapter[key].get_tensor(key) for key in keys}
        set_peft_model_state_dict(adapted, own)
        try:
            return adapted.merge_and_unload()["layer"]
        except RuntimeError as e:
            if "lora_bias" not in str(e):
                raise
            raise InputError(
                f"{self.adapter} can't be merged: it has lora_bias for layers whose base has no bias"
            ) from None

    def save(self, folder: Path, dtype: torch.dtype):
        """Saves the merged model. Raises InputError if the disk has no room for it, or if a layer can't be merged."""
        config = self.outline.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        save_model(self.outline.to(dtype), lambda name: self[name].to(torch.float32), folder, "merging")
