"""Merges a LoRA adapter into its base model: a checkpoint that loads anywhere, under the Hub's tensor names.

    python tools/merge_adapter.py output/ merged/
    python tools/merge_adapter.py output/ merged/ --dequantize    # after QLoRA: exactly the model that was trained

An adapter trained with --use_qlora has learned beside a base rounded to 4 bits. By default it is merged into the
base as it was before rounding, which is what most users of QLoRA do; --dequantize merges it into the rounded one,
with --dtype as in the run.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # phi3v, where it is not installed
from phi3v import Phi3VForCausalLM, Phi3VProcessor  # noqa: E402
from phi3v.errors import InputError, exit_on_input_error  # noqa: E402
from phi3v.model.adapters import merge_adapter  # noqa: E402
from phi3v.training.hardware import DTYPES  # noqa: E402


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("adapter", type=Path, help="output folder of a run with --use_lora or --use_qlora")
    parser.add_argument("output_dir", type=Path, help="new folder for the merged model and the processor")
    parser.add_argument("--base", help="the base model, if it is no longer where the adapter says")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the merged weights (default: %(default)s)")
    parser.add_argument("--dequantize", action="store_true", help="merge into the base as QLoRA rounded it")
    parser.add_argument("--quantize_vision", action="store_true", help="if the run had it; needs --dequantize")
    args = parser.parse_args(argv)
    try:
        config = json.loads((args.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{args.adapter} holds no adapter_config.json: give the output folder of a LoRA run") from None
    except ValueError:
        raise InputError(f"{args.adapter}/adapter_config.json is not JSON") from None
    if not (args.adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{args.adapter} holds no adapter_model.safetensors: give the output folder of a LoRA run")
    if args.quantize_vision and not args.dequantize:
        parser.error("--quantize_vision has no effect without --dequantize")
    if args.output_dir.is_file():
        raise InputError(f"{args.output_dir} is a file")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise InputError(f"{args.output_dir} is not empty: choose a new folder")
    base = args.base or config["base_model_name_or_path"]
    quantization = None
    if args.dequantize:
        skip = ["lm_head"] + ([] if args.quantize_vision else [".*vision_embed_tokens"])
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skip,
        )
    # Merged in fp32 and then rounded once; but what was rounded to 4 bits was the base in the run's precision.
    dtype = DTYPES[args.dtype] if args.dequantize else torch.float32
    try:
        model = Phi3VForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization)
    except OSError as e:
        raise InputError(f"the base model {base} can't be loaded ({' '.join(str(e).split())}): give --base") from None
    merged = merge_adapter(model, args.adapter).to(DTYPES[args.dtype])
    merged.save_pretrained(args.output_dir)
    Phi3VProcessor.from_pretrained(args.adapter).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {base} with {args.adapter}, {sum(p.numel() for p in merged.parameters()):,} parameters")


if __name__ == "__main__":
    exit_on_input_error(main)
