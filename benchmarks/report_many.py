"""The stages of gpu_report.py about several GPUs: trainings started with torchrun, over NCCL, on a CPU over gloo.

    torchrun --nproc_per_node=2 benchmarks/report_many.py SETTING.json      # how a stage starts this file

Each rank of such a training writes what it found to a file of its own.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE), str(HERE.parent)) if folder not in sys.path]
from report_parts import ROOT, Check, LeftOut, Row, Setting, at_most, must_be  # noqa: E402

# How the gradients of all ranks become one: flags of the scripts.
KINDS = {
    "ZeRO-2": [],
    "ZeRO-1": ["--deepspeed", str(ROOT / "ds_config" / "zero1.json")],
    "ZeRO-3": ["--deepspeed", str(ROOT / "ds_config" / "zero3.json")],
    "DDP": ["--deepspeed", "none"],
}
SCALED = "scaling"  # the training whose speed is measured
TOLERANCE = 1e-4  # relative difference of a loss, in fp32: sums are computed in another order
STEPS, MICRO_BATCHES, EXAMPLES = 4, 8, 2  # of the trainings whose losses are compared; micro-batches of all ranks
TORCHRUN_LIMIT = 240  # seconds for one start of torchrun


def losses(setting: Setting) -> list[Check | Row | LeftOut]:
    """The losses and weights of ZeRO-1, 2, 3 and DDP on all GPUs, against one process."""
    n = ranks(setting)
    if n < 2:
        return [LeftOut("ZeRO-2, ZeRO-1, ZeRO-3 and DDP", "there is only one GPU, and they need two or more")]
    saved, kinds = save_model(setting), list(KINDS)
    found = (
        []
        if "deepspeed" in setting.facts.get("packages", {"deepspeed": ""})
        else [LeftOut(kind, "the package deepspeed is not installed") for kind in kinds if kind != "DDP"]
    )
    kinds = kinds if not found else ["DDP"]
    reached = {"one process": [{"losses": alone(setting, saved), "weights": None}]}
    # On a CPU one start of torchrun computes all of them, because starting takes longest.
    for group in [kinds] if setting.device == "cpu" else [[kind] for kind in kinds]:
        reached |= torchrun(setting, n, group, saved)
    return found + compared(reached, n)


def compared(reached: dict[str, list[dict] | str], n: int) -> list[Check | Row]:
    """Checks that every kind has the losses of one process, and that all of its ranks agree.

    reached: for each kind what each rank found, or how its process ended. n: the number of ranks.
    """
    found, table = [], f"Losses of the same training on {n} ranks, in fp32"
    expected = reached["one process"][0]["losses"]
    for kind, by_rank in reached.items():
        if isinstance(by_rank, str):
            found.append(Check(f"{kind} on {n} ranks", "failed", "trains", False, f"{kind} did not train: {by_rank}"))
            continue
        own = by_rank[0]["losses"]
        found.append(Row(table, {"training": kind, "losses": " ".join(f"{loss:.5f}" for loss in own)}))
        if kind == "one process":
            continue
        for rank, other in enumerate(by_rank):
            if other["losses"] != own:
                wrong = f"rank {rank} of {kind} has other losses than rank 0: {other['losses']}, {own}"
                found.append(Check(f"losses of {kind}, rank {rank}", str(other["losses"]), "as rank 0", False, wrong))
            if other["weights"] != by_rank[0]["weights"]:
                wrong = f"rank {rank} of {kind} has other weights than rank 0 after training"
                found.append(Check(f"weights of {kind}, rank {rank}", "others", "as rank 0", False, wrong))
        found.append(must_be(f"ranks of {kind}", len(by_rank), n, f"{kind} ran on {len(by_rank)} ranks and not on {n}"))
        differences = [abs(a - b) / abs(b) for a, b in zip(own, expected, strict=False)]
        if len(own) != len(expected) or not all(map(math.isfinite, differences)):
            differences = [math.inf]
        worst = max(differences)
        wrong = f"{kind} on {n} ranks has other losses than one process: {own}, {expected}"
        found.append(at_most(f"losses of {kind} against one process", worst, TOLERANCE, wrong))
    return found


def scaling(setting: Setting) -> list[Check | Row | LeftOut]:
    """Images/s on one GPU and on all, of the mode that trains most of the model and fits on one; and of full
    fine-tuning on all GPUs, which the recipe's published speeds are for."""
    n = ranks(setting)
    if n < 2:
        return [LeftOut("scaling from one GPU to several", "there is only one GPU")]
    table, rates, found = "Images/s on one GPU and on all", {}, []
    for k in (1, n):
        by_rank = (
            torchrun(setting, k, [SCALED], None)[SCALED] if k > 1 or setting.device != "cpu" else [scaled(setting)]
        )
        if isinstance(by_rank, str):
            found.append(Check(f"training on {k} GPUs", "failed", "trains", False, f"it did not train: {by_rank}"))
            continue
        for mode, one in by_rank[0].items():
            rates[mode, k] = one.get("images/s")
            efficiency = None
            if rates.get((mode, 1)) and rates[mode, k]:
                efficiency = f"{rates[mode, k] / rates[mode, 1] / k:.0%}"
            found.append(Row(table, {"mode": mode, "GPUs": k, **one, "of perfect scaling": efficiency}))
    both = [mode for mode, k in rates if k == n and rates[mode, n] and rates.get((mode, 1))]
    for mode in both:
        gain = rates[mode, n] / rates[mode, 1]
        wrong = f"{mode} on {n} GPUs has {gain:.2f} times the images/s of one GPU: the other GPUs bring nothing"
        least = 1.0 if setting.device != "cpu" else 0.0  # the ranks of a CPU share its cores
        found.append(Check(f"gain of {mode} from {n} GPUs", gain, f"more than {least:g}", gain > least, wrong))
    return found


def ranks(setting: Setting) -> int:
    return 2 if setting.device == "cpu" else setting.facts["device_count"]


def save_model(setting: Setting) -> Path:
    """A small model in fp32, which every training whose losses are compared loads."""
    import torch
    from report_runs import configuration, random_model

    torch.manual_seed(0)
    folder = setting.folder / "saved"
    random_model(configuration(small(setting)), torch.float32, "cpu", "sdpa").save_pretrained(folder)
    return folder


def small(setting: Setting) -> Setting:
    return Setting(setting.device, True, setting.folder, setting.facts)


def alone(setting: Setting, saved: Path) -> list[float]:
    return one_kind(setting, "DDP", saved, 1)["losses"]


def one_kind(setting: Setting, kind: str, saved: Path, n: int) -> dict:
    """Trains the small model; returns the losses, and a sum over all weights, which ranks must have equal."""
    from report_runs import document, release_model, train

    flags = [*KINDS[kind], "--fp32", "--learning_rate", "1e-3"]
    per_rank = max(MICRO_BATCHES * ranks(setting) // n, 1)  # the same examples in a step, however many ranks there are
    options = {"steps": STEPS, "examples": EXAMPLES, "micro_batches": per_rank, "saved": saved, "keep_model": True}
    one = train(small(setting), "full", "sdpa", document(small(setting)), *flags, **options)
    total = None
    if kind != "ZeRO-3":  # which leaves each rank with a part of each weight
        total = sum(p.detach().double().abs().sum().item() for p in one.model.parameters())
    release_model(one)
    return {"losses": one.losses, "weights": total}


def scaled(setting: Setting) -> dict[str, dict]:
    """Images/s by mode, measured by each rank of a training: of what fits on one GPU, and of all that fits on these."""
    import torch
    from report_fast import best_attention, largest, missing, steps
    from report_runs import GIB, document, plan_of, train

    n, found, attention, page = int(os.environ.get("WORLD_SIZE", 1)), {}, best_attention(setting), document(setting)
    for mode in ("full", "lora"):
        if missing(setting, mode):
            continue
        plan = plan_of(setting, mode, attention, page).plan
        if plan.memory.peak > plan.budget:
            found[mode] = {"images/s": None, "MFU": f"does not fit: {plan.memory.peak / GIB:.0f} GiB are expected"}
            continue
        try:
            one = train(setting, mode, attention, page, steps=steps(setting), largest=largest(setting))
        except torch.OutOfMemoryError:
            if n > 1:
                raise  # the other ranks wait for this one
            found[mode] = {"images/s": None, "MFU": "out of memory"}
            continue
        found[mode] = {
            "images/s": one.images_per_second,
            "MFU": f"{one.mfu:.1%}",
            "peak GiB": one.memory["peak"] / GIB or None,
        }
    return found


def torchrun(setting: Setting, n: int, kinds: list[str], saved: Path | None) -> dict[str, list[dict] | str]:
    """What each rank found of each kind. A text that says how it ended, for a kind that has not been trained."""
    folder = setting.folder / f"{n} ranks, {kinds[0]}"
    folder.mkdir()
    asked = {
        "setting": asdict(setting) | {"folder": str(folder)},
        "kinds": kinds,
        "saved": saved and str(saved),
        "n": n,
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [str(Path(__file__).resolve()), str(folder / "asked.json")]
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            status = process.wait(TORCHRUN_LIMIT)
            end = f"exit status {status}"
        except subprocess.TimeoutExpired:
            end = f"it was stopped after {TORCHRUN_LIMIT} s"
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    text = log.read_text(errors="replace")
    print(text, flush=True)  # into the stage's log
    lines = [line for line in text.splitlines() if "Error" in line or line.startswith("error:")]
    why = f"{end}{'; ' + lines[0].strip()[:300] if lines else ''}"
    files = [folder / f"rank{rank}.json" for rank in range(n)]
    by_rank = [json.loads(path.read_text()) if path.exists() else {} for path in files]
    return {kind: [one[kind] for one in by_rank] if all(kind in one for one in by_rank) else why for kind in kinds}


def worker(path: str):
    """What torchrun starts: each rank trains every kind that is asked for."""
    parent = os.getppid()

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    asked = json.loads(Path(path).read_text())
    rank, shared = int(os.environ["RANK"]), Path(asked["setting"]["folder"])
    folder = shared / f"files of rank {rank}"
    folder.mkdir()
    setting, found = Setting(**asked["setting"] | {"folder": folder}), {}
    for kind in asked["kinds"]:
        saved = asked["saved"] and Path(asked["saved"])
        found[kind] = scaled(setting) if kind == SCALED else one_kind(setting, kind, saved, asked["n"])
        unfinished = shared / f"rank{rank}.unfinished"
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, shared / f"rank{rank}.json")


if __name__ == "__main__":
    worker(sys.argv[1])
    from phi3v.ranks import end_process

    end_process(0)
