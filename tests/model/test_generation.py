"""Answers do not depend on what a folder's generation_config.json asks for, and every saved model stops alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINT, SHORT, arguments, train
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.generation import NEUTRAL, unused_settings, use_own_settings
from tools import ask
from tools import merge_adapter as merge_tool

# Each of these changed answers, or ended in a traceback.
ASKED = [
    {"min_new_tokens": 4},
    {"max_time": 1e-9},
    {"repetition_penalty": 1.3},
    {"num_return_sequences": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"stop_strings": ["a"]},
    {"prompt_lookup_num_tokens": 2},
    {"num_beams": 3, "do_sample": True, "temperature": 0.1},
    {"suppress_tokens": list(range(400)), "begin_suppress_tokens": [1], "bad_words_ids": [[1]]},
    {"forced_eos_token_id": 3, "sequence_bias": {"a": 1}},
    {"cache_implementation": "static", "use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
    {"watermarking_config": {"bias": 2.0}, "guidance_scale": 3.0},
    {"eos_token_id": "x", "num_beams": "many", "\x1b[2J": [1]},
    {"max_length": 1, "compile_config": {}, "assistant_early_exit": 1},
]


def asking(folder, values):
    shutil.copytree(CHECKPOINT, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


def answer(model, capsys):
    ask.main([model, "--question", "What digit is this?", "--max_new_tokens", "6"])
    return capsys.readouterr()


@pytest.mark.parametrize("values", ASKED, ids=lambda values: next(iter(values)).encode("unicode_escape").decode())
def test_the_answer_stays_and_one_line_names_what_is_not_used(values, tmp_path, capsys):
    wanted = answer(str(CHECKPOINT), capsys)
    found = answer(asking(tmp_path / "model", values), capsys)
    assert found.out == wanted.out and "not used" not in wanted.err
    (line,) = [line for line in found.err.splitlines() if "generation_config.json asks for " in line]
    assert line.isprintable() and line.count("not used") == 1
    for name in values.keys() - {"eos_token_id", "do_sample", "use_cache"}:
        assert name.encode("unicode_escape").decode() in line


def test_an_evaluation_does_not_follow_it_either(toy_data, tmp_path, capfd):
    model = asking(tmp_path / "model", {"min_new_tokens": 8, "suppress_tokens": list(range(270, 500))})
    for folder in (str(CHECKPOINT), model):
        flags = ["--evaluate_only", "--max_eval_samples", "3", "--model_name_or_path", folder]
        script.main(arguments(toy_data, tmp_path / f"out of {len(folder)}", *flags))
    first, second = (json.loads((path / "evaluation-val.json").read_text()) for path in tmp_path.glob("out of *"))
    assert first == second
    assert capfd.readouterr().err.count("asks for min_new_tokens 8, suppress_tokens [270, 271,") == 1


def test_a_run_replaces_what_the_base_says_about_stopping(toy_data, tmp_path, processor):
    model = Path(asking(tmp_path / "model", {"eos_token_id": 2, "min_new_tokens": 8}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 507}))
    flags = [*SHORT, "--max_eval_samples", "1", "--no_eval_before", "--model_name_or_path", model]
    train(toy_data, tmp_path / "out", *flags)
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "out" / name).read_text())
        assert saved["eos_token_id"] == processor.stop_ids and "min_new_tokens" not in saved


def test_the_hubs_files_ask_for_nothing(tmp_path):
    for content in ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000}, {}):
        (tmp_path / "generation_config.json").write_text(json.dumps(content | {"transformers_version": "4.38.1"}))
        assert unused_settings(tmp_path) == {}
    assert unused_settings(CHECKPOINT) == {} == unused_settings(tmp_path / "no folder")
    usual = {"use_cache": True, "output_attentions": False, "temperature": 1.0, "do_sample": False, "num_beams": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(usual))
    assert unused_settings(tmp_path) == {}


@pytest.mark.parametrize("mode", ["full", "frozen, no sharing", "lora"])
def test_all_saved_models_stop_at_the_same_tokens(mode, finished_run, tmp_path, processor):
    out = finished_run(mode)
    saved = models = [out, out / "checkpoint-2"]
    if mode == "lora":
        merge_tool.main([str(out), str(tmp_path / "merged"), "--dtype", "fp32"])
        models = [tmp_path / "merged"]
    for folder in models:
        for name in ("config.json", "generation_config.json"):
            content = json.loads((folder / name).read_text())
            assert content["eos_token_id"] == processor.stop_ids == [510, 507], (folder, name)
            assert (content["pad_token_id"], content["bos_token_id"]) == (507, 1)
        assert json.loads((folder / "generation_config.json").read_text()).keys() <= NEUTRAL
    for folder in {*saved, *models}:
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        assert all(isinstance(merge, str) for merge in merges)


def test_a_saved_copy_of_the_hubs_model_stops_there_too(tmp_path):
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    model.config.vocab_size, model.config.eos_token_id, model.generation_config.eos_token_id = 32064, 2, 2
    model._correct_stop_ids()
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [32007, 32000]


def test_the_weights_are_not_changed(tmp_path):
    model, processor = Phi3VForCausalLM.from_pretrained(CHECKPOINT), Phi3VProcessor.from_pretrained(CHECKPOINT)
    use_own_settings(model, processor)
    model.save_pretrained(tmp_path)
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
