"""What is refused because it can't fit into memory, before a weight is read, and what the error says would fit.

The folder `large` has the configuration of a model about as large as the published one, with fewer and wider layers, on
which adapters are put faster. It has no weights, so whatever opens them fails."""

import json
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import CHECKPOINT, ROOT, SHORT, arguments, parse_command, train

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VConfig
from phi3v.errors import InputError
from phi3v.training import host_memory, memory_check
from phi3v.training.memory_check import check_training, check_weights

GIB = 2**30
FLAGS = {"bf16": "--bf16", "4 bits": "--use_qlora"}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for path in CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    vision = Phi3VConfig().vision_config.to_dict() | {"num_hidden_layers": 2}
    sizes = {"num_hidden_layers": 4, "intermediate_size": 98304}
    Phi3VConfig(**sizes, vision_config=vision, dtype="bfloat16").save_pretrained(folder)
    images = folder / "preprocessor_config.json"
    images.write_text(json.dumps(json.loads(images.read_text()) | {"image_size": 336}))
    return folder


@pytest.fixture
def limited(tmp_path, monkeypatch):
    """limited(gib): from now on, this process is in a control group with that limit, and holds nothing yet."""

    def limit(gib):
        for name, text in {"memory.max": int(gib * GIB), "memory.current": 0, "memory.stat": "", "own": "0::/"}.items():
            (tmp_path / name).write_text(str(text))
        monkeypatch.setattr(host_memory, "CONTROL_GROUPS", tmp_path)
        monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
        # The machine that runs the tests may have less.
        memory = SimpleNamespace(total=2**45, available=2**45)
        monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(memory_check, "_held", lambda device: 0.0)

    return limit


@pytest.fixture
def gpu(monkeypatch):
    """gpu(gib): from now on, torch reports a GPU with so much memory."""

    def put(gib):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gib * GIB))

    return put


def refusal(large, folder, *flags, world_size=1, **of_run) -> str:
    """Why the script would be refused with these flags; an empty text if it is not."""
    args, training_args = parse_command(script, arguments(folder, folder / "out", *flags))
    known = {name: getattr(training_args, name) for name in ("deepspeed", "bf16", "fp16", "optim")} | of_run
    device = torch.device("cuda", 0) if torch.accelerator.is_available() else torch.device("cpu")
    run = SimpleNamespace(world_size=world_size, device=device, **known)
    try:
        check_training(args, run, script.choose_trained, large)
    except InputError as e:
        assert "\n" not in str(e)
        return str(e)
    return ""


def fitting(text: str) -> dict[str, float]:
    """The flags that an error names, with their GiB."""
    listed = text.partition(" would fit with any of these: ")[2]
    return {flags: float(gib) for flags, gib in re.findall(r"([^,(]+?) \(([\d.]+) GiB\)", listed.replace(", ", ","))}


@pytest.mark.parametrize(
    ("flags", "gib", "figures"),
    [
        ("", 75, "weights 15.0, gradients 14.9 and optimizer states 44.8 GiB are more than the 73.0 GiB"),
        ("--bf16", 60, "weights 7.5, gradients 7.5 and optimizer states 44.8 GiB"),
        ("--deepspeed none", 75, "weights 15.0, gradients 29.9 and optimizer states 29.9 GiB"),
        ("--deepspeed none --optim sgd", 45, "weights 15.0 and gradients 29.9 GiB"),
        ("--deepspeed none --optim adamw_8bit", 52, "and optimizer states 7.5 GiB"),
        ("--use_lora --bf16", 9, "weights 7.8, gradients 0.6 and optimizer states 0.6 GiB"),
        ("--use_qlora", 4, "weights 3.0, gradients 0.6 and optimizer states 0.6 GiB"),
    ],
)
def test_what_exceeds_the_memory_is_refused_and_what_may_fit_is_not(flags, gib, figures, large, tmp_path, limited):
    limited(gib - 2)
    text = refusal(large, tmp_path, *flags.split())
    assert text.startswith("training can't fit into memory: ") and figures in text
    assert "main memory, which the limit of a container or a job allows" in text
    limited(gib + 2)
    assert refusal(large, tmp_path, *flags.split()) == ""


def test_the_flags_that_are_named_fit_and_only_these(large, tmp_path, limited):
    limited(24)
    found = fitting(refusal(large, tmp_path))
    assert found.keys() == {"--use_lora", "--use_qlora"} and all(5 < gib < 0.9 * 24 for gib in found.values())
    limited(16)  # a base in fp32 is too large
    found = fitting(refusal(large, tmp_path))
    assert found.keys() == {"--use_lora --bf16", "--use_qlora"}
    for flags in found:
        assert refusal(large, tmp_path, *flags.split()) == ""
    limited(15)
    assert fitting(refusal(large, tmp_path, "--use_lora")).keys() == {"--bf16", "--use_qlora"}
    limited(3)
    assert "none of the flags that need less would make it fit; docs/hardware.md" in refusal(large, tmp_path)


def test_no_flag_is_named_that_contradicts_the_others(large, tmp_path, limited):
    limited(24)
    given = ["--freeze_vision_model", "--train_projector"]
    text = refusal(large, tmp_path, *given)
    assert "none of the flags that need less" in text
    limited(60)
    assert refusal(large, tmp_path, *given, "--bf16") == ""
    run = SimpleNamespace(deepspeed=None, bf16=False, fp16=False)
    for flags in ("", "--vision_training all", "--use_lora --train_separators", "--use_lora --vision_lr 1e-5"):
        args, _ = parse_command(script, arguments(tmp_path, tmp_path / "out", *flags.split()))
        named = {flags for flags, *_ in memory_check._changes(args, run, on_gpu=False)}
        assert "--use_qlora" in named and ("--freeze_vision_model" in named) == (not flags)
    args.vision_lr, args.adapter_folder = None, "an adapter, which says what trains"
    assert "--freeze_vision_model" not in {flags for flags, *_ in memory_check._changes(args, run, on_gpu=False)}


def test_processes_share_the_memory_of_their_node(large, tmp_path, limited, monkeypatch):
    limited(20)
    assert refusal(large, tmp_path, "--use_lora", "--bf16") == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    text = refusal(large, tmp_path, "--use_lora", "--bf16", world_size=4)
    assert "the 5.0 GiB of main memory that each of 4 processes has (20.0 GiB together)" in text


def test_what_the_process_holds_is_counted(large, tmp_path, limited, monkeypatch):
    limited(10)
    assert refusal(large, tmp_path, "--use_lora", "--bf16") == ""
    monkeypatch.undo()
    info, limit = psutil.Process().memory_info(), 9.1 * GIB
    monkeypatch.setattr(memory_check, "memory_limit", lambda: limit + info.rss - info.shared - 0.1 * GIB)
    text = refusal(large, tmp_path, "--use_lora", "--bf16")
    assert f"beside {(info.rss - info.shared) / GIB:.1f} GiB that the process holds already, are more than" in text


def test_a_gpu_and_what_is_divided_or_offloaded(large, tmp_path, limited, gpu):
    """Names of flags and numbers of GPUs with which training fits; main memory is looked at too."""
    limited(200)
    gpu(24)
    half = {"bf16": True, "fp16": False}
    text = refusal(large, tmp_path, **half)
    assert "weights 7.5, gradients 7.5 and optimizer states 44.8 GiB are more than the 24.0 GiB of this GPU;" in text
    assert {"--deepspeed ds_config/zero2_offload.json", "8 such GPUs", "--use_lora"} <= fitting(text).keys()
    assert "2 such GPUs" not in fitting(text) and "--freeze_vision_model" not in fitting(text)
    assert refusal(large, tmp_path, world_size=8, **half) == ""
    offload = ["--deepspeed", ROOT / "ds_config" / "zero2_offload.json"]
    assert refusal(large, tmp_path, *offload, **half) == ""
    limited(60)
    text = refusal(large, tmp_path, *offload, **half)
    assert "what DeepSpeed offloads 67.2 GiB is more than the 60.0 GiB of main memory" in text
    assert "--deepspeed ds_config/zero2_offload.json" not in fitting(refusal(large, tmp_path, **half))
    config = json.loads((ROOT / "ds_config" / "zero3.json").read_text())
    config["zero_optimization"] |= {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}
    assert refusal(large, tmp_path, deepspeed=config, **half) == ""
    limited(6)  # bf16 is loaded as it was saved, and fp16 is not
    assert refusal(large, tmp_path, "--use_lora", **half) == ""
    text = refusal(large, tmp_path, "--use_lora", bf16=False, fp16=True)
    assert "weights while they are loaded 7.6 GiB are more than the 6.0 GiB of main memory" in text


def test_an_evaluation_needs_weights_alone(large, limited):
    cpu = torch.device("cpu")
    limited(16.5)
    check_weights(large, torch.float32, cpu, False, False, FLAGS)
    limited(14)
    with pytest.raises(InputError, match=r"weights 15.0 GiB are more than the 14.0 .* --bf16 .* --use_qlora ") as error:
        check_weights(large, torch.float32, cpu, False, False, FLAGS)
    assert fitting(str(error.value)).keys() == {"--bf16", "--use_qlora"}
    check_weights(large, torch.float32, cpu, False, False, FLAGS, ranks=2)  # divided by ZeRO-3
    limited(4)
    check_weights(large, torch.bfloat16, cpu, False, False, FLAGS)  # pages of the file, which can be dropped
    limited(1)
    with pytest.raises(InputError, match="none of the flags that need less would make it fit"):
        check_weights(large, torch.float32, cpu, True, False, FLAGS)


def test_a_run_is_refused_before_its_weights_are_looked_for(large, toy_data, tmp_path, limited):
    """And with enough memory the same folder lacks them. --estimate and --check_data load nothing."""
    limited(60)
    real = ["--model_name_or_path", str(large)]
    with pytest.raises(InputError, match="training can't fit into memory"):
        train(toy_data, tmp_path / "a", *real)
    with pytest.raises(InputError, match="training can't fit into memory"):
        train(toy_data, tmp_path / "b", *real, "--dry_run")
    assert train(toy_data, tmp_path / "c", *real, "--estimate") is None
    limited(14)
    with pytest.raises(InputError, match="the model can't fit into memory"):
        train(toy_data, tmp_path / "d", *real, "--evaluate_only")
    limited(300)
    with pytest.raises(InputError, match="model.safetensors"):
        train(toy_data, tmp_path / "e", *real)


def test_the_plan_is_printed_before_weights_are_loaded_and_once(toy_data, tmp_path, capfd, monkeypatch):
    load_model, said = script.load_model, []

    def load(*args):
        said.append(capfd.readouterr().out)
        return load_model(*args)

    monkeypatch.setattr(script, "load_model", load)
    train(toy_data, tmp_path / "out", *SHORT)
    plan = r"^memory     .*; expected peak memory [\d.]+ of [\d.]+ GiB a process(: MAY NOT FIT)?$"
    assert len(re.findall(plan, said[0], re.MULTILINE)) == 1
    assert not re.findall(plan, capfd.readouterr().out, re.MULTILINE)


def test_a_finished_run_needs_no_memory(toy_data, tmp_path, capfd, limited):
    train(toy_data, tmp_path / "out", *SHORT, "--save_steps", "1")
    limited(0.001)
    again = [*SHORT, "--save_steps", "1", "--resume_from_checkpoint", "auto"]
    assert train(toy_data, tmp_path / "out", *again) is None
    assert "there is nothing left to do" in capfd.readouterr().out
    with pytest.raises(InputError, match="training can't fit into memory"):
        train(toy_data, tmp_path / "out", *again, "--max_steps", "3", "--resume_anyway")
