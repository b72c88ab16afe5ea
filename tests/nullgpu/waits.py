"""Trains with the script on the stand-in GPU for a few optimizer steps, and counts how often the host waits.

    python tests/nullgpu/stand_in.py tests/nullgpu/waits.py FOLDER [--mode MODE] [--trace]

FOLDER: an empty folder, for data and output. Prints as its last line JSON, which has for every mode the waits within
each micro-batch's two passes, and the waits of each optimizer step outside of them. --trace: says on stderr where the
host waits.
"""

import argparse
import json
import types
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401
from helpers import COMMON, arguments, write_toy_data
from nullgpu.stand_in import counts

import finetune_hf_trainer_ucf101 as script
from phi3v.ranks import start_alone
from phi3v.training import kernels, stopping
from phi3v.training.trainer import RecipeTrainer

STEPS = 4  # the first two are not counted: caches are filled and buffers are made then
LONG = [*COMMON[:-1], "1000"]  # --logging_steps: a step that logs must wait
# --no_fuse: Triton would keep what it compiles for the stand-in, and find it when there is a real GPU.
FLAGS = [*"--no_fuse --no_eval_before --batch_size 4 --max_grad_norm 1 --max_steps".split(), STEPS]
EACH_TWO = "--batch_size_per_gpu 2 --bf16 "
MODES = {
    "full": EACH_TWO + "--deepspeed none",  # with flash attention, which is the default here
    "full, SDPA attention": EACH_TWO + "--deepspeed none --attn_implementation sdpa",
    "full, fp16": "--batch_size_per_gpu 2 --fp16 --deepspeed none",
    "frozen": EACH_TWO + "--deepspeed none --freeze_vision_model",
    "LoRA": EACH_TWO + "--use_lora",
    "QLoRA": EACH_TWO + "--use_qlora",
    "everything recomputed": EACH_TWO + "--deepspeed none --activation_checkpointing true",
    "filled by tokens": "--max_tokens_per_gpu 900 --bf16 --deepspeed none",
    "ZeRO-2": EACH_TWO,  # the last, because afterwards accelerate would use DeepSpeed in any training of this process
}


class Done(Exception):
    """Ends a training after its last step, because nothing that it has computed is worth saving."""


def train(folder: Path, name: str, trace: bool) -> dict:
    """Trains for STEPS steps. Returns the waits in each micro-batch's forward pass, with the copies to the device
    before it; in its backward pass; and in each optimizer step outside of the two."""
    originals = {method: getattr(RecipeTrainer, method) for method in ("training_step", "_maybe_log_save_evaluate")}
    found, step = {"forward": [], "backward": [], "step": []}, {"begin": counts()["waits"], "passes": 0}

    def training_step(self, *args):
        times, backward = [counts()["waits"]], self.accelerator.backward

        def counted_backward(*args, **kwargs):
            times.append(counts()["waits"])
            backward(*args, **kwargs)

        self.accelerator.backward = counted_backward
        loss = originals["training_step"](self, *args)
        self.accelerator.backward = backward
        times.append(counts()["waits"])
        step["passes"] += times[2] - times[0]
        if self.state.global_step >= 2:
            found["forward"].append(times[1] - times[0])
            found["backward"].append(times[2] - times[1])
        return loss

    def end_of_step(self, *args, **kwargs):
        now = counts()["waits"]
        if self.state.global_step > 2:
            found["step"].append(now - step["begin"] - step["passes"])
        step.update(begin=now, passes=0)
        if self.state.global_step == STEPS:
            raise Done
        if trace and self.state.global_step == 2:
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
        return originals["_maybe_log_save_evaluate"](self, *args, **kwargs)

    RecipeTrainer.training_step, RecipeTrainer._maybe_log_save_evaluate = training_step, end_of_step
    try:
        script.main(arguments(folder, folder / name, *FLAGS, *MODES[name].split(), common=LONG))
    except Done:
        pass
    finally:
        for method, original in originals.items():
            setattr(RecipeTrainer, method, original)
        torch.cuda.set_sync_debug_mode("default")
    return found


def prepare(folder: Path):
    """Writes data, and lets this process train on the stand-in and in no other way."""
    write_toy_data(folder)
    torch.backends.cudnn.enabled = False  # it would look for a real GPU
    start_alone()
    dist.init_process_group("cpu:gloo,cuda:fake")  # NCCL would look for a real GPU; fake collectives do nothing


def train_all(folder: Path, modes=MODES, trace: bool = False) -> dict:
    """What `train` returns for each mode, after `prepare`."""
    kernels.check_attention = lambda *args: None  # it would find that nothing is computed here
    # Ranks agree about stopping, which a single rank need not do. The sum is what it is if no signal has come. It is
    # copied, because copies do happen on the stand-in.
    no_signal = torch.zeros(1, dtype=torch.long)
    stopping.dist = types.SimpleNamespace(
        is_initialized=dist.is_initialized,
        get_world_size=lambda: 2,
        all_reduce=lambda flag: flag.copy_(no_signal, non_blocking=True),
    )
    return {name: train(folder, name, trace) for name in modes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=MODES, help="only this one")
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    prepare(args.folder)
    print(json.dumps(train_all(args.folder, [args.mode] if args.mode else MODES, args.trace)))


if __name__ == "__main__":
    main()
