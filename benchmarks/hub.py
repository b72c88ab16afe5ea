"""Runs the commands of the published recipe against a Hub on this machine: without faults, offline, with each fault.

    python benchmarks/hub.py [commands] [faults] [--code FOLDER] [--only WORDS]

Each command trains two steps of the demo's small weights on two ranks. Printed are the exit status, the seconds, the
requests of each rank, the bytes, how many files were sent twice, and for a fault also the lines and tracebacks that the
command printed. --code runs the scripts of another checkout, for a comparison; --only takes the rows with these words.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hub_repositories import CAULDRON, MODEL, OLDER_MODEL, write_repositories  # noqa: E402
from loopback_hub import Fault, LoopbackHub  # noqa: E402

SHORT = "--max_steps 2 --max_eval_samples 4 --dataloader_num_workers 1 --no-tqdm"
PROCESSES = 2
COMMANDS = {  # as in the recipe, with 2 processes and SHORT
    "docvqa": "docvqa",
    "nlvr2": "nlvr2",
    "convert": "convert",
    "ucf101": "ucf101 --data_dir CONVERTED",
    "memes, A100": "hateful_memes --batch_size 64 --use_flash_attention --bf16",
    "memes, V100": "hateful_memes --batch_size 64",
    "memes, LoRA": "hateful_memes --batch_size 64 --use_lora",
    "memes, QLoRA": "hateful_memes --batch_size 64 --use_lora --use_qlora",
    "nlvr2, best": "nlvr2 --bf16 --use_flash_attention --batch_size 64 --learning_rate 1e-5 --num_train_epochs 3",
    "docvqa, best": "docvqa --full_train --bf16 --use_flash_attention --batch_size 64 --learning_rate 5e-6",
    "docvqa, full, older": f"docvqa --full_train --bf16 --batch_size 8 --model_name_or_path {OLDER_MODEL}",
    "docvqa, estimate": "docvqa --estimate",
}
WEIGHTS, DATA = "GET /cdn/models.*model-00002", "GET /cdn/datasets.*nlvr2/train-00003"
FAULTS = {  # name: (command, whether the cache is full, faults or changes of the environment)
    "refused": ("docvqa", False, {"HF_ENDPOINT": "http://127.0.0.1:{closed}"}),
    "no such host": ("docvqa", False, {"HF_ENDPOINT": "http://no.such.host.invalid"}),
    "no answer": ("docvqa", False, Fault(".*", delay=30)),
    "reset": ("docvqa", False, Fault(".*", reset=True)),
    "TLS": ("docvqa", False, {"HF_ENDPOINT": "https://127.0.0.1:{open}"}),
    "proxy refused": ("docvqa", False, {"HF_ENDPOINT": "http://hub.test", "http_proxy": "http://127.0.0.1:{closed}"}),
    "500": ("docvqa", False, Fault(".*", status=500)),
    "503": ("docvqa", False, Fault(".*", status=503)),
    "401": ("docvqa", False, Fault(".*", status=401, code="RepoNotFound")),
    "404": ("docvqa", False, Fault(".*", status=404, code="RepoNotFound")),
    "login page": ("docvqa", False, Fault(".*", status=200, body="<html>Log in")),
    "weights cut": ("docvqa", False, Fault(WEIGHTS, cut=1000)),
    "weights refused": ("docvqa", False, Fault(WEIGHTS, reset=True)),
    "weights 500": ("docvqa", False, Fault(WEIGHTS, status=500)),
    "weights incomplete": ("docvqa", False, Fault(WEIGHTS, short=1000)),
    "weights corrupt": ("docvqa", False, Fault(WEIGHTS, corrupt=True)),
    "data cut": ("nlvr2", False, Fault(DATA, cut=1000)),
    "data 500": ("nlvr2", False, Fault(DATA, status=500)),
    "data corrupt": ("nlvr2", False, Fault(DATA, corrupt=True)),
    "429 once": ("docvqa", False, Fault("GET /api/models", status=429, headers={"Retry-After": "3"}, times=1)),
    "429 for ever": ("docvqa", False, Fault(".*", status=429, headers={"Retry-After": "2"})),
    "full cache, refused": ("docvqa", True, {"HF_ENDPOINT": "http://127.0.0.1:{closed}"}),
    "full cache, 500": ("docvqa", True, Fault(".*", status=500)),
    "full cache, 429": ("docvqa", True, Fault(".*", status=429, headers={"Retry-After": "60"})),
    "full cache, no answer": ("docvqa", True, Fault(".*", delay=30)),
    "full cache, read-only": ("docvqa", True, {"read_only": "yes"}),
    "empty cache, HF_HUB_OFFLINE": ("docvqa", False, {"HF_HUB_OFFLINE": "1"}),
    "convert, refused": ("convert", False, {"HF_ENDPOINT": "http://127.0.0.1:{closed}"}),
    "convert, cut": ("convert", False, Fault("GET /cdn", cut=1000)),
    "convert, corrupt": ("convert", False, Fault("GET /cdn", corrupt=True)),
    "convert, 429 once": (
        "convert",
        False,
        Fault("GET /api/datasets", status=429, headers={"Retry-After": "3"}, times=1),
    ),
    "convert, full cache, refused": ("convert", True, {"HF_ENDPOINT": "http://127.0.0.1:{closed}"}),
}


def command(code: Path, text: str, out: Path, converted: Path) -> list[str]:
    """The command line of a row: of a script on two ranks, or of the converter."""
    script, *flags = text.replace("CONVERTED", str(converted)).split()
    if script == "convert":
        return [sys.executable, str(code / "convert_ucf101.py"), "--out_dir", str(out)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    script = str(code / f"finetune_hf_trainer_{script}.py")
    return [*launch, script, "--output_dir", str(out), *flags, *SHORT.split()]


def run(hub: LoopbackHub, code: Path, text: str, home: Path, out: Path, converted: Path, **environment) -> dict:
    """Runs the command of a row; what it took."""
    hub.requests.clear()
    read_only = environment.pop("read_only", None)
    variables = hub.environment(home, **environment)
    variables["PYTHONPATH"] = variables["PYTHONPATH"].replace(str(ROOT), str(code))
    for name in [name for name in variables if name.startswith(("CLAUDE", "AI_AGENT"))]:
        del variables[name]
    arguments = command(code, text, out, converted)
    if read_only:
        for path in (home, *home.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        if os.geteuid() == 0:  # root may write to folders that are read-only
            arguments = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *arguments]
    start = time.perf_counter()
    done = subprocess.run(arguments, cwd=out.parent, env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    ranks = hub.by_rank()
    return {
        "status": done.returncode,
        "seconds": seconds,
        "requests": "+".join(str(ranks.get(rank, 0)) for rank in range(1 if "convert" in text else PROCESSES)),
        "bytes": sum(record["sent"] for record in hub.requests),
        "twice": sum(count > 1 for count in hub.fetched().values()),
        "lines": len(lines),
        "tracebacks": sum("Traceback (most recent" in line for line in lines),
        "said": [line for line in lines if re.match(rf"error:|.*({MODEL}|{CAULDRON}|ucf101-subset|nielsr/).*:", line)],
        "all": lines,
    }


def print_row(name: str, took: dict):
    cells = [name, took["status"], f"{took['seconds']:.0f}", took["requests"], f"{took['bytes']:,}", took["twice"]]
    print("|", " | ".join(map(str, [*cells, took["lines"], took["tracebacks"]])), "|", flush=True)


def measure_commands(hub: LoopbackHub, code: Path, folder: Path, chosen: list[str]):
    for title, environment in (("from the Hub", {}), ("once more", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        print(f"\n| {title} | status | seconds | requests by rank | bytes | sent twice | lines | tracebacks |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in chosen:
            home = folder / "homes" / name  # each command begins with an empty cache
            out = folder / title.replace(" ", "-") / name.replace(", ", "-")
            out.parent.mkdir(exist_ok=True)
            took = run(hub, code, COMMANDS[name], home, out, folder / "from-the-Hub" / "convert", **environment)
            print_row(name, took)
            for line in took["said"][:3]:
                print(f"    {line}")


def measure_faults(hub: LoopbackHub, code: Path, folder: Path, chosen: list[str]):
    print("\n| fault | status | seconds | requests by rank | bytes | sent twice | lines | tracebacks |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    full = {text: folder / f"full-{text}" for text in {FAULTS[name][0] for name in chosen if FAULTS[name][1]}}
    for text, home in full.items():
        run(hub, code, text, home, folder / f"first-{text}", folder)
    for number, name in enumerate(chosen):
        text, needs_cache, change = FAULTS[name]
        home, out = folder / f"home-{number}", folder / f"outputs-{number}" / "out"
        out.parent.mkdir()
        if needs_cache:
            shutil.copytree(full[text], home, symlinks=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports = {"closed": s.getsockname()[1], "open": hub.endpoint.rpartition(":")[2]}
        environment = {}
        hub.faults[:] = [change] if isinstance(change, Fault) else []
        if isinstance(change, dict):
            environment = {key: value.format(**ports) for key, value in change.items()}
        took = run(hub, code, text, home, out, folder, **environment)
        hub.faults.clear()
        print_row(name, took)
        for line in took["said"][:8]:
            print(f"    {line}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["commands", "faults"], help="commands, faults; default: both")
    parser.add_argument("--code", type=Path, default=ROOT, help="the checkout whose scripts run; default: this one")
    parser.add_argument("--only", nargs="*", default=[""], help="only rows that have one of these words in their name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_repositories(folder / "root")
        with LoopbackHub(folder / "root") as hub:
            for part, rows, measure in (("commands", COMMANDS, measure_commands), ("faults", FAULTS, measure_faults)):
                if part in args.parts:
                    measure(hub, args.code, folder, [row for row in rows if any(word in row for word in args.only)])


if __name__ == "__main__":
    main()
