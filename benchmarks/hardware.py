"""Tables of what fits on common GPUs and how fast it would be, by the estimate of --estimate. Nothing is measured.

    python benchmarks/hardware.py [--model_name_or_path FOLDER]

Only the model's config and tokenizer are read. An example is a page of 1700x2200 pixels at 16 crops with a question and
a short answer; a step has 64 examples. For each GPU and mode, the tables show what `--max_tokens_per_gpu auto` would
choose: how many examples a micro-batch has, what activation checkpointing computes again, and the images/s of all GPUs
together at the assumed fraction of their peak.
"""

import argparse
import contextlib
import logging
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints lines when it is imported
    import finetune_hf_trainer_docvqa as docvqa
    from phi3v import Phi3VProcessor
    from phi3v.arguments import parse_arguments
    from phi3v.data.conversations import ConversationDataset
    from phi3v.data.sizes import Size
    from phi3v.training.estimate import ASSUMED_MFU, Estimate
    from phi3v.training.hardware import GPUS, USABLE_SHARE, published_peak
    from phi3v.training.outline import estimate_run

QUESTION = "What is the total amount that is to be paid according to the second row of the table on this page?"
ANSWER = "$1,234.50"
BATCH_SIZE = 64
MODES = {
    "full": [],
    "ZeRO-1": ["--deepspeed", str(ROOT / "ds_config" / "zero1.json")],
    "offload": ["--deepspeed", str(ROOT / "ds_config" / "zero2_offload.json")],
    "ZeRO-3": ["--deepspeed", str(ROOT / "ds_config" / "zero3.json")],
    "frozen vision": ["--freeze_vision_model"],
    "LoRA": ["--use_lora"],
    "QLoRA": ["--use_qlora"],
}
BEFORE_AMPERE = ("V100", "RTX 8000")  # these have neither bf16 nor flash attention
# Columns of each table: (number of GPUs, mode). Offload is not repeated for 2 and 4 GPUs: it divides nothing between
# them, so that n GPUs are n times as fast as one. On one GPU, ZeRO-1 saves nothing.
TABLES = [
    [(1, mode) for mode in MODES if mode != "ZeRO-1"]
    + [(n, mode) for n in (2, 4) for mode in ("full", "ZeRO-1", "ZeRO-3")],
    [(8, mode) for mode in MODES],
]


def example_size(model: str) -> Size:
    processor = Phi3VProcessor.from_pretrained(model, num_crops=16)
    turn = {"images": [Image.new("RGB", (1700, 2200))], "user": docvqa.prompt(QUESTION), "assistant": ANSWER}
    return ConversationDataset([{"id": "page", "conversations": [turn]}], processor).size(0)


def estimate(model: str, flags: list[str], gpus: int, size: Size) -> Estimate:
    argv = ["--model_name_or_path", model, "--estimate", "--estimate_gpus", str(gpus), "--batch_size", str(BATCH_SIZE)]
    recipe = docvqa.RecipeArguments, docvqa.TRAINING, docvqa.PRESETS, docvqa.__doc__
    return estimate_run(*parse_arguments(*recipe, argv + flags), [size], docvqa.choose_trained)


def cell(found: Estimate, gpu: str) -> str:
    plan = found.plan_to_fill(BATCH_SIZE, "auto", None, USABLE_SHARE * GPUS[gpu] * 2**30)
    if plan.memory.peak > plan.budget:
        return "–"
    rate = found.examples_per_second(plan.checkpointing, published_peak(gpu))
    return f"{plan.tokens // found.sizes[0].tokens}, {plan.checkpointing}: {rate:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="microsoft/Phi-3.5-vision-instruct")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    size = example_size(args.model_name_or_path)
    print(
        f"One page: {size.tokens:,} tokens, {size.crops} crops, {size.targets} supervised tokens. {ASSUMED_MFU:.0%} of "
        f"the peak is assumed, {USABLE_SHARE:.0%} of the memory is planned with."
    )
    for columns in TABLES:
        estimates = [estimate(args.model_name_or_path, MODES[mode], gpus, size) for gpus, mode in columns]
        print("\n| | " + " | ".join(f"{gpus} x {mode}" for gpus, mode in columns) + " |")
        print("| --- " * (len(columns) + 1) + "|")
        for gpu in GPUS:
            half = "fp16" if any(old in gpu for old in BEFORE_AMPERE) else "bf16"
            print(f"| {gpu}, {half} | " + " | ".join(cell(found, gpu) for found in estimates) + " |")


if __name__ == "__main__":
    main()
