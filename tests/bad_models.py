"""Folders of models and adapters as a stranger may give them, each with what the error says.

name: (function that changes a copy of a good folder, what the message holds besides the folder's name)
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def edit(file: str, **values):
    """Changes values in a JSON file."""

    def change(folder: Path):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return change


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def deep(file: str):
    return text(file, '{"a":' * 100_000 + "1" + "}" * 100_000)


def pipe(file: str):
    def change(folder: Path):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def tensors(change, file="model.safetensors"):
    """Changes the tensors of a file by a function from a dict to a dict."""
    return lambda folder: save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


def pickled(file: str, name: str):
    def change(folder: Path):
        torch.save(load_file(folder / file), folder / name)
        (folder / file).unlink()

    return change


def index(change):
    """Calls the weights those of an index, which is {"metadata": {}, "weight_map": change(the right one)}."""

    def make(folder: Path):
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
        content = change({"metadata": {}, "weight_map": names})
        (folder / INDEX).write_text(json.dumps(content))

    return make


def shard_outside(folder: Path):
    index(lambda c: c | {"weight_map": dict.fromkeys(c["weight_map"], "../secret.safetensors")})(folder)
    (folder / "one.safetensors").rename(folder.parent / "secret.safetensors")


def shard_twice(folder: Path):
    index(lambda c: c | {"weight_map": c["weight_map"] | {"lm_head.weight": "two.safetensors"}})(folder)
    save_file({"lm_head.weight": torch.zeros(512, 128)}, folder / "two.safetensors")


def folder_in_place_of(file: str):
    def change(folder: Path):
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


def link_to_nothing(file: str):
    def change(folder: Path):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to("nowhere")

    return change


def templates(folder: Path):
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "a.jinja")


JSON_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
JSON_FILES += ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", INDEX)
PATTERN = {"type": "Replace", "pattern": {"Regex": "(.*)*(.*)*!$"}, "content": "b"}
TOKEN = {"content": "<|more|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}

FILES = {
    **{f"deep {file}": (deep(file), f"{file} is not readable: its JSON is nested too deeply") for file in JSON_FILES},
    **{f"pipe {file}": (pipe(file), f"{file} is not a regular file") for file in JSON_FILES},
    **{f"list {file}": (text(file, "[]"), f"{file} is not a JSON object") for file in JSON_FILES},
    "half a pair": (edit("processor_config.json", x="\ud800"), "processor_config.json holds a text that is not valid"),
    "folder": (folder_in_place_of("config.json"), "config.json is not a regular file"),
    "link to nothing": (link_to_nothing("tokenizer_config.json"), "tokenizer_config.json is a link to nothing"),
    "link to a device": (
        lambda folder: [(folder / "added_tokens.json").symlink_to("/dev/zero")],
        "added_tokens.json is not a regular file",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "can't be loaded ([Errno 2] No such file"),
    "pipe template": (pipe("chat_template.jinja"), "chat_template.jinja is not a regular file"),
    "pipe templates": (templates, "a.jinja is not a regular file"),
    "pipe tokenizer.model": (pipe("tokenizer.model"), "tokenizer.model is not a regular file"),
    "pipe weights": (pipe("model.safetensors"), "model.safetensors is not a regular file"),
    "pattern": (edit("tokenizer.json", normalizer=PATTERN), "its normalizer has a regular expression"),
    "pattern inside": (
        edit("tokenizer.json", decoder={"type": "Sequence", "decoders": [PATTERN]}),
        "its decoder has a regular expression",
    ),
    "unknown part": (edit("tokenizer.json", pre_tokenizer={"type": "X"}), "has a part of type 'X'"),
    "part without a name": (edit("tokenizer.json", decoder={"type": {}}), "has a part of type {}"),
    "no BPE": (edit("tokenizer.json", model={"type": "Unigram"}), "must be an object of type BPE"),
    "model is a list": (edit("tokenizer.json", model=[]), "must be an object of type BPE"),
    "id too large": (
        edit("tokenizer.json", added_tokens=[TOKEN | {"id": 10**9}]),
        "has a token with the id 1000000000, must be a number below the model's vocab_size 512",
    ),
    "id is text": (edit("tokenizer.json", added_tokens=[TOKEN | {"id": "a"}]), "has a token with the id 'a'"),
    "tokens are a text": (edit("tokenizer.json", added_tokens="abc"), "has a token with the id None"),
    "other file": (
        edit("tokenizer_config.json", fast_tokenizer_files=["a/tokenizer.1.0.json"]),
        "fast_tokenizer_files",
    ),
    "longest text": (edit("tokenizer_config.json", model_max_length="abc"), "model_max_length is 'abc', must be"),
    "special tokens split": (edit("tokenizer_config.json", split_special_tokens=True), "split_special_tokens is True"),
    "padding side": (edit("tokenizer_config.json", padding_side="up"), "padding_side is 'up', must be"),
    "std 0": (edit("preprocessor_config.json", image_std=[0, 0, 0]), "image_std is [0, 0, 0], must be a list of 3"),
    "mean x": (edit("preprocessor_config.json", image_mean=["x"]), "image_mean is ['x'], must be a list of 3"),
    "crops x": (edit("preprocessor_config.json", num_crops="16"), "num_crops is '16', must be a whole number"),
    "half a crop": (edit("preprocessor_config.json", num_crops=2.5), "num_crops is 2.5, must be a whole number"),
    "1e9 crops": (edit("preprocessor_config.json", num_crops=10**9), "num_crops is 1000000000, must be"),
    "crop size": (edit("preprocessor_config.json", image_size=112), "image_size is 112, but the model's is 56"),
    "crop size x": (edit("preprocessor_config.json", image_size="x"), "image_size is 'x', must be"),
}

# Only the processor finds these.
PROCESSORS = {
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a method": (edit("preprocessor_config.json", tiles=3), "tiles is 3, but no setting of this name is known"),
    "no chat tokens": (edit("tokenizer.json", added_tokens=[]), "is not one token of its own"),
    "added token is a number": (edit("tokenizer_config.json", bos_token=5), "its tokenizer can't be read"),
    "merges of unknown tokens": (
        edit("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
        "its tokenizer can't be read",
    ),
}

# Values of config.json.
SETTINGS = [
    ({"hidden_size": "abc"}, "hidden_size is 'abc', must be a whole number from 1 to 131,072"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 130}, "hidden_size 130, num_attention_heads 4, num_key_value_heads 4"),
    ({"vocab_size": 10**13}, "vocab_size is 10000000000000"),
    ({"vocab_size": 300}, "pad_token_id is 507, must be below vocab_size 300"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "contradict one another"),
    ({"head_dim": 64}, "contradict one another"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
    ({"torch_dtype": "os.system"}, "torch_dtype is 'os.system', must be null or one of float32"),
    ({"dtype": "nn"}, "dtype is 'nn'"),
    ({"hidden_act": "os.system"}, "hidden_act is 'os.system'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"initializer_range": float("inf")}, "initializer_range is inf"),
    ({"attention_dropout": 2}, "attention_dropout is 2"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear', must be null or \"default\""),
    ({"rope_scaling": {"type": "su"}}, "needs short_factor and long_factor"),
    ({"rope_scaling": {"type": "su", "short_factor": [1e30] * 16, "long_factor": [1.0] * 16}}, "short_factor is"),
    ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 16}}, "short_factor has 1 elements"),
    (
        {"rope_scaling": {"type": "su", "new": 1, "short_factor": [1.0], "long_factor": [1.0]}},
        "new is 1, but no setting",
    ),
    ({"rope_scaling": "su"}, "rope_scaling is 'su', must be null, or an object"),
    ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"return_dict": False}, "return_dict is False"),
    ({"num_labels": 10**9}, "num_labels is 1000000000"),
    ({"id2label": {"x": "y"}}, "id2label is {'x': 'y'}"),
    ({"get_text_config": 3}, "get_text_config is 3, but no setting of this name is known"),
    ({"model_type": "llama"}, "model_type is 'llama', must be \"phi3_v\""),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ({"configuration_files": ["config.1.0.0.json"]}, "configuration_files is"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq', must be \"bitsandbytes\""),
    ({"quantization_config": {}}, "quant_method is None"),
    ({"vision_config": 3}, "vision_config: 3 is not an object"),
    ({"vision_config": {"num_hidden_layers": 0}}, "vision_config: num_hidden_layers is 0"),
    ({"vision_config": {"hidden_size": 100, "num_attention_heads": 3}}, "num_attention_heads 3 do not divide"),
    ({"vision_config": {"image_size": [56, 56]}}, "vision_config: image_size is [56, 56]"),
]

WEIGHTS = {
    "pickle": (pickled("model.safetensors", "pytorch_model.bin"), "pytorch_model.bin is a pickle, which is not read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut off": (text("model.safetensors", "abc"), "model.safetensors can't be read as safetensors"),
    "missing": (
        tensors(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
        "lacks the weights lm_head.weight: is it a whole",
    ),
    "more": (tensors(lambda w: w | {"x": torch.zeros(2)}), "holds weights that the model does not have, x"),
    "fewer layers": (edit("config.json", num_hidden_layers=1), "the model does not have, model.layers.1."),
    "more layers": (edit("config.json", num_hidden_layers=900), "lacks the weights model.layers.10.input_layernorm"),
    "other shape": (
        edit("config.json", vocab_size=2**22),
        "holds lm_head.weight of shape [512, 128], must be [4194304, 128], and 1 more",
    ),
    "whole numbers": (
        tensors(lambda w: w | {"lm_head.weight": torch.zeros(512, 128, dtype=torch.int64)}),
        "lm_head.weight holds numbers of type I64",
    ),
    "index outside": (shard_outside, "it names '../secret.safetensors', must name files *.safetensors beside it"),
    "index of everything": (index(lambda c: c | {"weight_map": {"a": "*"}}), "it names '*'"),
    "index of a pickle": (index(lambda c: c | {"weight_map": {"a": "pytorch_model.bin"}}), "'pytorch_model.bin'"),
    "index of numbers": (index(lambda c: c | {"weight_map": {"a": [1]}}), "it names [1]"),
    "index of nothing": (index(lambda c: c | {"weight_map": {}}), "it names no files"),
    "index without metadata": (index(lambda c: {"weight_map": c["weight_map"]}), "it must be an object with metadata"),
    "missing shard": (
        index(lambda c: c | {"weight_map": c["weight_map"] | {"x": "two.safetensors"}}),
        "lacks two.safetensors, which its model.safetensors.index.json names",
    ),
    "tensor twice": (shard_twice, "holds lm_head.weight, which another of its model's files holds too"),
}
