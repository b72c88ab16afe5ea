"""An adapter is loaded exactly or not at all: what PEFT writes for this model, and what strangers may give."""

import json
import shutil
import time

import pytest
import torch
from bad_adapters import ADAPTERS, CONFIG, LORA
from bad_models import edit, tensors
from helpers import CHECKPOINT, RESUMABLE_MODES, copy_up_to_checkpoint, train_resumable
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model import lora_config
from phi3v.model.adapters import add_adapter, check_resumable, continue_adapter, load_adapter
from phi3v.model.loading import find_saved
from phi3v.model.merging import MergedWeights
from tools import ask
from tools import merge_adapter as merge_tool

OFFICIAL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "q_proj", "k_proj", "v_proj", "out_proj"]
OFFICIAL += ["fc1", "fc2", "img_projection.0", "img_projection.2"]
# What PEFT's LoraConfig may say, and what was trained is loaded exactly.
GOOD = {
    "the official recipe": {"target_modules": OFFICIAL, "init_lora_weights": "gaussian"},
    "ranks and alphas of their own": {
        "target_modules": OFFICIAL,
        "rank_pattern": {r"layers\.0\..*qkv_proj": 3, "lm_head": 2},
        "alpha_pattern": {"o_proj": 5, "img_projection.0": 0.5},
    },
    "rsLoRA": {"target_modules": ["o_proj"], "use_rslora": True, "lora_alpha": 3},
    "DoRA": {"target_modules": ["o_proj", "fc1"], "use_dora": True},
    "bias of the adapter": {"target_modules": ["fc1"], "lora_bias": True},
    "without one": {"target_modules": r"model\.layers.*_proj", "exclude_modules": ["o_proj"]},
    "of one layer": {"target_modules": ["o_proj", "fc1"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "lookahead": {"target_modules": r"^(?!.*vision).*_proj$"},
    "whole modules": {"target_modules": ["o_proj", "lm_head"], "modules_to_save": ["img_projection", "lm_head"]},
    "whole embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "no task": {"target_modules": ["o_proj"], "task_type": None, "lora_dropout": 0.5},
}


def base():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[1, 511, 14, 300, 42, 7, 508, *range(9)]])
    pixels, sizes = torch.linspace(-1, 1, 2 * 3 * 56 * 56).view(1, 2, 3, 56, 56), torch.tensor([[56, 56]])
    images = torch.tensor([[1, *[-1] * 13, 42, 7]])
    both = model.eval()(input_ids=images, pixel_values=pixels, image_sizes=sizes).logits
    return torch.cat([model(input_ids=ids).logits, both], dim=1)


def random_weights(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1


@pytest.mark.parametrize("name", GOOD)
def test_what_peft_saves_is_loaded_exactly(name, tmp_path):
    trained = get_peft_model(base(), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | GOOD[name]))
    random_weights(trained)
    trained.save_pretrained(tmp_path)
    wanted = logits(trained)
    assert (wanted - logits(base())).abs().max() > 0.01
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path)), wanted, rtol=0, atol=0)
    assert find_saved(str(tmp_path)).adapter == tmp_path
    at_once, merged = load_adapter(base(), tmp_path).merge_and_unload(), MergedWeights(find_saved(str(tmp_path)))
    torch.testing.assert_close(logits(at_once), wanted, rtol=0, atol=2e-3)
    assert all(torch.equal(merged[weight].float(), tensor) for weight, tensor in at_once.state_dict().items())


def test_the_official_recipe_saves_the_output_layer_too(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=OFFICIAL))
    random_weights(model)
    model.get_base_model().lm_head.base_layer.weight.data += 1
    model.save_pretrained(tmp_path)
    assert f"{lora_config.PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / LORA)
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), logits(model), rtol=0, atol=0)
    at_once, merged = load_adapter(base(), tmp_path).merge_and_unload(), MergedWeights(find_saved(str(tmp_path)))
    assert torch.equal(merged["lm_head.weight"], at_once.lm_head.weight)


def test_configs_of_older_and_newer_versions_of_peft(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    path, wanted = tmp_path / "adapter" / CONFIG, logits(load_adapter(base(), adapter))
    full = json.loads(path.read_text())
    old = {key: full[key] for key in ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")}
    auto = {"auto_mapping": {"base_model_class": "Phi3VForCausalLM", "parent_library": "os"}}
    for content in (old | {"enable_lora": None, "bias": "none"}, full | auto | {"of_the_future": None, "more": {}}):
        path.write_text(json.dumps(content))
        torch.testing.assert_close(logits(load_adapter(base(), tmp_path / "adapter")), wanted, rtol=0, atol=0)


def test_magnitudes_of_dora_under_their_older_name(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["o_proj"], use_dora=True))
    random_weights(model)
    model.save_pretrained(tmp_path)

    def rename(weights):
        return {k.replace("magnitude_vector", "magnitude_vector.weight"): v for k, v in weights.items()}

    tensors(rename, LORA)(tmp_path)
    torch.testing.assert_close(logits(load_adapter(base(), tmp_path)), logits(model), rtol=0, atol=0)
    name, merged = "model.layers.0.self_attn.o_proj.weight", MergedWeights(find_saved(str(tmp_path)))
    assert torch.equal(merged[name], model.merge_and_unload().get_parameter(name))


@pytest.mark.parametrize("name", GOOD)
def test_an_adapter_of_peft_is_trained_further_from_its_own_loss(name, toy_batch, tmp_path):
    trained = get_peft_model(
        base(), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | GOOD[name] | {"lora_dropout": 0})
    )
    random_weights(trained)
    trained.save_pretrained(tmp_path)
    if "modules_to_save" in GOOD[name]:
        with pytest.raises(InputError, match="holds whole modules .* merge it with tools/merge_adapter.py"):
            continue_adapter(base(), tmp_path)
        return
    model = continue_adapter(base(), tmp_path).train()
    assert torch.equal(model(**toy_batch).loss, trained.train()(**toy_batch).loss)
    saved = load_file(tmp_path / LORA)
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() >= found.keys() and all(torch.equal(tensor, saved[key]) for key, tensor in found.items())
    for key, parameter in model.named_parameters():  # an adapter of the tower's last layer is never run
        assert parameter.requires_grad == ("lora_" in key and ".encoder.layers.2." not in key), key
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_adapter(base(), tmp_path / "again").train()(**toy_batch).loss, model(**toy_batch).loss)


def test_an_output_layer_that_the_adapter_has_changed_is_refused(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["lm_head", "o_proj"]))
    model.save_pretrained(tmp_path)
    assert any("base_layer" in name for name in load_file(tmp_path / LORA))
    continue_adapter(base(), tmp_path)
    model.get_base_model().lm_head.base_layer.weight.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds lm_head.base_layer.weight, which differs from the base's"):
        continue_adapter(base(), tmp_path)


# ---- What can't be loaded exactly


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    targets = r"lm_head|model\.layers.*_proj|model\.vision_embed_tokens.*(q_proj|img_projection\.0)"
    model = add_adapter(base(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    random_weights(model)
    model.save_pretrained(folder)
    Phi3VProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_loaded_exactly(name, copy):
    change, message = ADAPTERS[name]
    change(copy)
    with pytest.raises(InputError) as error:
        find_saved(str(copy))
    assert message in str(error.value) and "\n" not in str(error.value)


def evaluated(folder, data, out):
    import finetune_hf_trainer_ucf101 as script

    script.main(["--model_name_or_path", str(folder), "--data_dir", str(data), "--evaluate_only", "--output_dir", out])


@pytest.mark.parametrize("name", ["none of its weights", "another kind", "separators", "pickle"])
def test_all_that_read_adapters_refuse_it(name, copy, toy_data, tmp_path):
    change, message = ADAPTERS[name]
    change(copy)
    for read in (
        lambda: evaluated(copy, toy_data, str(tmp_path / "out")),
        lambda: ask.main([str(copy), "--question", "What?"]),
        lambda: merge_tool.main([str(copy), str(tmp_path / "merged")]),
        lambda: load_adapter(base(), copy),
    ):
        with pytest.raises(InputError, match="no adapter_model.safetensors" if name == "pickle" else message):
            read()
    assert not (tmp_path / "merged").exists()


def test_the_base_of_an_adapter_must_not_be_an_adapter(copy):
    edit(CONFIG, base_model_name_or_path=str(copy))(copy)
    with pytest.raises(InputError, match="is an adapter itself, must be a whole model"):
        find_saved(str(copy))


def test_a_bias_that_cannot_be_merged(tmp_path):
    config = LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True)
    get_peft_model(Phi3VForCausalLM.from_pretrained(CHECKPOINT), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="can't be merged: it has lora_bias for layers whose base has no bias"):
        merge_tool.main([str(tmp_path), str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_nan(copy):
    tensors(lambda weights: {k: v * float("nan") for k, v in weights.items()}, LORA)(copy)
    with pytest.raises(InputError, match="hold NaN or infinity"):
        load_adapter(base(), copy)
    with pytest.raises(InputError, match="hold NaN or infinity"):
        merge_tool.main([str(copy), str(copy.parent / "merged")])


def test_resuming_needs_all_of_the_adapter(adapter, tmp_path, copy):
    model = load_adapter(base(), adapter)
    check_resumable(model, adapter)
    (copy / "other").mkdir()
    shutil.copy(adapter / LORA, copy / "other")
    with pytest.raises(InputError, match="holds a second adapter"):
        check_resumable(model, copy)
    shutil.rmtree(copy / "other")
    tensors(lambda weights: dict(list(weights.items())[1:]), LORA)(copy)
    with pytest.raises(InputError, match="lacks the weights base_model.model.lm_head.lora_A.weight"):
        check_resumable(model, copy)
    check_resumable(base(), CHECKPOINT)
    with pytest.raises(InputError, match="has no model.safetensors"):
        check_resumable(base(), adapter)


def test_a_checkpoint_without_half_of_its_adapter_is_not_resumed(finished_run, toy_data, tmp_path):
    out = tmp_path / "out"
    copy_up_to_checkpoint(finished_run("lora"), out, 2)
    tensors(lambda weights: {k: v for k, v in weights.items() if "lora_A" in k}, LORA)(out / "checkpoint-2")
    manifest = json.loads((out / "checkpoint-2" / "complete.json").read_text())
    manifest["files"][LORA] = (out / "checkpoint-2" / LORA).stat().st_size
    (out / "checkpoint-2" / "complete.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="checkpoint-2 lacks the weights base_model.model.lm_head.lora_B.weight"):
        train_resumable(toy_data, out, *RESUMABLE_MODES["lora"], "--resume_from_checkpoint", "auto")


def test_a_pattern_that_takes_for_ever(copy, monkeypatch):
    monkeypatch.setattr(lora_config, "SECONDS", 0.1)
    edit(CONFIG, target_modules=r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)\1\2\3\4\5[A-Z]")(copy)
    start = time.process_time()
    with pytest.raises(InputError, match="takes longer than 0.1 s"):
        find_saved(str(copy))
    assert time.process_time() - start < 30
