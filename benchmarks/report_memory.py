"""The stages of gpu_report.py about memory: what a training takes, beside what --estimate says."""

from functools import partial

import torch
from report_fast import best_attention, missing
from report_parts import Check, LeftOut, Row, Setting
from report_runs import GIB, Found, Page, document, page_of, plan_of, train

TABLE = "Memory of trainings, GiB: measured / expected"
ALLOWED = 0.1  # share of the measured peak
TERMS = {  # fields of `Memory`, and what the report calls them
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "passes": "activations and logits of forward and backward",
    "update": "optimizer step",
    "context": "GPU libraries and gaps",
}


def memory(setting: Setting, mode: str) -> list[Check | Row | LeftOut]:
    """A mode with the most and with the least activation checkpointing that fits."""
    if why := missing(setting, mode):
        return [LeftOut(mode, why)]
    page, attention, found = document_of(setting), best_attention(setting), []
    cases = {"as planned": (), "everything recomputed": ("--activation_checkpointing", "true")}
    if setting.tiny:
        del cases["as planned" if mode == "full" else "everything recomputed"]
    for name, flags in cases.items():
        plan = plan_of(setting, mode, attention, page, *flags).plan
        if plan.memory.peak > plan.budget:
            why = f"{plan.memory.peak / GIB:.0f} GiB are expected, and {plan.budget / GIB:.0f} GiB can be planned with"
            found.append(LeftOut(f"{mode}, {name}", f"it does not fit: {why}"))
            continue
        options = {"steps": 2, "largest": 4, "count_memory": True} if setting.tiny else {"steps": 3}
        try:
            one = train(setting, mode, attention, page, *flags, *small_buckets(setting, mode), **options)
        except torch.OutOfMemoryError as e:
            wrong = f"the estimate of {plan.memory} is too low: {mode}, {name}, is out of memory ({str(e)[:200]})"
            found.append(Check(f"{mode}, {name}", "out of memory", "fits", False, wrong))
            continue
        found += compared(f"{mode}, {name}", one)
    return found


full, frozen, lora, qlora = (partial(memory, mode=mode) for mode in ("full", "frozen", "lora", "qlora"))


def document_of(setting: Setting) -> Page:
    """With --tiny, with so many words that activations are not negligible beside weights."""
    return page_of(setting, (4, 4), 2509 + 400) if setting.tiny else document(setting)


def small_buckets(setting: Setting, mode: str) -> tuple[str, ...]:
    """With --tiny, a json for ZeRO-2 with buckets that fit the small model. On a CPU a bucket takes memory only as far
    as it is written to, which counting tensors does not see."""
    if not setting.tiny or mode not in ("full", "frozen"):
        return ()
    import json

    from report_parts import ROOT

    content = json.loads((ROOT / "ds_config" / "zero2.json").read_text())
    content["zero_optimization"] |= {"reduce_bucket_size": 1e5, "allgather_bucket_size": 1e5}
    path = setting.folder / "small_buckets.json"
    path.write_text(json.dumps(content))
    return ("--deepspeed", str(path))


def measured_terms(one: Found) -> dict[str, float]:
    """Bytes of each term, from the moments at which it is alone.

    Weights are what is there before the Trainer prepares them. Between two steps there are weights, optimizer and, with
    DistributedDataParallel, its buckets for gradients, which the Trainer has prepared; gradients are there when the
    optimizer's step begins. The rest of the peaks before and in that step belongs to the passes and to the step.
    """
    m, zero = one.memory, bool(one.estimate.deepspeed)
    buckets = 0 if zero else m["prepared"] - m["empty"] - m["weights"]
    standing = m["after"] - m["empty"]
    terms = {"weights": m["weights"], "gradients": m["with gradients"] - m["after"] + buckets}
    terms["optimizer"] = standing - m["weights"] - buckets
    terms["passes"], terms["update"] = m["passes peak"] - m["with gradients"], m["update peak"] - m["with gradients"]
    terms["context"] = m["outside"] + m["gaps"]
    return terms


def compared(name: str, one: Found) -> list[Check | Row]:
    """Measured terms beside the expected ones. The peak must be within ALLOWED; if it is not, the terms that are off
    are named, and so is any term that is off by as much as would be allowed for the peak."""
    expected, terms = one.plan.memory, measured_terms(one)
    context = expected.context > 0
    peak = one.memory["peak"] - one.memory["empty"] + (terms["context"] if context else 0)
    differences = {term: getattr(expected, term) - terms[term] for term in terms if context or term != "context"}
    if max(expected.passes, terms["passes"]) >= max(expected.update, terms["update"]):
        differences.pop("update")  # it lies below the peak, whatever it is
    off = sorted(differences, key=lambda term: -abs(differences[term]))
    off = [term for term in off if abs(differences[term]) > ALLOWED * peak] or off[:1]
    cells = {"training": name, "examples in a micro-batch": one.micro_batch, "recomputed": one.plan.checkpointing}
    pairs = {term: (terms[term], getattr(expected, term)) for term in terms if context or term != "context"}
    cells |= {"peak": _pair(peak, expected.peak), "difference": f"{expected.peak / peak - 1:+.1%}"}
    cells |= {TERMS[term]: _pair(*pair) for term, pair in pairs.items()}
    named = "; ".join(f"{TERMS[term]}: {_pair(*pairs[term])} GiB measured / expected" for term in off)
    wrong = f"the estimate of {name} is off by {expected.peak / peak - 1:+.0%} of the peak. Off: {named}"
    share = abs(expected.peak / peak - 1)
    largest = max(map(abs, differences.values())) / peak
    worst = f"in the estimate of {name} a term is off by {largest:.0%} of the peak: {named}"
    return [
        Row(TABLE, cells),
        Check(f"peak of {name}", share, ALLOWED, share <= ALLOWED, wrong),
        Check(f"each term of {name}, as a share of the peak", largest, ALLOWED, largest <= ALLOWED, worst),
    ]


def _pair(measured: float, expected: float) -> str:
    digits = 2 if max(measured, expected) >= GIB / 10 else 4
    return f"{measured / GIB:.{digits}f} / {expected / GIB:.{digits}f}"
