"""Converts common formats of image conversations into the format that finetune_hf_trainer_ucf101.py trains on.

    python tools/convert_conversations.py --source questions.csv --images_dir photos --out_dir DATA
    python tools/convert_conversations.py --source llava.json --images_dir coco --out_dir DATA
    python tools/convert_conversations.py --source messages.jsonl --images_dir images --out_dir DATA

It reads
- `.csv` or `.tsv` with the columns image, question and answer; several images of a question are separated by `;`;
- LLaVA's json: a list of {"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, …]};
- jsonl with {"messages": [{"role": "user"|"assistant", "content"}, …], "images": […]}, where content is a text or a
  list of {"type": "text", "text"} and {"type": "image"}, as in transformers' chat templates. An image part can name its
  file, as {"type": "image", "image": "a.png"}.

Images are copied, and share their blocks with the originals where the file system can. With --link they are hard links,
which need no room, but are the same files: whoever edits one edits the other. The images of a turn come before its
text, or stay inside or behind it, at places <image>. A system text at the beginning stays a text of the system. Every
n-th example is kept for evaluation, with n = 1 / --val_share; examples that share an image stay together. Nothing is
left out in silence: a field that can't be used is an error or is named at the end, and a row that can't be used is an
error, or with --on_bad_example skip it is listed, also in OUT_DIR/left_out.txt.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from tqdm import tqdm

# The package's __init__ registers the model with transformers, for which it loads torch, and that takes seconds. This
# program needs modules that work without them, so it imports these from a package whose __init__ has not run.
if "phi3v" not in sys.modules and (spec := importlib.util.find_spec("phi3v")):
    sys.modules["phi3v"] = importlib.util.module_from_spec(spec)

# isort: split
from phi3v.data.annotations import read_conversations
from phi3v.data.formats import Formats
from phi3v.data.images import save_upright
from phi3v.data.split import groups_of_shared_images, split_by_image
from phi3v.data.unsupported import is_media_file
from phi3v.errors import BadExamples, InputError, Parser, exit_on_input_error, listing
from phi3v.files import replacing_folder
from phi3v.inside import Inside, is_inside, open_file, real_folders
from phi3v.text import printable

FICLONE = 0x40049409  # Linux's request to let a file share the blocks of another one, which btrfs and XFS can
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
WRITTEN = {"images", "ucf101_train.jsonl", "ucf101_val.jsonl", "left_out.txt"}
ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf)://|data:", re.IGNORECASE)


class Images:
    """Finds the images that rows name. files: for each image that was found, its name in the output and its file."""

    def __init__(self, folder: Path, follow_links: bool):
        self.given, self.folder, self.real_folder = folder, os.path.abspath(folder), os.path.realpath(folder)
        self.folders, self.follow_links = real_folders(folder), follow_links
        self.files, self.names = {}, {}

    def is_image(self, name: str) -> bool:
        return is_media_file(name) or bool(name) and os.path.isfile(os.path.join(self.folder, name))

    def find(self, name: str) -> str:
        """The name that an image has in the output. Raises InputError if it is not a file below the folder."""
        if name not in self.names:
            own, file = self._find(name)
            self.names[name] = own
            self.files[own] = file
        return self.names[name]

    def _find(self, name: str) -> tuple[str, str]:
        if not name:
            raise InputError("image is '', must be a file name")
        if ADDRESS.match(name):
            raise InputError(f"image {name!r:.100} is not a file but an address or data: save it below {self.given}")
        try:
            url = urlparse(name) if name.startswith("file:") else None
            given = os.path.join(self.folder, unquote(url.netloc + url.path) if url else name)
            file = os.path.realpath(given)
            is_file = os.path.isfile(file)
        except (OSError, ValueError):  # a name that no file can have
            raise InputError(f"image {name!r:.100} can't be the name of a file") from None
        if is_file and (own := _below(self.real_folder, file)):
            return own, file if self.follow_links else Inside(file, self.folders)
        own = _below(self.folder, os.path.normpath(given)) or _below(self.real_folder, os.path.normpath(given))
        if not is_file or not own:
            raise InputError(f"image {name:.100} is not a file below {self.given}: see --images_dir")
        if not self.follow_links and not is_inside(file, self.folders):
            raise InputError(
                f"image {name:.100} is behind a link out of {self.given}, to {file}: give --follow_links if it may be "
                "used"
            )
        return own, file if self.follow_links else Inside(file, self.folders)


def _below(folder: str, path: str) -> str | None:
    """The path relative to a folder; None if it is not below it."""
    return os.path.relpath(path, folder) if os.path.commonpath([folder, path]) == folder != path else None


def place_image(file: str, copy: Path, exif_rotate: bool, link: bool) -> bool:
    """Copies an image, or makes a hard link to it. With `exif_rotate`, an image that EXIF says to turn is written
    upright, and the result is True."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    if exif_rotate and save_upright(file, copy):
        return True
    try:
        with open_file(file) as source:
            if link:
                try:
                    os.link(file, copy, follow_symlinks=False)
                except OSError as e:
                    raise ValueError(f"no hard link: {e.strerror}; leave out --link") from None
                if not os.path.samestat(os.fstat(source.fileno()), os.lstat(copy)):
                    raise ValueError("another file took its place just now")
                return False
            with open(copy, "xb") as target:
                try:
                    fcntl.ioctl(target, FICLONE, source.fileno())
                except OSError:  # another file system than btrfs and XFS, or another one than the source's
                    shutil.copyfileobj(source, target)
    except ValueError as e:
        raise InputError(f"{file} can't be copied ({e})") from None
    return False


@contextlib.contextmanager
def writing(out_dir: Path):
    """Turns an error of the system in the block, such as a full disk, into an InputError."""
    try:
        yield
    except OSError as e:
        raise InputError(f"--out_dir {out_dir} can't be written ({e}): nothing of it was kept") from None


def read_examples(args: argparse.Namespace, bad: BadExamples, images: Images) -> tuple[list[dict], list[str]]:
    """All examples of the source, with the names that their images have in the output, and notes to print."""
    examples, rows = [], Formats(args.source, bad, images.is_image, args.literal_tags)
    for number, (where, turns) in enumerate(tqdm(rows, desc="reading", unit="example")):
        if turns is None:
            continue
        with bad.catching(where):
            for turn in turns:
                turn["images"] = [images.find(name) for name in turn["images"]]
            system = {"system": turns[0].pop("system")} if "system" in turns[0] else {}
            examples.append({"id": number, **system, "conversations": turns})
    bad.settle(str(args.source), len(examples))
    notes = [f"note: {args.source}: {n:,} examples: {text}" for text, n in rows.notes.items() if n]
    return examples, rows.unused.lines(args.source) + notes


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help=".csv, .tsv, .json or .jsonl")
    parser.add_argument(
        "--images_dir", type=Path, help="folder that the image names are relative to; default: the folder of --source"
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--val_share", type=float, default=0.1, help="fraction of the examples for evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--on_bad_example", default="error", help="error, or skip: leave out rows that can't be used, and list them"
    )
    parser.add_argument(
        "--follow_links", action="store_true", help="use images behind links that lead out of --images_dir"
    )
    parser.add_argument(
        "--link",
        action="store_true",
        help="make hard links to the images instead of copies, for large sets on the disk of --out_dir: the links need "
        "no room, but editing an image in --out_dir then changes the original, and the other way round",
    )
    parser.add_argument(
        "--literal_tags",
        action="store_true",
        help="keep tags such as <video> as text, and <image> in answers and in examples without images; other images "
        "then come before their text",
    )
    parser.add_argument(
        "--exif_rotate",
        action="store_true",
        help="write photos upright that their EXIF data say to turn; a JPEG among them is compressed once more",
    )
    args = parser.parse_args(argv)
    if not os.path.isfile(args.source):
        raise InputError(f"--source {args.source} is not a file")
    if not 1e-9 <= args.val_share < 1:
        raise InputError(f"--val_share is {args.val_share}, must be between 0 and 1")
    if args.images_dir and not args.images_dir.is_dir():
        raise InputError(
            f"--images_dir {args.images_dir} is not a folder: give the one that the image names start from"
        )
    if args.source.suffix.lower() in SPREADSHEETS:
        raise InputError(
            f"--source {args.source} is a spreadsheet: save it as CSV (UTF-8), with commas between columns"
        )
    if args.on_bad_example not in ("error", "skip"):
        raise InputError(f"--on_bad_example is {args.on_bad_example}, must be error or skip")
    try:
        args.out_dir = Path(os.path.realpath(args.out_dir))
        if args.out_dir.exists() and not args.out_dir.is_dir():
            raise InputError(f"--out_dir {args.out_dir} is a file: choose a new folder")
        if args.out_dir.is_dir() and any(args.out_dir.iterdir()):
            raise InputError(f"--out_dir {args.out_dir} is not empty: choose a new one")
        if os.path.ismount(args.out_dir):
            raise InputError(f"--out_dir {args.out_dir} is a mount point, which can't be replaced: give a folder in it")
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"--out_dir {args.out_dir!s:.300} can't be used ({e!s:.300}): choose a new folder") from None
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    bad = BadExamples(args.on_bad_example == "skip")
    found = Images(args.images_dir or args.source.parent, args.follow_links)
    examples, notes = read_examples(args, bad, found)
    images = [{name for turn in example["conversations"] for name in turn["images"]} for example in examples]
    try:
        kept = split_by_image(images, args.val_share)
    except InputError as e:
        raise InputError(f"{args.source}: {e}") from None
    with writing(args.out_dir), replacing_folder(args.out_dir, WRITTEN) as partial:
        (partial / "images").mkdir()
        turned = 0
        for name in tqdm(sorted(set().union(*images)), desc="copying", unit="image"):
            turned += place_image(found.files[name], partial / "images" / name, args.exif_rotate, args.link)
        for split in ("train", "val"):
            own = [json.dumps(e, ensure_ascii=False) for i, e in enumerate(examples) if (i in kept) == (split == "val")]
            path = partial / f"ucf101_{split}.jsonl"
            path.write_text("\n".join(own) + "\n", encoding="utf-8")
            read_conversations(path, partial / "images", literal_tags=args.literal_tags)
        if bad.left_out:
            (partial / "left_out.txt").write_text("\n".join(bad.left_out) + "\n", encoding="utf-8")
    for line in (*notes, *listing(bad.left_out)):
        print(printable(line))
    if together := sum(len(group) for group in groups_of_shared_images(images) if len(group) > 1):
        print(
            f"{together:,} examples share images with others; those are on the same side, so that the evaluation has "
            f"{len(kept) / len(examples):.1%} of all examples"
        )
    if turned:
        print(f"{turned:,} images were turned upright, as their EXIF data say")
    print(f"{printable(str(args.out_dir))}: {len(examples) - len(kept)} training and {len(kept)} evaluation examples")


if __name__ == "__main__":
    exit_on_input_error(main)
