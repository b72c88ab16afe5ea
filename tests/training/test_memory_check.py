"""What is refused because it can't fit into memory, before a weight is read, and what the error says would fit.

The folder `real_size` has the published model's configuration and no weights, so whatever opens them fails."""

import json
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import CHECKPOINT, ROOT, arguments, parse_command, train

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VConfig
from phi3v.errors import InputError
from phi3v.training import host_memory, memory_check
from phi3v.training.memory_check import check_training, check_weights

GIB = 2**30
FLAGS = {"bf16": "--bf16", "4 bits": "--use_qlora"}


@pytest.fixture(scope="module")
def real_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real_size")
    for path in CHECKPOINT.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    Phi3VConfig(dtype="bfloat16").save_pretrained(folder)
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


def refusal(real_size, folder, *flags, world_size=1, **of_run) -> str:
    """Why the script would be refused with these flags; an empty text if it is not."""
    args, training_args = parse_command(script, arguments(folder, folder / "out", *flags))
    known = {name: getattr(training_args, name) for name in ("deepspeed", "bf16", "fp16", "optim")} | of_run
    device = torch.device("cuda", 0) if torch.accelerator.is_available() else torch.device("cpu")
    run = SimpleNamespace(world_size=world_size, device=device, **known)
    try:
        check_training(args, run, script.choose_trained, real_size)
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
        ("", 78, "weights 15.4, gradients 15.4 and optimizer states 46.2 GiB are more than the 76.0 GiB"),
        ("--bf16", 62, "weights 7.7, gradients 7.7 and optimizer states 46.2 GiB"),
        ("--deepspeed none", 78, "weights 15.4, gradients 30.8 and optimizer states 30.8 GiB"),
        ("--deepspeed none --optim sgd", 47, "weights 15.4 and gradients 30.8 GiB"),
        ("--deepspeed none --optim adamw_8bit", 54, "and optimizer states 7.7 GiB"),
        ("--use_lora --bf16", 10, "weights 8.2, gradients 1.0 and optimizer states 1.0 GiB"),
        ("--use_qlora --bf16", 5, "weights 3.4"),
    ],
)
def test_what_exceeds_the_memory_is_refused_and_what_may_fit_is_not(flags, gib, figures, real_size, tmp_path, limited):
    limited(gib - 2)
    text = refusal(real_size, tmp_path, *flags.split())
    assert text.startswith("training can't fit into memory: ") and figures in text
    assert "main memory, which the limit of a container or a job allows" in text
    limited(gib + 2)
    assert refusal(real_size, tmp_path, *flags.split()) == ""


def test_the_flags_that_are_named_fit_and_only_these(real_size, tmp_path, limited):
    limited(24)
    found = fitting(refusal(real_size, tmp_path))
    assert found.keys() == {"--use_lora", "--use_qlora"} and all(5 < gib < 0.9 * 24 for gib in found.values())
    limited(16)  # a base in fp32 is too large
    found = fitting(refusal(real_size, tmp_path))
    assert found.keys() == {"--use_lora --bf16", "--use_qlora"}
    for flags in found:
        assert refusal(real_size, tmp_path, *flags.split()) == ""
    limited(74)
    assert {"--bf16", "--use_lora"} <= fitting(refusal(real_size, tmp_path)).keys()
    limited(3)
    assert "none of the flags that need less would make it fit; docs/hardware.md" in refusal(real_size, tmp_path)


def test_processes_share_the_memory_of_their_node(real_size, tmp_path, limited, monkeypatch):
    limited(20)
    assert refusal(real_size, tmp_path, "--use_lora", "--bf16") == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    text = refusal(real_size, tmp_path, "--use_lora", "--bf16", world_size=4)
    assert "the 5.0 GiB of main memory that each of 4 processes has (20.0 GiB together)" in text


def test_what_the_process_holds_is_counted(real_size, tmp_path, limited, monkeypatch):
    limited(11)
    assert refusal(real_size, tmp_path, "--use_lora", "--bf16") == ""
    monkeypatch.undo()
    info, limit = psutil.Process().memory_info(), 10.2 * GIB
    monkeypatch.setattr(memory_check, "memory_limit", lambda: limit + info.rss - info.shared - 0.1 * GIB)
    text = refusal(real_size, tmp_path, "--use_lora", "--bf16")
    assert f"beside {(info.rss - info.shared) / GIB:.1f} GiB that the process holds already, are more than" in text


def test_a_gpu_and_what_is_divided_or_offloaded(real_size, tmp_path, limited, gpu):
    """Names of flags and numbers of GPUs with which training fits; main memory is looked at too."""
    limited(200)
    gpu(24)
    half = {"bf16": True, "fp16": False}
    text = refusal(real_size, tmp_path, **half)
    assert "weights 7.7, gradients 7.7 and optimizer states 46.2 GiB are more than the 24.0 GiB of this GPU;" in text
    assert {"--deepspeed ds_config/zero2_offload.json", "8 such GPUs", "--use_lora"} <= fitting(text).keys()
    assert "2 such GPUs" not in fitting(text) and "--freeze_vision_model" not in fitting(text)
    assert refusal(real_size, tmp_path, world_size=8, **half) == ""
    offload = ["--deepspeed", ROOT / "ds_config" / "zero2_offload.json"]
    assert refusal(real_size, tmp_path, *offload, **half) == ""
    limited(60)
    text = refusal(real_size, tmp_path, *offload, **half)
    assert "what DeepSpeed offloads 69.3 GiB is more than the 60.0 GiB of main memory" in text
    assert "--deepspeed ds_config/zero2_offload.json" not in fitting(refusal(real_size, tmp_path, **half))
    config = json.loads((ROOT / "ds_config" / "zero3.json").read_text())
    config["zero_optimization"] |= {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}
    assert refusal(real_size, tmp_path, deepspeed=config, **half) == ""
    limited(12)  # bf16 is loaded as it was saved, and fp16 is not
    assert "weights while they are loaded 8.2 GiB" not in refusal(real_size, tmp_path, "--use_lora", **half)
    limited(6)
    assert refusal(real_size, tmp_path, "--use_lora", **half) == ""
    text = refusal(real_size, tmp_path, "--use_lora", bf16=False, fp16=True)
    assert "weights while they are loaded 8.2 GiB are more than the 6.0 GiB of main memory" in text


def test_an_evaluation_needs_weights_alone(real_size, limited):
    cpu = torch.device("cpu")
    limited(16.5)
    check_weights(real_size, torch.float32, cpu, False, False, FLAGS)
    limited(14)
    with pytest.raises(InputError, match=r"weights 15.4 GiB are more than the 14.0 .* --bf16 .* --use_qlora ") as error:
        check_weights(real_size, torch.float32, cpu, False, False, FLAGS)
    assert fitting(str(error.value)).keys() == {"--bf16", "--use_qlora"}
    check_weights(real_size, torch.float32, cpu, False, False, FLAGS, ranks=2)  # divided by ZeRO-3
    limited(4)
    check_weights(real_size, torch.bfloat16, cpu, False, False, FLAGS)  # pages of the file, which can be dropped
    limited(1)
    with pytest.raises(InputError, match="none of the flags that need less would make it fit"):
        check_weights(real_size, torch.float32, cpu, True, False, FLAGS)


def test_a_run_is_refused_before_its_weights_are_looked_for(real_size, toy_data, tmp_path, limited):
    """And with enough memory the same folder lacks them. --estimate and --check_data load nothing."""
    limited(60)
    real = ["--model_name_or_path", str(real_size)]
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
