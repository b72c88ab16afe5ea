"""Converts common formats of image conversations into the format that finetune_hf_trainer_ucf101.py trains on.

    python tools/convert_conversations.py --source questions.csv --images_dir photos --out_dir DATA
    python tools/convert_conversations.py --source llava.json --images_dir coco --out_dir DATA
    python tools/convert_conversations.py --source messages.jsonl --images_dir images --out_dir DATA

It reads
- `.csv` or `.tsv` with the columns image, question and answer; several images of a question are separated by `;`;
- LLaVA's json: a list of {"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, …]};
- jsonl with {"messages": [{"role": "user"|"assistant", "content"}, …], "images": […]}, where content is a text or a
  list of {"type": "text", "text"} and {"type": "image"}, as in transformers' chat templates.

Images are linked, or copied if OUT_DIR is on another disk. The images of a turn come before its text, and a system
message comes before the first question. Every n-th example is kept for evaluation, with n = 1 / --val_share.
"""

import argparse
import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from phi3v.data.annotations import read_conversations, text_problem
from phi3v.data.images import save_upright
from phi3v.errors import InputError, exit_on_input_error
from phi3v.files import replacing_folder

IMAGE_PLACE = re.compile(r"\s*<image>\s*|\s*<\|image_\d+\|>\s*")


def rows_of_table(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """Yields for each row of a table where it stands and its conversation of one turn."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        missing = {"image", "question", "answer"} - set(reader.fieldnames or [])
        if missing:
            raise InputError(f"{path}: there is no column {', '.join(sorted(missing))}, only {reader.fieldnames}")
        for row in reader:
            images = [name.strip() for name in (row["image"] or "").split(";") if name.strip()]
            turn = {"images": images, "user": row["question"], "assistant": row["answer"]}
            yield f"{path}:{reader.line_num}", [turn]


def rows_of_json(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """Yields for each object of a json or jsonl file where it stands and its conversation."""
    for where, example in objects(path):
        if "messages" in example:
            images = example.get("images") or []
            yield where, turns(where, [(m.get("role"), m.get("content")) for m in example["messages"]], images)
        elif "conversations" in example:
            images = example.get("image") or []
            said = [(ROLES.get(m.get("from"), m.get("from")), m.get("value")) for m in example["conversations"]]
            yield where, turns(where, said, [images] if isinstance(images, str) else images)
        else:
            raise InputError(f"{where}: has neither messages nor conversations, but {sorted(example)}")


ROLES = {"human": "user", "gpt": "assistant"}


def objects(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields each object of a json list or a jsonl file, with where it stands in the file."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    try:
        found = json.loads(text) if is_list else None
    except ValueError as e:
        raise InputError(f"{path} is not valid JSON: {e}") from None
    for number, line in enumerate(found if is_list else text.splitlines(), 1):
        where = f"{path}, object {number}" if is_list else f"{path}:{number}"
        if not is_list:
            if not line.strip():
                continue
            try:
                line = json.loads(line)
            except ValueError as e:
                raise InputError(f"{where} is not valid JSON: {e}") from None
        if not isinstance(line, dict):
            raise InputError(f"{where} must be an object, not {type(line).__name__}")
        yield where, line


def turns(where: str, messages: list[tuple], images: list) -> list[dict]:
    """Turns of a question and an answer, made of messages as (role, content).

    Images for which no message has a place go to the first turn. Raises InputError if the messages do not alternate.
    """
    made, rest, system, question = [], list(images), "", None
    for role, content in messages:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise InputError(f"{where}: content is {content!r:.80}, must be a text or a list of parts")
        text = "\n".join(part.get("text", "") for part in parts if part.get("type") == "text")
        places = len(IMAGE_PLACE.findall(text)) + sum(part.get("type") in ("image", "image_url") for part in parts)
        text = IMAGE_PLACE.sub("\n", text).strip()
        if role == "system":
            system = f"{text}\n"
        elif role == "user" and question is None:
            if places > len(rest):
                raise InputError(f"{where}: a message has a place for {places} images, but {len(rest)} are left")
            question = {"images": rest[:places], "user": system + text}
            rest, system = rest[places:], ""
        elif role == "assistant" and question is not None and not places:
            made.append({**question, "assistant": text})
            question = None
        else:
            raise InputError(f"{where}: a message of {role!r} is out of turn, or has an image where none can be")
    if not made or question is not None:
        raise InputError(f"{where}: the last message must be an answer")
    made[0]["images"] = rest + made[0]["images"]
    return made


def link_image(name, images_dir: Path, target: Path, where: str, turned: list | None = None) -> str:
    """Links or copies an image into the folder `target` and returns its name there.

    turned: if it is a list, images that EXIF says to turn are written upright, and their names are added to it.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: image is {name!r:.80}, must be a file name")
    source = (images_dir / name).resolve()
    if not source.is_relative_to(images_dir.resolve()) or not source.is_file():
        raise InputError(f"{where}: image {name} is not a file below {images_dir}: see --images_dir")
    name = str(source.relative_to(images_dir.resolve()))
    copy = target / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        if turned is not None and save_upright(source, copy):
            turned.append(name)
            return name
        try:
            os.link(source, copy)
        except OSError:  # a link to another disk is not possible
            shutil.copyfile(source, copy)
    return name


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help=".csv, .tsv, .json or .jsonl")
    parser.add_argument(
        "--images_dir", type=Path, help="folder that the image names are relative to; default: the folder of --source"
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--val_share", type=float, default=0.1, help="fraction of the examples for evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--exif_rotate",
        action="store_true",
        help="write photos upright that their EXIF data say to turn; a JPEG among them is compressed once more",
    )
    args = parser.parse_args(argv)
    if not args.source.is_file():
        raise InputError(f"--source {args.source} does not exist")
    if not 0 < args.val_share < 1:
        raise InputError(f"--val_share is {args.val_share}, must be between 0 and 1")
    if args.out_dir.exists() and any(args.out_dir.iterdir()):
        raise InputError(f"--out_dir {args.out_dir} is not empty: choose a new one")
    images_dir = args.images_dir or args.source.parent
    is_table = args.source.suffix in (".csv", ".tsv")
    lines, every = {"train": [], "val": []}, max(2, round(1 / args.val_share))
    turned = [] if args.exif_rotate else None
    rows = (rows_of_table if is_table else rows_of_json)(args.source)
    try:
        with replacing_folder(args.out_dir) as partial:
            for number, (where, conversation) in enumerate(tqdm(rows, desc="converting", unit="example")):
                for turn in conversation:
                    turn["images"] = [
                        link_image(name, images_dir, partial / "images", where, turned) for name in turn["images"]
                    ]
                    for role in ("user", "assistant"):
                        if problem := text_problem(turn[role]):
                            raise InputError(f"{where}: the {role}'s text {problem}")
                split = "val" if number % every == every - 1 else "train"
                lines[split].append(json.dumps({"id": number, "conversations": conversation}, ensure_ascii=False))
            if not lines["val"]:
                raise InputError(
                    f"{args.source} holds {len(lines['train'])} examples, too few to keep some for evaluation"
                )
            (partial / "images").mkdir(exist_ok=True)
            for split, own in lines.items():
                path = partial / f"ucf101_{split}.jsonl"
                path.write_text("\n".join(own) + "\n", encoding="utf-8")
                read_conversations(path, partial / "images")
    except UnicodeDecodeError as e:
        raise InputError(f"{args.source} is not UTF-8 ({e.reason} at byte {e.start + 1}): save it as UTF-8") from None
    if turned:
        print(f"{len(turned):,} images were turned upright, as their EXIF data say")
    print(f"{args.out_dir}: {len(lines['train'])} training and {len(lines['val'])} evaluation examples")


if __name__ == "__main__":
    exit_on_input_error(main)
