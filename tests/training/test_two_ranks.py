"""Two ranks train as one process does, and agree about what they do.

The fixture `ranks` is one launch of torchrun, which these tests share. Starts and ends of processes have launches of
their own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from helpers import (
    CHECKPOINT,
    RESUMABLE,
    ROOT,
    SHORT,
    SIX_STEPS,
    arguments,
    assert_same_run,
    digest_of_weights,
    environment,
    loss_by_hand,
    start_training,
    train_losses,
    wait_for_checkpoint,
    write_written_data,
)
from safetensors.torch import load_file
from two_ranks import LAUNCH_TWO_RANKS, TwoRanks

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import ConversationDataset
from phi3v.training.checkpoints import damage
from phi3v.training.evaluation import generate_answers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(toy_data, tmp_path_factory):
    """Two ranks, on which tests train one after another: ranks.train(*flags). The first command that they run is that
    of `zero3_evaluation`, because it must run in new processes."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = ["--evaluate_only", "--fp32", "--deepspeed", ROOT / "ds_config" / "zero3.json"]
    with TwoRanks(folder, environment()) as ranks:
        out = folder / "zero3_evaluation"
        ranks.zero3_evaluation = ranks.train(*arguments(toy_data, out, *flags)), out
        ranks.said_at_first = ranks.log.read_text()
        yield ranks


def test_evaluation_alone_runs_under_zero_3(ranks):
    """ZeRO-3 splits the model while it loads, so the process group must exist before."""
    found, out = ranks.zero3_evaluation
    assert found == [{"already_joined": False}] * 2
    assert json.loads((out / "evaluation-val.json").read_text())["num_examples"] == 6


# ---- One training

# What a run prints, without bars: the example, the plan, evaluations, logged losses, the end, and long phases.
OURS = re.compile(
    r"example .*|  .*|(trains|data|steps|optimizer|memory|attention|output|MFU) {2,}.*|warning: .*|"
    r".*/eval(uation-val|_before|_after)\.json: accuracy .*|\{'.*\}|accuracy .* -> .*; the model, .*|[a-z, ]+: \d+ s|"
)


def test_a_good_run_prints_nothing_but_its_own_lines(ranks, toy_data, tmp_path):
    """From the start of torchrun to the end of a training in each mode, on both ranks and both streams."""
    begin = len(ranks.log.read_text())
    flags = ["--max_steps", "2", "--batch_size", "4", "--learning_rate", "1e-3", "--save_steps", "1"]
    for mode, engine in (("--freeze_vision_model", "DeepSpeedEngine"), ("--use_lora", None), ("--use_qlora", None)):
        first, _ = ranks.train(*arguments(toy_data, tmp_path / mode, *flags, mode))
        assert engine in (None, first["engine"])
    said = ranks.said_at_first + ranks.log.read_text()[begin:]
    assert said.count("eval_after.json") == said.count("example ") == 3
    assert [line for line in re.split(r"[\n\r]", said) if not OURS.fullmatch(line)] == []


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_two_ranks_under_deepspeed_are_one_training(config, ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "1", "--deepspeed", ROOT / "ds_config" / f"{config}.json"]
    flags += ["--per_device_eval_batch_size", "1"]  # ZeRO-3 waits for ever if text and images make ranks differ
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first["losses"] == second["losses"] and first["engine"] == "DeepSpeedEngine"
    assert first == second or config == "zero3"  # where each rank keeps its own part of the weights
    # Six steps of two micro-batches. ZeRO-1 sends gradients once a step.
    assert first["gradients_sent"] == {"zero1": 6, "zero2": 12}.get(config, first["gradients_sent"])
    assert_same_run(first["losses"], tmp_path / "out", one_process)


def test_two_ranks_without_deepspeed_are_one_training(ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "2", "--deepspeed", "none"]
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first == second and first["engine"] == "DistributedDataParallel"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


WHOLE_PARTS = {
    "vision alone": ("--vision_training all", "DeepSpeedEngine"),  # ZeRO-2, as by default
    "adapters and the whole vision model": (
        "--use_lora --lora_rank 4 --vision_training all --vision_lr 0.05 --projector_lr 0.05",
        "DistributedDataParallel",
    ),
}


@pytest.mark.parametrize("mode", WHOLE_PARTS)
def test_two_ranks_that_train_whole_parts_are_one_training(mode, ranks, toy_data, tmp_path):
    flags, engine = WHOLE_PARTS[mode]
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "1", *flags.split()]
    first, second = ranks.train(*arguments(toy_data, tmp_path / "two", *flags))
    assert first == second and first["engine"] == engine
    assert first["losses"] == pytest.approx(
        train_losses(toy_data, tmp_path / "one", *flags, "--deepspeed", "none"), rel=1e-5
    )
    for path in (tmp_path / "one").glob("*.safetensors"):
        found = load_file(tmp_path / "two" / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_two_ranks_learn_the_answers_that_are_chosen(ranks, made_once, tmp_path):
    data = made_once("written", write_written_data)
    flags = "--max_steps 1 --batch_size 4 --batch_size_per_gpu 2 --deepspeed none --no_eval_before --loss_on last"
    first, second = ranks.train(*arguments(data, tmp_path / "out", *flags.split()))
    assert first["losses"] == second["losses"] == [pytest.approx(loss_by_hand(data, "last"), rel=1e-6)]


def test_two_ranks_with_micro_batches_filled_by_tokens_are_one_training(ranks, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--max_tokens_per_gpu", "900", "--deepspeed", ROOT / "ds_config" / "zero2.json"]
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert first == second and first["engine"] == "DeepSpeedEngine"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


@pytest.mark.parametrize("config", ["none", "zero3"])
def test_two_ranks_find_the_validation_loss_of_one_process(config, ranks, toy_data, tmp_path):
    """Of five examples, so that one rank has fewer than the other."""
    one = "none" if config == "none" else ROOT / "ds_config" / f"{config}.json"
    flags = [
        *SIX_STEPS,
        "--max_steps",
        "2",
        "--eval_steps",
        "1",
        "--max_eval_samples",
        "5",
        "--early_stopping_patience",
    ]
    flags += ["1", "--early_stopping_on", "loss", "--per_device_eval_batch_size", "1", "--deepspeed", one]
    found = ranks.train(*arguments(toy_data, tmp_path / "out", *flags))
    assert "losses" in found[0] and found[0]["losses"] == found[1]["losses"]
    report = json.loads((tmp_path / "out" / "eval_after.json").read_text())
    only = ["--evaluate_only", "--fp32", "--max_eval_samples", "5", "--model_name_or_path", tmp_path / "out"]
    script.main(arguments(toy_data, tmp_path / "e", *only))  # in one process
    alone = json.loads((tmp_path / "e" / "evaluation-val.json").read_text())
    assert alone["loss"] == pytest.approx(report["loss"], rel=1e-6)
    assert (alone["loss_tokens"], alone["loss_examples"]) == (report["loss_tokens"], report["loss_examples"])
    assert report["loss_examples"] == 5


def test_a_whole_run_with_frozen_vision_in_bf16(ranks, toy_data, tmp_path):
    flags = "--freeze_vision_model --bf16 --num_train_epochs 2 --batch_size 8 --batch_size_per_gpu 2".split()
    first, second = ranks.train(*arguments(toy_data, tmp_path / "out", *flags, "--learning_rate", "1e-2"))
    assert first == second and len(first["losses"]) == 6
    out = tmp_path / "out"
    saved, base = load_file(out / "model.safetensors"), load_file(CHECKPOINT / "model.safetensors")
    assert saved.keys() == base.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        same = torch.equal(tensor, base[name].bfloat16())
        assert same == ("vision_embed_tokens" in name), name

    reports = [json.loads((out / f"eval_{when}.json").read_text()) for when in ("before", "after")]
    for report in reports:
        assert report["metric"] == "accuracy" and report["num_examples"] == len(report["predictions"]) == 6
        assert report["accuracy"] == sum(row["score"] for row in report["predictions"]) / 6
        assert [row["id"] for row in report["predictions"]] == [f"val-{i}" for i in range(6)]
    # What was saved is what was evaluated: it gives the reported answers again.
    model, processor = Phi3VForCausalLM.from_pretrained(out), Phi3VProcessor.from_pretrained(out)
    assert processor.image_processor.num_crops == 4
    conversations = read_conversations(toy_data / "ucf101_val.jsonl", toy_data / "images")
    data = ConversationDataset(conversations, processor, for_generation=True)
    answers = generate_answers(model, processor, data, 8, 8, compute_dtype=torch.bfloat16, disable_tqdm=True)
    assert answers == [row["prediction"] for row in reports[1]["predictions"]]


# ---- Ranks that were not started alike


@pytest.mark.parametrize(
    "odd, said",
    [
        (["--no_eval_before"], "processes 0 and 1 were started with different flags: no_eval_before: false, true"),
        (["--data_dir", "OTHER"], "processes 0 and 1 have different data (24 and 20 examples)"),
    ],
)
def test_ranks_with_different_flags_or_data_end_at_once(ranks, toy_data, tmp_path, odd, said):
    other = tmp_path / "other"
    shutil.copytree(toy_data, other)
    lines = (other / "ucf101_train.jsonl").read_text().splitlines(keepends=True)
    (other / "ucf101_train.jsonl").write_text("".join(lines[:20]))
    odd = [str(other) if flag == "OTHER" else flag for flag in odd]
    found = ranks.train(*arguments(toy_data, tmp_path / "out", *SHORT, "--batch_size_per_gpu", "2"), odd=odd)
    assert [said in rank["error"] for rank in found] == [True, True], found


# ---- A rank that is killed


def test_torchrun_restarts_and_the_training_resumes_after_a_rank_was_killed(ranks, toy_data, tmp_path):
    """Kills one of two ranks under ZeRO-2. After torchrun's restart the training resumes from the newest checkpoint."""
    flags = ["--data_dir", toy_data, "--batch_size_per_gpu", "1", "--save_total_limit", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    ranks.train(*RESUMABLE, *flags, "--output_dir", whole)
    process = start_training([*LAUNCH_TWO_RANKS, "--max-restarts=1"], *flags, "--output_dir", out)
    wait_for_checkpoint(process, out)
    (victim,) = [pid for pid, environment in descendants(process.pid) if "LOCAL_RANK=1" in environment]
    os.kill(victim, signal.SIGKILL)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]
    assert "resuming from" in output and digest_of_weights(out) == digest_of_weights(whole)
    curves = []
    for folder in (whole, out):
        history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        curves.append([(entry["step"], entry["loss"]) for entry in history if "loss" in entry])
    assert curves[0] == curves[1] and [step for step, _ in curves[1]] == list(range(1, 13))
    assert len(list(out.glob("checkpoint-*"))) == 2 and not (out / "unfinished").exists()


def descendants(parent: int) -> list[tuple[int, list[str]]]:
    """The training processes that a torchrun has started, with their environments."""
    import psutil

    found = []
    for child in psutil.Process(parent).children():
        found.append((child.pid, [f"{k}={v}" for k, v in child.environ().items()]))
    return found


# ---- Two nodes

FLAGS = "--max_steps 6 --batch_size 4 --learning_rate 1e-3 --save_steps 3 --per_device_eval_batch_size 2".split()
STEPS = 6
# Trains, and writes a file with what this rank has found.
DRIVER = """
import json, os, pathlib, sys
from phi3v.errors import exit_on_input_error
from two_ranks import train_and_report

def run():
    found = train_and_report("finetune_hf_trainer_ucf101", sys.argv[1:])
    pathlib.Path(__file__).with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit("failure" in found)

exit_on_input_error(run)
"""


@dataclass
class Host:
    address: str
    interface: str
    enter: list[str] = field(default_factory=list)  # what comes before a command that is to run there


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces joined by a cable, each with nothing else; or two loopback addresses, where a user may
    not make namespaces."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = joined_namespaces(stack)
        except (OSError, subprocess.SubprocessError):
            hosts = [Host("127.0.0.2", "lo"), Host("127.0.0.3", "lo")]
        yield hosts


def joined_namespaces(stack: contextlib.ExitStack) -> list[Host]:
    def hold(command):
        """Starts a process in new namespaces. The namespaces live until the process reads the end of its input."""
        command = [*command, "sh", "-c", "echo made && exec cat"]
        process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(process.stdin.close)
        if process.stdout.readline() != b"made\n":
            raise OSError("no namespace")
        return process.pid

    def enter(pid):
        return ["nsenter", f"--target={pid}", "--user", "--preserve-credentials", "--net"]

    def ip(pid, arguments):
        subprocess.run([*enter(pid), "ip", *arguments.split()], check=True)

    first = hold(["unshare", "--user", "--map-root-user", "--net"])
    second = hold([*enter(first), "unshare", "--net"])
    ip(first, f"link add cable type veth peer name cable netns {second}")
    hosts = []
    for pid, address in ((first, "10.0.0.1"), (second, "10.0.0.2")):
        ip(pid, "link set lo up")
        ip(pid, f"address add {address}/24 dev cable")
        ip(pid, "link set cable up")
        hosts.append(Host(address, "cable", enter(pid)))
    return hosts


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def run_nodes(hosts, program: Path, *flags):
    """Runs torchrun on each host, as the documentation says. Leaves no process behind, whatever happens."""
    port = free_port("127.0.0.1" if hosts[0].enter else hosts[0].address)
    running, logs = [], [program.with_name(f"node{rank}.log") for rank in (0, 1)]

    def output():
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())

    try:
        for rank, host in enumerate(hosts):
            command = [*host.enter, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}"]
            command += ["--nproc_per_node=1", f"--master_addr={hosts[0].address}", f"--master_port={port}", program]
            env = environment(GLOO_SOCKET_IFNAME=host.interface)
            env["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
            with open(logs[rank], "w") as log:
                # What a node has written is told by its permissions: only node 0 lets a group read.
                umask = 0o077 if rank else 0o022
                running.append(
                    subprocess.Popen(list(map(str, [*command, *flags])), env=env, stdout=log, stderr=log, umask=umask)
                )
        end = time.monotonic() + 900
        while any(process.poll() is None for process in running):
            assert not any(process.poll() for process in running), output()
            assert time.monotonic() < end, f"no end in 900 s\n{output()}"
            time.sleep(0.1)
        assert [process.returncode for process in running] == [0, 0], output()
    finally:
        kill(program)
        for process in running:
            process.wait()


def kill(program: Path):
    """Kills the processes that run `program`. They have their own sessions and would outlive a killed torchrun."""
    for process in psutil.process_iter(["cmdline"]):
        if str(program) in (process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_two_nodes_are_one_training(ranks, toy_data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    out = tmp_path / "out"
    with two_hosts() as hosts:
        run_nodes(hosts, tmp_path / "driver.py", *arguments(toy_data, out, *FLAGS))
    expected_out = tmp_path / "one_node"
    expected, _ = ranks.train(*arguments(toy_data, expected_out, *FLAGS))
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert first == second and first["engine"] == "DeepSpeedEngine"
    assert len(first["losses"]) == STEPS and first["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    weights, expected_weights = load_file(out / "model.safetensors"), load_file(expected_out / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-8)
    for when in ("before", "after"):
        report = json.loads((out / f"eval_{when}.json").read_text())
        assert report["num_examples"] == 6 and report == json.loads((expected_out / f"eval_{when}.json").read_text())
    Phi3VForCausalLM.from_pretrained(out), Phi3VProcessor.from_pretrained(out)
    # A checkpoint of two nodes is also one of one node with two processes.
    assert json.loads((out / "finished.json").read_text()) == json.loads((expected_out / "finished.json").read_text())
    assert damage(out / "checkpoint-3") is None

    # Node 0 writes everything but node 1's share of the optimizer's state, and its random numbers.
    # (Weights get permissions of their own, from safetensors.)
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    from_node_1 = {str(path.relative_to(out)) for path in files if not path.stat().st_mode & stat.S_IRGRP}
    own = ("rng_state_1.pth", "global_step{0}/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert from_node_1 == {f"checkpoint-{n}/{name.format(n)}" for n in (3, 6) for name in own}
    assert {path.relative_to(out) for path in out.rglob("*")} == {
        path.relative_to(expected_out) for path in expected_out.rglob("*")
    }
