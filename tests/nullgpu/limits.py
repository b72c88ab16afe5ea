"""Trains with the script on the stand-in GPU with the default micro-batches, and records how their limit is chosen.

    python tests/nullgpu/stand_in.py tests/nullgpu/limits.py FOLDER

FOLDER: an empty folder, for data and output. Prints as its last line JSON, which has for every case of `CASES` what
`try_case` returns.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from helpers import COMMON, arguments
from nullgpu.waits import Done, prepare

import finetune_hf_trainer_ucf101 as script
from phi3v import run
from phi3v.errors import InputError
from phi3v.training import measure, micro_batches
from phi3v.training.estimate import Estimate

FLAGS = "--no_fuse --no_eval_before --batch_size 24 --max_steps 3 --deepspeed none --bf16".split()
LIMIT = 1500  # tokens for which there is memory, as the estimate says, in all cases but the first
LARGER = 1.5  # how much more another rank measures
KEPT = "--activation_checkpointing false "
CASES = {  # flags, and what is planted
    "enough memory": ("", ""),
    "little memory": (KEPT, "budget"),
    "estimate too low by 30%": (KEPT, "budget, estimate"),
    "another rank needs more": (KEPT, "budget, rank"),
    "LoRA with dropout": (KEPT + "--use_lora --lora_dropout 0.1", "budget"),
    "recomputed": ("--activation_checkpointing true", "budget"),
    "a number of examples": ("--batch_size_per_gpu 2", "budget"),
    "out of memory": (KEPT, "budget, error"),
}
passes = Estimate.passes
init, measured_passes = micro_batches.MicroBatches.__init__, measure.measured_passes


def try_case(folder: Path, name: str) -> dict:
    """Begins a training, and ends it in its first micro-batch.

    Returns `planned`, the tokens of micro-batches by the estimate alone, and `kind`, of activation checkpointing;
    `measured`, what each measurement found; `unchanged`, whether it left everything as it was; `tokens`, the limit that
    training uses, with `fullest`, the tokens of its fullest micro-batch, and `accumulation`; `room`, the bytes that the
    two passes may take; what was `said` about the limit; and perhaps the `error`.
    """
    flags, planted = CASES[name]
    found = {"measured": [], "said": []}

    def planned(self, *args):
        if "estimate" in planted:
            mock_passes = mock.patch.object(Estimate, "passes", lambda *args: 0.7 * passes(*args))
            stack.enter_context(mock_passes)
        if "budget" in planted:
            # So much that LIMIT tokens would fit without a fault in the estimate.
            estimate = micro_batches.estimate_run(args[0], args[1], args[2].sizes, args[3])
            with mock.patch.object(Estimate, "passes", passes):
                kind = "all" if "--activation_checkpointing true" in flags else "none"
                memory = estimate.memory(estimate.workload_of_tokens(LIMIT), kind)
            budget, found["room"] = memory.peak, memory.passes
            stack.enter_context(mock.patch.object(micro_batches, "device_memory", lambda: budget))
        init(self, *args)
        found["planned"], found["kind"] = self.plan.tokens, self.plan.checkpointing

    def measured(model, batch, device, dtype, kind):
        before = states(model)
        own = measured_passes(model, batch, device, dtype, kind)
        found["measured"].append({"bytes": own, "tokens": batch["input_ids"].shape[1], "kind": kind})
        found["unchanged"] = equal(before, states(model))
        return own

    def trained(self, model, inputs, *args):
        found["accumulation"], found["tokens"] = self.args.gradient_accumulation_steps, self.sampler.max_tokens
        found["fullest"] = max(map(self.sampler.tokens, self.sampler.every_micro_batch()))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.") if "error" in planted else Done

    with contextlib.ExitStack() as stack:
        for owner, attribute, value in (
            (micro_batches.MicroBatches, "__init__", planned),
            (micro_batches, "measured_passes", measured),
            (transformers.Trainer, "training_step", trained),
            (run, "say", lambda *lines: found["said"].extend(line for line in lines if line.startswith("limit"))),
            (micro_batches, "gather_object", lambda own: [*own, *(LARGER * x for x in own if "rank" in planted)]),
            (run.Run, "write_page", lambda *args: None),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        try:
            script.main(arguments(folder, folder / name, *FLAGS, *flags.split(), common=COMMON))
        except Done:
            pass
        except InputError as e:
            found["error"] = str(e)
    return found


def states(model) -> dict:
    """What a measurement must not change, on the host."""
    return {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "weights": [p.detach().cpu().clone() for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()],
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
    }


def equal(one: dict, other: dict) -> bool:
    tensors = [(one[name], other[name]) for name in ("host", "device")]
    tensors += list(zip(one["weights"], other["weights"], strict=True))
    same = all(torch.equal(a, b) for a, b in tensors)
    return same and all(one[name] == other[name] for name in ("gradients", "modes", "hooks"))


def try_all(folder: Path) -> dict:
    return {name: try_case(folder, name) for name in CASES}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    prepare(folder)
    print(json.dumps(try_all(folder), indent=1))
