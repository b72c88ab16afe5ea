"""Asks a model questions about images, and prints the answers while they are generated.

    python tools/ask.py output/ cat.jpg --question "What is shown?"
    python tools/ask.py output/ left.jpg right.jpg      # a conversation: type the questions
    python tools/ask.py output/ < questions.txt         # a conversation without images, one question per line
    python tools/ask.py output/ --serve                 # a page for the browser, to drop pictures on and ask

The folder holds a whole model, or an adapter whose base model is loaded too. The images come before the first
question, or at its places <image>, as in --question "Is <image> larger than <image>?". An empty line or Ctrl-D ends the
conversation.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while the libraries load ends the program with one line in place of a traceback.
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"SIGINT: stopped\n") and 130))

# First, because it loads the libraries quickly and without notices that ask for nothing.
from phi3v import Phi3VProcessor

# isort: split
import torch
from transformers import TextStreamer

from phi3v.console import tell
from phi3v.data.collate import Collator
from phi3v.data.conversations import encode_conversation
from phi3v.data.places import PLACE, places_problem, put_in_place
from phi3v.data.texts import check_text
from phi3v.errors import InputError, Parser, exit_on_input_error, lowering
from phi3v.hub_names import is_hub_name, split_revision
from phi3v.model.adapters import load_adapter
from phi3v.model.chat import IMAGE_TAG
from phi3v.model.generation import use_own_settings
from phi3v.model.loading import find_saved, load_saved, nf4_config
from phi3v.model.processing_phi3v import changed_settings
from phi3v.text import printable
from phi3v.training.hardware import ATTENTION, DTYPES, best_device, choose_attention, choose_precision
from phi3v.training.memory_check import check_weights


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", help="output folder of a run, a merged model, or a repository on the Hub")
    parser.add_argument("images", nargs="*", help="image files, in the order in which the model sees them")
    parser.add_argument("--question", help="ask only this; default: questions from standard input, one per line")
    parser.add_argument("--system", help="a text for the system, before the conversation, as in training")
    parser.add_argument("--literal_tags", action="store_true", help="<image> in a question is text, and no place")
    parser.add_argument("--serve", action="store_true", help="serve a local web page; needs pip install -e '.[serve]'")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve: address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="with --serve: port (default: %(default)s)")
    parser.add_argument("--base", help="the adapter's base model, if it is not where adapter_config.json says")
    parser.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="load the model in NF4, as QLoRA does: a third of the memory, slower",
    )
    parser.add_argument("--num_crops", type=int, help="at most this many crops per image; default: as in training")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU that has it, else fp16; fp32 on a CPU")
    parser.add_argument("--attn_implementation", choices=ATTENTION, help="default: the best that is installed")
    args = parser.parse_intermixed_args(argv)
    if args.max_new_tokens < 1 or (args.num_crops is not None and args.num_crops < 1):
        raise InputError(f"--num_crops {args.num_crops}, --max_new_tokens {args.max_new_tokens}: must be at least 1")
    check_serve(parser, args)
    if args.question is not None:
        make_turn(args, args.images, args.question, "--question", is_first=True)
    if args.system is not None:
        check_text(args.system, "--system")
    args.folder, args.revision = split_revision(args.folder, "folder")
    if not Path(args.folder).is_dir() and not is_hub_name(args.folder):
        raise InputError(f"{args.folder} is not a folder: give the model's folder first, then the images")
    check_base(args, Path(args.folder))
    if args.dtype is None and torch.accelerator.is_available():
        old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "fp16" if old else "bf16"
    try:
        args.dtype = choose_precision(args.dtype == "bf16", args.dtype == "fp16", args.dtype == "fp32")
        args.attn_implementation = choose_attention(args.attn_implementation, False, args.dtype)
    except InputError as e:  # the message names the flags of the training scripts
        raise InputError(re.sub(r"--(bf16|fp16|fp32)\b", r"--dtype \1", str(e))) from None
    return args


def make_turn(args: argparse.Namespace, images: list, question: str, name: str, is_first: bool) -> dict:
    """A turn of a conversation without its answer; the first has the system text.

    Raises InputError, with the question's name, for a question that can't be asked.
    """
    check_text(question, name)
    turn = {"images": images, "user": question, "assistant": ""}
    if turn["images"] and PLACE in question and not args.literal_tags:
        if problem := places_problem(question, len(turn["images"])):
            raise InputError(f"{name} {problem}")
        put_in_place(turn)
    return turn | {"system": args.system} if is_first and args.system is not None else turn


def check_serve(parser: Parser, args: argparse.Namespace):
    """Raises InputError for flags that do not go with --serve, or need it."""
    if not 0 <= args.port < 2**16:
        parser.error(f"--port {args.port}: must be 0 to 65535; with 0 the system chooses one")
    if args.serve and (args.images or args.question is not None):
        parser.error("--serve: give images and questions on its page")
    needless = [flag for flag in ("host", "port") if getattr(args, flag) != parser.get_default(flag)]
    if needless and not args.serve:
        parser.error(f"--{needless[0]} has no effect without --serve")


def check_base(args: argparse.Namespace, folder: Path):
    """Raises InputError for a folder that holds no model, and if --base is given for one that holds no adapter."""
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{args.folder} holds no model: it has neither config.json nor adapter_config.json")
    if args.base and folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise InputError(f"--base {args.base} is only for an adapter, but {args.folder} has no adapter_config.json")


def load(args: argparse.Namespace):
    """The processor and the model.

    Before the model is loaded, which takes long, all images are read. Raises InputError for what can't be loaded.
    """
    dtype = DTYPES[args.dtype]
    hint = "" if args.base else ": give --base"
    saved = find_saved(args.folder, args.revision, base=args.base, check=partial(check_base, args), base_help=hint)
    flags = {"bf16": "--dtype bf16", "4 bits": "--load_in_4bit"}
    check_weights(saved.base_folder, dtype, best_device(), args.load_in_4bit, False, flags)
    place = saved.base
    try:
        own = saved.folder if (saved.folder / "preprocessor_config.json").is_file() else saved.base_folder
        processor = Phi3VProcessor.from_pretrained(own, num_crops=args.num_crops)
        tell(*changed_settings(own, args.num_crops, None), to_stderr=True)
        encode(processor, [{"images": args.images, "user": "?", "assistant": ""}])
        model = load_saved(
            saved,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            quantization=nf4_config(dtype) if args.load_in_4bit else None,
            device=best_device(),
            with_adapter=False,
        )
        place = args.folder
        return processor, (load_adapter(model, saved.adapter) if saved.adapter else model).eval()
    except InputError:
        raise
    except Exception as e:  # the libraries that read the folder raise errors of many classes
        hint = hint if place != args.folder else ""
        raise InputError(f"{place} can't be loaded ({' '.join(f'{e!r}'.split())}){hint}") from None


def encode(processor: Phi3VProcessor, turns: list[dict]) -> dict[str, torch.Tensor]:
    """The model's inputs for the conversation up to its last question."""
    try:
        encoded = encode_conversation(processor, turns, for_generation=True)
    except InputError as e:  # the advice of an error in training data
        raise InputError(str(e).removesuffix(": replace it or remove its example")) from None
    batch = Collator(processor, "left")([encoded])
    return {key: value for key, value in batch.items() if key != "labels"}


class Streamer(TextStreamer):
    """Prints an answer while it is generated, or gives its pieces to `show`. What a terminal obeys is escaped before it
    is printed: the model may be a stranger's."""

    def __init__(self, tokenizer, show: Callable[[str], None] | None = None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.show:
            self.show(text)
        else:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end=stream_end)


@torch.inference_mode()
def answer(
    model, processor: Phi3VProcessor, turns: list[dict], max_new_tokens: int, show: Callable[[str], None] | None = None
) -> str:
    """The greedy answer to the last question.

    show: is called with each piece of the answer while it is generated, perhaps an empty one; by default it is printed.
    """
    batch = {key: value.to(model.device) for key, value in encode(processor, turns).items()}
    length, limit = batch["input_ids"].shape[1], model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise InputError(f"{length} tokens and --max_new_tokens {max_new_tokens} are more than the model's {limit}")
    tokenizer = processor.tokenizer
    use_own_settings(model, processor)
    streamer = Streamer(tokenizer, show)
    with lowering("an answer was generated: lower --num_crops or --max_new_tokens, or give --load_in_4bit"):
        ids = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer)
    if not show and not tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip():
        print("(the answer is empty)", file=sys.stderr)
    # If the answer has an image tag in it, the next turn would take it for an image.
    return IMAGE_TAG.sub("", tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip())


def serve(args: argparse.Namespace):
    try:
        from tools import ask_server  # needs packages that only --serve needs
    except ModuleNotFoundError as e:
        raise InputError(f"--serve needs {e.name}: pip install -e '.[serve]'") from None
    sock = ask_server.listen(args.host, args.port)
    processor, model = load(args)
    about = {"model": args.folder, "num_crops": processor.image_processor.num_crops}
    about["max_new_tokens"] = args.max_new_tokens

    def reply(turns: list[dict], show: Callable[[str], None]) -> str:
        made = []
        for turn in turns:
            made.append(make_turn(args, turn["images"], turn["user"], f"question {len(made) + 1}", is_first=not made))
            made[-1]["assistant"] = turn["assistant"]
        return answer(model, processor, made, args.max_new_tokens, show)

    ask_server.serve(sock, reply, about)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    if args.serve:
        return serve(args)
    processor, model = load(args)
    turns, asked = [], [args.question]
    if args.question is None:
        asked = iter(lambda: (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip(), "")
    try:
        for question in asked:
            images = [] if turns else args.images
            turns.append(make_turn(args, images, question, f"question {len(turns) + 1}", is_first=not turns))
            turns[-1]["assistant"] = answer(model, processor, turns, args.max_new_tokens)
    except EOFError:
        print()


if __name__ == "__main__":
    exit_on_input_error(main)
