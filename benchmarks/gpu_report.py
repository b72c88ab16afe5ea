"""Proves on the machine that it runs on what the documentation says: results, speed, memory, several GPUs.

    make gpu-report                                     # or, with any Python that has the packages:
    python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --stages right,memory --minutes 10
    python benchmarks/gpu_report.py --device cpu --tiny # tries the program without a GPU
    python benchmarks/gpu_report.py --list              # the stages, and what each proves

It needs no network, no weights and no data: models have random weights, of the real size unless --tiny is given. Each
stage is a process of its own with a time limit. Results are kept in OUTPUT_DIR/results.json: started again, the command
runs only what has not passed yet. At the end it writes OUTPUT_DIR/report.md, which holds nothing private.

Exit status: 0 if all checks that ran passed, 1 if not, 2 for a request that can't be met.
"""

import argparse
import contextlib
import datetime
import getpass
import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [
    folder for folder in map(str, (Path(__file__).parent, Path(__file__).parents[1])) if folder not in sys.path
]
from report_machine import NotHere, code, find_facts  # noqa: E402
from report_page import page, problems_of  # noqa: E402
from report_parts import ROOT, Check, LeftOut, Row, Setting, Stage, lacks, without_private  # noqa: E402
from report_plan import GROUPS, STAGES  # noqa: E402

KINDS = {kind.__name__: kind for kind in (Check, Row, LeftOut)}
TOKEN = "PHI3V_REPORT_STAGE"  # an environment variable by which the processes of a stage are found
MACHINE_LIMIT = 5  # minutes for importing torch and looking at the device


class Unusable(Exception):
    """The request can't be met; the text is one line."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="the device's type as torch names it; default: the accelerator")
    parser.add_argument("--tiny", action="store_true", help="small models, which a CPU can compute")
    parser.add_argument("--stages", help=f"only these, with commas between: groups ({', '.join(GROUPS)}) or stages")
    parser.add_argument("--minutes", type=float, help="leave out the least important stages that do not fit into this")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "gpu-report")
    parser.add_argument("--list", action="store_true", help="print the stages and what each proves")
    for internal in ("--stage", "--stage_folder", "--facts"):  # for the process of one stage
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.chosen = chosen(args.stages)
    if args.device == "cpu" and not args.tiny:
        raise Unusable("a model of the real size takes hours on a CPU: add --tiny")
    if args.minutes is not None and not args.minutes > 0:
        raise Unusable(f"--minutes {args.minutes:g} must be more than 0")
    return args


def chosen(asked: str | None) -> list[Stage]:
    """The stages that --stages names, the most important first."""
    names = [name.strip() for name in asked.split(",") if name.strip()] if asked is not None else list(GROUPS)
    known = {*GROUPS, *(stage.name for stage in STAGES)}
    if unknown := [name for name in names if name not in known]:
        raise Unusable(
            f"--stages {unknown[0]} is unknown: choose from {', '.join([*GROUPS, *(s.name for s in STAGES)])}"
        )
    if not names:
        raise Unusable("--stages names no stage")
    found = [stage for stage in STAGES if stage.name in names or stage.group in names]
    return sorted(found, key=lambda stage: stage.importance)


# ---- The process of one stage


def run_stage(name: str, setting: Setting) -> list[Check | Row | LeftOut]:
    """What a stage returns, computed in this process."""
    stage = next(stage for stage in STAGES if stage.name == name)
    module, _, function = stage.function.partition(":")
    return getattr(importlib.import_module(module), function)(setting)


def stage_process(args: argparse.Namespace) -> int:
    """Runs one stage, or finds the facts about the machine, and writes the result into its folder."""
    _end_with_parent()
    folder = Path(args.stage_folder)
    try:
        if args.stage == "machine":
            result = {"facts": find_facts(args.device)}
        else:
            own = folder / "files"
            own.mkdir(exist_ok=True)
            found = run_stage(args.stage, Setting(args.device, args.tiny, own, json.loads(args.facts)))
            result = {"found": [{"kind": type(x).__name__, **asdict(x)} for x in found]}
    except NotHere as e:
        result = {"not_here": str(e)}
    except Exception as e:
        traceback.print_exc()
        result = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}
    _write_json(folder / "result.json", result)
    return 0


def _end_with_parent():
    """Ends this process and all that it has started when the report's process is gone, even if it was killed."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        end_all(os.getpid(), os.environ.get(TOKEN))

    if os.getpgid(0) == os.getpid():  # a group of its own
        threading.Thread(target=watch, daemon=True).start()


# ---- The report's process


def start(args: argparse.Namespace, name: str, facts: dict, minutes: float, log: Path) -> dict:
    """Runs a stage in a process of its own: its result, or `error` that says how it ended without one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--stage_folder", folder]
        command += ["--facts", json.dumps(facts), *(["--tiny"] if args.tiny else [])]
        command += ["--device", facts.get("device") or args.device] if facts.get("device") or args.device else []
        token = secrets.token_hex(8)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", TOKEN: token}
        if args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing a stage calls chooses the GPU
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
            try:
                process.wait(minutes * 60)
            except subprocess.TimeoutExpired:
                return {"error": f"it was stopped after its time limit of {minutes:.1f} minutes"}
            finally:
                end_all(process.pid, token)
                process.wait()
        try:
            return json.loads((Path(folder) / "result.json").read_text())
        except (OSError, ValueError):
            status = process.returncode
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            return {"error": f"its process ended with {how} before it had a result"}


def end_all(pid: int, token: str | None):
    """Kills what is left of a stage: the group of its process, and all that has the token in its environment, because
    what torchrun starts is in other groups. If this process is the stage's own, it is the last."""
    if pid != os.getpid():
        _kill(os.killpg, pid)
    own = f"{TOKEN}={token}".encode()
    for folder in Path("/proc").glob("[0-9]*") if token else ():
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and own in (folder / "environ").read_bytes().split(b"\0"):
                _kill(os.kill, int(folder.name))
    if pid == os.getpid():
        _kill(os.killpg, pid)


def _kill(send, pid: int):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        send(pid, signal.SIGKILL)


def _write_json(path: Path, content):
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def _private_words() -> tuple[str, ...]:
    """Words that must not be in the report: the names of this host and of the user."""
    found = {socket.gethostname()}
    with contextlib.suppress(Exception):
        found.add(getpass.getuser())
    common = {"localhost", "root", "user", "ubuntu", "runner"}  # these say nothing, and are ordinary words
    return tuple(word for word in found if len(word) > 2 and word not in common)


def _public(content, words):
    """The same content, with `without_private` applied to every text in it."""
    if isinstance(content, str):
        return without_private(content, words)
    if isinstance(content, dict):
        return {_public(k, words): _public(v, words) for k, v in content.items()}
    return [_public(x, words) for x in content] if isinstance(content, list) else content


def passed(result: dict) -> bool:
    """Whether a stage has ended, and all of its checks passed."""
    return result["status"] == "done" and not problems_of(result)


def earlier(path: Path, key: dict) -> dict:
    """The results by stage that an earlier run left for the same code, machine and settings."""
    try:
        content = json.loads(path.read_text())
        return content["stages"] if content["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run(args: argparse.Namespace) -> int:
    began, words = time.monotonic(), _private_words()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, logs = args.output_dir / "results.json", args.output_dir / "logs"
    found = start(args, "machine", {}, MACHINE_LIMIT, logs / "machine.log")
    if "facts" not in found:
        reason = found.get("not_here") or f"this Python can't say what machine this is ({found['error']})"
        raise Unusable(without_private(reason, words))
    facts = found["facts"]
    if facts["device"] == "cpu" and not args.tiny:
        raise Unusable("a model of the real size takes hours on a CPU: add --tiny")
    key = _public({"code": code(), "machine": facts, "tiny": args.tiny}, words)
    stages = earlier(path, key)
    command = "python benchmarks/gpu_report.py" + "".join(
        f" --{name} {value}" if value is not True else f" --{name}"
        for name in ("device", "tiny", "stages", "minutes")
        if (value := getattr(args, name)) not in (None, False)
    )
    report = {"key": key, "command": without_private(command, words), "stages": stages}

    def keep(stage: Stage, **result):
        stages[stage.name] = _public(result, words)
        _write_json(path, report)

    print(f"{facts['device_name']}; results in {args.output_dir}", flush=True)
    for stage in STAGES:
        if stage not in args.chosen and stage.name not in stages:
            stages[stage.name] = {"status": "left out", "why": "it is not among --stages"}
    try:
        for number, stage in enumerate(args.chosen, 1):
            head = f"[{number}/{len(args.chosen)}] {stage.group}/{stage.name}"
            if stage.name in stages and passed(stages[stage.name]):
                print(f"{head}: passed in an earlier run", flush=True)
                continue
            left = args.minutes - (time.monotonic() - began) / 60 if args.minutes else float("inf")
            if what := lacks(stage.needs, facts):
                keep(stage, status="left out", why=f"it needs {what}")
            elif left < stage.expected(args.tiny):
                why = f"it takes about {stage.expected(args.tiny):g} minutes, which --minutes did not leave"
                keep(stage, status="left out", why=why)
            else:
                print(f"{head}: {stage.proves}", flush=True)
                keep(stage, status="failed", why="the report was stopped while it ran", found=[], seconds=None)
                started = time.monotonic()
                limit = min(stage.limit(args.tiny), left)
                result = start(args, stage.name, facts, limit, logs / f"{stage.name}.log")
                seconds = round(time.monotonic() - started, 1)
                today = datetime.date.today().isoformat()
                status = {"status": "failed", "why": result["error"]} if "error" in result else {"status": "done"}
                keep(stage, **status, found=result.get("found", []), seconds=seconds, date=today)
            _say(head, stages[stage.name])
    finally:
        report |= {"minutes": round((time.monotonic() - began) / 60, 1), "date": datetime.date.today().isoformat()}
        _write_json(path, report)
        unfinished = args.output_dir / "report.md.unfinished"
        unfinished.write_text(page(report))
        os.replace(unfinished, args.output_dir / "report.md")
    results = [stages[stage.name] for stage in args.chosen]
    ran = [result for result in results if result["status"] != "left out"]
    wrong = [result for result in ran if not passed(result)]
    print(f"{args.output_dir / 'report.md'}: {len(ran)} stages ran, {len(wrong)} of them found something wrong")
    return 0 if ran and not wrong else 1


def _say(head: str, result: dict):
    if result["status"] == "left out":
        print(f"{head}: left out, because {result['why']}", flush=True)
        return
    checks = [x for x in result["found"] if x["kind"] == "Check"]
    print(
        f"{head}: {sum(c['passed'] for c in checks)} of {len(checks)} checks passed, {result['seconds']} s", flush=True
    )
    for line in problems_of(result):
        print(f"    WRONG: {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.list:
            for stage in STAGES:
                print(f"{stage.group}/{stage.name} ({stage.minutes:g} min): {stage.proves}")
            return 0
        if args.stage:
            return stage_process(args)
        with _alone(args.output_dir):
            return run(args)
    except Unusable as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _alone(folder: Path):
    """Raises Unusable if another report is being written in this folder."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as e:
        raise Unusable(f"--output_dir {folder} can't be written ({e.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unusable(f"another report is being written in {folder}") from None
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: started again, the report goes on with what has not passed yet")
