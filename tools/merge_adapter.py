"""Merges a LoRA adapter into its base model and saves a whole model, with the Hub's tensor names.

    python tools/merge_adapter.py output/ merged/
    python tools/merge_adapter.py output/ merged/ --dequantize    # after QLoRA: exactly the model that was trained

An adapter from --use_qlora was trained on a base model that was rounded to 4 bits. By default, it is merged into the
base model as it was before rounding, which is what most users of QLoRA do. With --dequantize it is merged into the
rounded base model; then --dtype must be the precision of the run.

Models larger than memory can be merged: at most one shard of the result, 5 GB, is in memory at the same time.
OUTPUT_DIR appears when the merged model is whole.
"""

import contextlib
import os
import signal
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while the libraries load ends the program with one line in place of a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"SIGINT: stopped\n") and 130))

# First, because it loads the libraries quickly and without notices that ask for nothing.
from phi3v import Phi3VProcessor

# isort: split
import torch
from safetensors import SafetensorError

from phi3v.console import tell
from phi3v.errors import InputError, Parser, exit_on_input_error
from phi3v.files import replacing_folder, write_json
from phi3v.hub_names import is_hub_name, split_revision
from phi3v.model.generation import use_own_settings
from phi3v.model.loading import find_saved, nf4_config
from phi3v.model.merging import MergedWeights
from phi3v.training.hardware import DTYPES, best_device
from phi3v.training.start import MERGED


def check_adapter(name: str, folder: Path, files: tuple[str, ...] = ("adapter_config.json",)):
    """Raises InputError if one of the files of an adapter is missing in its folder."""
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{name} has no {file}: give the output folder of a LoRA run")


@contextlib.contextmanager
def writing(output_dir: Path):
    """Turns an error of the system in the block, such as a full disk, into an InputError."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise InputError(f"{output_dir} can't be written ({' '.join(str(e).split())})") from None


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("adapter", help="output folder of a run with --use_lora or --use_qlora, or its name on the Hub")
    parser.add_argument("output_dir", type=Path, help="new folder for the merged model and the processor")
    parser.add_argument("--base", help="the base model, if it is not where adapter_config.json says")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="dtype of the merged weights (default: %(default)s)"
    )
    parser.add_argument("--dequantize", action="store_true", help="merge into the base model as QLoRA rounded it")
    parser.add_argument(
        "--quantize_vision", action="store_true", help="give this if the run had it; needs --dequantize"
    )
    args = parser.parse_args(argv)
    args.adapter, revision = split_revision(args.adapter, "adapter")
    if not is_hub_name(args.adapter):
        check_adapter(args.adapter, Path(args.adapter), ("adapter_config.json", "adapter_model.safetensors"))
    if args.quantize_vision and not args.dequantize:
        parser.error("--quantize_vision has no effect without --dequantize")
    if args.output_dir.is_file():
        raise InputError(f"{args.output_dir} is a file")
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise InputError(f"{args.output_dir} is not empty: choose a new folder")
    quantization = nf4_config(torch.float32, args.quantize_vision) if args.dequantize else None
    # Merging in fp32 rounds only once. With --dequantize the base model is loaded in the precision of the run, because
    # the run rounded it to 4 bits from there.
    dtype = DTYPES[args.dtype] if args.dequantize else torch.float32
    hint = "" if args.base else ": give --base"
    check = partial(check_adapter, args.adapter)
    saved = find_saved(args.adapter, revision, base=args.base, check=check, base_help=hint)
    own = saved.folder if (saved.folder / "preprocessor_config.json").is_file() else saved.base_folder
    with writing(args.output_dir), replacing_folder(args.output_dir) as folder:
        try:
            processor = Phi3VProcessor.from_pretrained(own)
            merged = MergedWeights(saved, dtype, quantization, best_device())
        except InputError:
            raise
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())
            raise InputError(f"the base model {saved.base} can't be loaded ({reason}){hint}") from None
        use_own_settings(merged.outline, processor)
        merged.save(folder, DTYPES[args.dtype])
        processor.save_pretrained(folder)
        if own == saved.folder:  # the number of crops is that of a run
            write_json(folder / MERGED, {"adapter": args.adapter, "base": saved.base})
    n_parameters = merged.outline.num_parameters()
    tell(f"{args.output_dir}: {saved.base} merged with {args.adapter}, {n_parameters:,} parameters")


if __name__ == "__main__":
    exit_on_input_error(main)
