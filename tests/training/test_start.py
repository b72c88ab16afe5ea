"""An adapter is trained further with its own settings, from its own weights, and is never lost."""

import json
import shutil

import pytest
import torch
from helpers import (
    CHECKPOINT,
    RESUMABLE,
    answers_of,
    arguments,
    digest_of_weights,
    losses_of,
    parse_command,
    train_resumable,
)
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v.arguments import find_model
from phi3v.errors import InputError
from phi3v.model.vision_parts import trained_fully

OWN = RESUMABLE[2:]  # without --model_name_or_path
FURTHER = ["--max_steps", "4", "--batch_size_per_gpu", "4"]


def found(data, out, *flags):
    """The flags of a run after it has looked at what it starts from, and its TrainingArguments."""
    args, training_args = parse_command(script, arguments(data, out, "--use_lora", *flags, common=OWN))
    find_model(args, training_args, script.choose_trained)
    return args, training_args


def evaluated(data, out, *flags) -> dict:
    script.main(arguments(data, out, *flags, "--evaluate_only", common=OWN))
    return answers_of(out / "evaluation-val.json")


@pytest.fixture(scope="module")
def adapter(finished_run):
    """Of rank 4, with dropout and separators."""
    return finished_run("lora")


@pytest.fixture(scope="module")
def further(adapter, toy_data, made_once):
    """The output folder of a run that has trained the adapter further."""
    flags = ["--use_lora", "--adapter", adapter, *FURTHER]
    return made_once("further", lambda folder: train_resumable(toy_data, folder, *flags))


def test_an_adapter_decides_on_its_own_flags(adapter, toy_data, tmp_path, capsys):
    args, training_args = found(toy_data, tmp_path, "--adapter", adapter)
    assert (args.lora_rank, args.lora_alpha_ratio, args.lora_dropout, args.use_dora) == (4, 2.0, 0.1, False)
    assert args.train_separators and not args.freeze_vision_model and args.vision_training == "default"
    assert (args.model_name_or_path, args.adapter_folder) == (str(CHECKPOINT), str(adapter))
    said = capsys.readouterr().out
    assert f"adapter    {adapter} is trained further on {CHECKPOINT}; its own: rank 4, " in said
    assert "trained separators" in said and "warning" not in said
    # Its number of crops too, unless another is given.
    for more, crops in (([], 2), (["--num_crops", "4"], 4)):
        argv = arguments(toy_data, tmp_path, "--use_qlora", "--adapter", adapter, *more, common=["--no-tqdm"])
        args, training_args = parse_command(script, argv)
        find_model(args, training_args, script.choose_trained)
        assert args.num_crops == crops and training_args.learning_rate == 2e-4


CONTRADICTIONS = {
    "--lora_rank 8": "--lora_rank 8 contradicts --adapter {}, where it is 4: leave it out",
    "--lora_alpha_ratio 1": "--lora_alpha_ratio 1.0 contradicts --adapter {}, where it is 2.0",
    "--lora_dropout 0": "--lora_dropout 0.0 contradicts --adapter {}, where it is 0.1",
    "--use_dora": "--use_dora True contradicts",
    "--train_separators False": "--train_separators False contradicts --adapter {}, where it is True",
    "--freeze_vision_model": "--freeze_vision_model True contradicts",
    "--vision_training tower": "--vision_training tower contradicts --adapter {}, where it is default",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_adapter_is_one_line(flags, adapter, toy_data, tmp_path):
    with pytest.raises(InputError) as error:
        found(toy_data, tmp_path, "--adapter", adapter, *flags.split())
    assert CONTRADICTIONS[flags].format(adapter) in str(error.value) and "\n" not in str(error.value)


def test_flags_that_agree_with_the_adapter_are_no_contradiction(adapter, toy_data, tmp_path):
    flags = "--lora_rank 4 --lora_alpha_ratio 2 --lora_dropout 0.1 --train_separators --vision_training default"
    assert found(toy_data, tmp_path, "--adapter", adapter, *flags.split())


def test_training_starts_with_the_weights_and_the_score_of_the_adapter(adapter, toy_data, tmp_path, monkeypatch):
    start, load = {}, script.load_model

    def load_and_remember(*args):
        model = load(*args)
        start.update(
            {
                name: tensor.clone()
                for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
            }
        )
        start.update({name: tensor.clone() for name, tensor in trained_fully(model).items()})
        return model

    monkeypatch.setattr(script, "load_model", load_and_remember)
    common = [flag for flag in OWN if flag != "--no_eval_before"]
    argv = arguments(toy_data, tmp_path / "out", "--use_lora", "--adapter", adapter, "--max_steps", "1", common=common)
    script.main(argv)
    saved = load_file(adapter / "adapter_model.safetensors") | load_file(adapter / "separators.safetensors")
    assert start.keys() == saved.keys() and all(torch.equal(start[name], saved[name]) for name in saved)
    before = answers_of(tmp_path / "out" / "eval_before.json")
    assert before == evaluated(toy_data, tmp_path / "one", "--adapter", adapter)
    assert before == evaluated(toy_data, tmp_path / "two", "--model_name_or_path", adapter)
    assert before == answers_of(adapter / "eval_after.json")
    assert f"with the adapter {adapter} fine-tuned" in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


@pytest.mark.parametrize("more", [[], ["--quantize_vision"]])
def test_an_adapter_is_trained_further_on_a_base_in_4_bits(more, adapter, toy_data, tmp_path):
    args, training_args = found(toy_data, tmp_path, "--use_qlora", "--adapter", adapter, *more)
    model = script.load_model(args, training_args)
    saved = load_file(adapter / "adapter_model.safetensors")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    separators = load_file(adapter / "separators.safetensors")
    assert all(torch.equal(p, separators[name]) for name, p in trained_fully(model).items())
    assert type(model.get_base_model().model.layers[0].mlp.down_proj.base_layer).__name__ == "Linear4bit"


def test_a_run_that_trains_an_adapter_further_is_resumed_bit_for_bit(adapter, further, toy_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(further, out)
    for path in [out / "finished.json", *out.glob("*.safetensors")]:
        path.unlink()
    shutil.rmtree(out / "checkpoint-4")
    flags = ["--use_lora", *FURTHER, "--resume_from_checkpoint", "auto"]
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(InputError, match="adapter: .* then, .* now(.|\n)*give the same --adapter as before"):
        train_resumable(toy_data, out, *flags, "--adapter", copy)
    trainer = train_resumable(toy_data, out, *flags, "--adapter", adapter)
    assert digest_of_weights(out) == digest_of_weights(further) != digest_of_weights(adapter)
    history = json.loads((further / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert losses_of(trainer) == [entry["loss"] for entry in history if "loss" in entry]


def test_an_adapter_whose_weights_have_changed_is_noticed(adapter, toy_data, tmp_path):
    copy, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = ["--use_lora", "--adapter", copy, "--max_steps", "2", "--batch_size_per_gpu", "4"]
    train_resumable(toy_data, out, *flags)
    (out / "finished.json").unlink()
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copy / "adapter_model.safetensors")
    with pytest.raises(InputError, match="adapter_weights: "):
        train_resumable(toy_data, out, *flags, "--resume_from_checkpoint", "auto")


def test_a_checkpoint_is_an_adapter_too(adapter, toy_data, tmp_path):
    args, training_args = found(toy_data, tmp_path, "--adapter", adapter / "checkpoint-2")
    state = get_peft_model_state_dict(script.load_model(args, training_args), save_embedding_layers=False)
    saved = load_file(adapter / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_an_output_folder_that_holds_the_adapter_is_refused(adapter, toy_data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for own in (out, out / "checkpoint-12", out / "checkpoint-12" / ".." / "checkpoint-2"):
        with pytest.raises(InputError, match="--adapter .* is what --output_dir .* holds, and it would be moved away"):
            found(toy_data, out, "--adapter", own)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_an_adapter_of_the_language_model_alone_freezes_the_vision_model(adapter, toy_data, tmp_path):
    flags = "--use_lora --lora_rank 4 --freeze_vision_model --max_steps 1".split()
    train_resumable(toy_data, tmp_path / "frozen", *flags)
    flags = ["--adapter", tmp_path / "frozen"]
    args, training_args = found(toy_data, tmp_path / "out", *flags)
    assert args.freeze_vision_model
    model = script.load_model(args, training_args)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "vision_embed_tokens" in name)
    cached = [*flags, "--freeze_vision_model", "--cache_vision_features", tmp_path / "cache"]
    assert found(toy_data, tmp_path / "out", *cached)[0].cache_vision_features


def test_whole_parts_beside_the_adapter_are_trained_further(saved_run, toy_data, tmp_path, capsys):
    folder = saved_run("whole vision")
    args, training_args = found(toy_data, tmp_path, "--adapter", folder)
    assert (args.vision_training, args.vision_lr, args.projector_lr) == ("all", 4e-5, 4e-5)
    assert "the rate of what trains fully is 4e-05" in capsys.readouterr().out
    model = script.load_model(args, training_args)
    saved = load_file(folder / "vision.safetensors")
    assert {name: True for name in saved} == {n: torch.equal(p, saved[n]) for n, p in trained_fully(model).items()}


def test_a_base_other_than_the_adapters(adapter, toy_data, tmp_path, capsys):
    base, copy = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(CHECKPOINT, base)
    args, _ = found(toy_data, tmp_path / "out", "--adapter", adapter, "--model_name_or_path", base)
    assert args.model_name_or_path == str(base)
    said = f"warning: {adapter} was trained on {CHECKPOINT}; --model_name_or_path {base} is used in its place"
    assert said in capsys.readouterr().out
    found(toy_data, tmp_path / "out", "--adapter", adapter, "--model_name_or_path", base / ".." / "base")
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "lost")}))
    with pytest.raises(InputError, match="lost"):
        found(toy_data, tmp_path / "out", "--adapter", copy)
    assert found(toy_data, tmp_path / "out", "--adapter", copy, "--model_name_or_path", CHECKPOINT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "nowhere"], "--adapter nowhere has no adapter_config.json: give the output folder"),
        (["--adapter", str(CHECKPOINT)], "has no adapter_config.json"),
        (["--adapter", "a/b@"], "--adapter a/b@ names no revision behind the @"),
        (["--adapter", "a/b", "--model_revision", "v1"], "--model_revision is of --model_name_or_path: give that too"),
    ],
)
def test_what_is_no_adapter_is_one_line(flags, message, toy_data, tmp_path):
    with pytest.raises(InputError) as error:
        found(toy_data, tmp_path, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_needs_lora(adapter, toy_data, tmp_path):
    with pytest.raises(InputError, match="--adapter has no effect without --use_lora"):
        parse_command(script, arguments(toy_data, tmp_path, "--adapter", adapter))


def test_an_estimate_needs_no_weights(adapter, toy_data, tmp_path, capsys):
    assert script.main(arguments(toy_data, tmp_path, "--use_lora", "--adapter", adapter, "--estimate")) is None
    trained = sum(
        tensor.numel()
        for file in ("adapter_model", "separators")
        for tensor in load_file(adapter / f"{file}.safetensors").values()
    )
    assert f"of which {trained:,} train" in capsys.readouterr().out
