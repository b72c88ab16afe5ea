"""Two nodes, each with its own torchrun, train the same as two processes on one node."""

import contextlib
import json
import os
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
from helpers import ROOT, arguments, environment
from safetensors.torch import load_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.training.checkpoints import damage

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


@pytest.mark.slow
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
