"""Weights that are not those of the configuration are an error that names the tensor, before memory is allocated."""

import json
import shutil

import pytest
import torch
import transformers.modeling_utils
from bad_folders import update_manifest
from bad_models import WEIGHTS, index
from helpers import CHECKPOINT, RESUMABLE_MODES, SHORT, arguments, copy_up_to_checkpoint, train, train_resumable
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model import weights
from phi3v.model.loading import find_saved, load_saved, nf4_config
from phi3v.model.weights import check_shapes, weight_files
from tools import ask
from tools import merge_adapter as merge_tool


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name, copy):
    change, message = WEIGHTS[name]
    change(copy)
    with pytest.raises(InputError) as error:
        find_saved(str(copy))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_index_of_shards_is_read(copy):
    index(lambda content: content)(copy)
    assert load_saved(find_saved(str(copy)), dtype=torch.float32).dtype == torch.float32


def test_what_older_checkpoints_hold_beside_the_models_weights(copy):
    tensors = load_file(copy / "model.safetensors")
    position = "model.vision_embed_tokens.img_processor.vision_model.embeddings.position_ids"
    tensors |= {"model.vision_embed_tokens.wte.weight": torch.zeros(512, 128), position: torch.arange(17)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    load_saved(find_saved(str(copy)), dtype=torch.float32)


def test_a_model_in_four_bits_is_read(copy):
    model = Phi3VForCausalLM.from_pretrained(
        copy, dtype=torch.float32, quantization_config=nf4_config(torch.float32), device_map={"": "cpu"}
    )
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy)
    again = load_saved(find_saved(str(copy)), dtype=torch.float32, device="cpu")
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)


def test_all_that_is_wrong_stands_in_one_line():
    found = {"a": (1,), "b": (2,), "c.inv_freq": (3,), "x": (1,)}
    with pytest.raises(InputError) as error:
        check_shapes(found, {"a": (1,), "b": (3,), "d": (1,)}, "F", "!")
    assert str(error.value) == (
        "F lacks the weights d; it holds weights that the model does not have, x; it holds b of shape [2], must be [3]!"
    )


# ---- Models in shards


def content_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def assert_same(folder, other):
    found, wanted = content_of(folder), content_of(other)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def names_of_weights(folder) -> set[str]:
    return {path.name for path in folder.glob("model*")}


def assert_in_shards(folder):
    files = json.loads((folder / weights.INDEX).read_text())["weight_map"].values()
    assert len(set(files)) > 3 and names_of_weights(folder) == {*files, weights.INDEX}


def answers(model, data, out) -> list:
    script.main(arguments(data, out, "--model_name_or_path", model, "--evaluate_only", "--max_eval_samples", 2))
    return json.loads((out / "evaluation-val.json").read_text())["predictions"]


@pytest.fixture
def small_shards(monkeypatch, saved_run, finished_run):
    """A model of some MB is saved in several shards. The runs that tests share are made before that."""
    saved_run("full"), finished_run("full")
    monkeypatch.setattr(weights, "SHARD_SIZE", "500KB")


def test_a_shard_has_at_most_5_gb_unless_another_size_is_asked_for(tmp_path, monkeypatch):
    sizes = []

    def plan(*args, max_shard_size, **kwargs):
        sizes.append(max_shard_size)
        return split(*args, max_shard_size=max_shard_size, **kwargs)

    split = transformers.modeling_utils.split_torch_state_dict_into_shards
    monkeypatch.setattr(transformers.modeling_utils, "split_torch_state_dict_into_shards", plan)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert sizes == ["5GB", "1GB"] and names_of_weights(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("sizes", [("5GB", "500KB"), ("500KB", "5GB"), ("300KB", "1MB"), ("1MB", "300KB")])
def test_saving_again_leaves_no_weights_of_the_model_before(sizes, tmp_path, monkeypatch):
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    for size in sizes:
        monkeypatch.setattr(weights, "SHARD_SIZE", size)
        model.lm_head.weight.data += 1
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "alone")
    assert names_of_weights(tmp_path) == names_of_weights(tmp_path / "alone")
    assert_same(tmp_path, tmp_path / "alone")


def test_what_was_killed_while_it_was_saved_again_is_no_mixture(tmp_path, monkeypatch, small_shards):
    """Shards of two models with one index would be loaded as one model."""
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path)
    save, saved = transformers.modeling_utils.safe_save_file, []

    def killed_after_two(*args, **kwargs):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*args, **kwargs))

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no model.safetensors"):
        weight_files(tmp_path)


def test_checkpoints_in_shards_are_resumed_and_a_model_saved_before_does_not_stay(
    finished_run, toy_data, tmp_path, small_shards
):
    whole, out = finished_run("full"), tmp_path / "out"
    copy_up_to_checkpoint(whole, out, 10)
    shutil.copy(CHECKPOINT / "model.safetensors", out)  # of a run that was killed before it had finished
    checkpoint = out / "checkpoint-10"
    load_saved(find_saved(str(checkpoint)), dtype=torch.float32).save_pretrained(checkpoint)
    update_manifest(checkpoint)
    assert_in_shards(checkpoint)
    train_resumable(toy_data, out, *RESUMABLE_MODES["full"], "--resume_from_checkpoint", "auto")
    assert (out / "report.html").is_file()
    for folder in (out, out / "checkpoint-12"):
        assert_in_shards(folder)
        assert_same(folder, whole / folder.relative_to(out))


def test_every_tool_reads_shards(saved_run, toy_data, tmp_path, small_shards, capsys):
    whole, shards = saved_run("full"), tmp_path / "shards"
    load_saved(find_saved(str(whole)), dtype=torch.float32).save_pretrained(shards)
    Phi3VProcessor.from_pretrained(whole).save_pretrained(shards)
    assert_in_shards(shards)
    assert_same(shards, whole)
    found = []
    for name, model in (("shards", shards), ("whole", whole)):
        folder, short = tmp_path / f"of-{name}", ["--model_name_or_path", model, "--no_eval_before", *SHORT]
        evaluated = answers(model, toy_data, folder / "evaluated")
        capsys.readouterr()
        ask.main([str(model), "--question", "Where is it?", "--max_new_tokens", "4"])
        found.append((evaluated, capsys.readouterr().out))
        train(toy_data, folder / "trained", *short, "--max_steps", "1")
        train(toy_data, folder / "adapter", *short, "--max_steps", "1", "--use_lora")
        merge_tool.main([str(folder / "adapter"), str(folder / "merged"), "--dtype", "fp32"])
    assert found[0] == found[1]
    for name in ("trained", "merged"):
        assert_in_shards(tmp_path / "of-shards" / name)
        assert_same(tmp_path / "of-shards" / name, tmp_path / "of-whole" / name)
