"""Adapters as a stranger may give them, each with what the error says. `bad_models` has the form of the table."""

import torch
from bad_models import deep, edit, pickled, pipe, tensors, text
from safetensors.torch import save_file

BASE_KEY = "base_model.model."
CONFIG, LORA = "adapter_config.json", "adapter_model.safetensors"
SEPARATORS = "separators.safetensors"


def config(**values):
    return edit(CONFIG, **values)


ADAPTERS = {
    "deep": (deep(CONFIG), "adapter_config.json is not readable: its JSON is nested too deeply"),
    "pipe": (pipe(CONFIG), "adapter_config.json is not a regular file"),
    "list": (text(CONFIG, "[]"), "adapter_config.json is not a JSON object"),
    "pipe weights": (pipe(LORA), "adapter_model.safetensors is not a regular file"),
    "pickle": (pickled(LORA, "adapter_model.bin"), "adapter_model.bin is a pickle, which is not read"),
    "none of its weights": (tensors(lambda w: {"x": torch.zeros(1)}, LORA), "adapter_model.safetensors holds x, but"),
    "half its weights": (
        tensors(lambda w: {k: v for k, v in w.items() if "lora_A" in k}, LORA),
        "lacks the weights lm_head.lora_B.weight",
    ),
    "more weights": (
        tensors(lambda w: w | {f"{BASE_KEY}model.norm.weight": torch.zeros(128)}, LORA),
        "holds weights that the model does not have, model.norm.weight",
    ),
    "whole numbers": (
        tensors(lambda w: {k: v.to(torch.int32) for k, v in w.items()}, LORA),
        "holds numbers of type I32",
    ),
    "other targets": (config(target_modules=["q_proj"]), "holds weights that the model does not have, lm_head.lora_A"),
    "no targets": (config(target_modules=None), "target_modules is None, must be"),
    "targets of no layer": (config(target_modules=["x"]), "target_modules match no layer of the model"),
    "targets of all": (config(target_modules=".*"), "target_modules match , which is no linear layer"),
    "targets of a norm": (config(target_modules=["norm"]), "target_modules match model.norm, which is no linear layer"),
    "bad pattern": (config(target_modules="(("), "'((' is no regular expression"),
    "other rank": (config(r=8), "holds lm_head.lora_A.weight of shape [4, 128], must be [8, 128]"),
    "huge rank": (config(r=10**9), "must be [1000000000, 128]"),
    "rank 0": (config(r=0), "r is 0, must be a whole number above 0"),
    "rank of one layer": (config(rank_pattern={"lm_head": 5}), "lm_head.lora_A.weight of shape [4, 128], must be [5"),
    "rank is a text": (config(rank_pattern={"lm_head": "5"}), "rank_pattern is {'lm_head': '5'}"),
    "alpha": (config(lora_alpha="x"), "lora_alpha is 'x', must be a number above 0"),
    "alpha of one layer": (config(alpha_pattern={"lm_head": float("nan")}), "alpha_pattern is {'lm_head': nan}"),
    "alpha nan": (config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "dropout": (config(lora_dropout=2), "lora_dropout is 2"),
    "another kind": (config(peft_type="LOHA"), "peft_type is 'LOHA', must be \"LORA\": only LoRA adapters are read"),
    "no kind": (config(peft_type="BOGUS"), "peft_type is 'BOGUS'"),
    "another task": (config(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "DoRA without magnitudes": (config(use_dora=True), "lacks the weights lm_head.lora_magnitude_vector"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', must be true or false, or"),
    "LoftQ": (
        config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        "such an adapter needs a changed base",
    ),
    "megatron": (config(megatron_config={"a": 1}), "megatron_config is {'a': 1}, which is not read"),
    "layers doubled": (config(layer_replication=[[0, 2], [1, 2]]), "layer_replication is [[0, 2], [1, 2]]"),
    "biases": (config(bias="all"), "bias is 'all', must be \"none\""),
    "unknown key": (config(of_the_future=3), "of_the_future is 3, which is not read"),
    "tokens": (config(trainable_token_indices=[1, 2]), "trainable_token_indices is [1, 2], which is not read"),
    "whole module": (config(modules_to_save=["lm_head"]), "lacks the weights lm_head.weight"),
    "whole modules of all": (config(modules_to_save=[""]), "modules_to_save has '', which is no module"),
    "whole modules in one another": (config(modules_to_save=["mlp", "fc1"]), "a second time"),
    "whole module of no name": (config(modules_to_save=["x"]), "modules_to_save has 'x', which is no module"),
    "layers by pattern": (config(layers_to_transform=[0]), "layers_to_transform needs target_modules to be a list"),
    "separators": (
        lambda folder: save_file({"lm_head.weight": torch.zeros(1)}, folder / SEPARATORS),
        "separators.safetensors lacks the weights model.vision_embed_tokens.glb_GN",
    ),
    "pipe separators": (pipe(SEPARATORS), "separators.safetensors is not a regular file"),
    "no base": (config(base_model_name_or_path=None), "does not name a base_model_name_or_path"),
    "base is a number": (config(base_model_name_or_path=3), "does not name a base_model_name_or_path"),
    "base with NUL": (config(base_model_name_or_path="a\0b"), "can't be loaded"),
    "long base": (config(base_model_name_or_path="a" * 5000), "can't be a folder's name"),
    "base elsewhere": (config(base_model_name_or_path="/etc"), "/etc can't be loaded"),
    "revision": (config(revision="../../main"), "revision is '../../main', must be a branch"),
}
