"""Writes the demo's data for a task: a small imitation of the real data set, made from handwritten digits.

    python demo/make_data.py --task ucf101|docvqa|hateful_memes|nlvr2 --out_dir DIR

The files have the layout of the real data sets on the Hub, and are the same on every run, to the byte:

ucf101: DIR/UCF101_subset.tar.gz has XviD videos of a digit that moves, in eight classes of motion.
docvqa: DIR/docvqa_1200_examples and DIR/the_cauldron/docvqa have forms with a number in each row, and questions such
    as "What is the number in row B?"
hateful_memes: DIR/the_cauldron/hateful_memes has pictures of a digit with the caption "an even number" or "an odd
    number"; the question is whether they match. Nothing is hateful.
nlvr2: DIR/the_cauldron/nlvr2 has pairs of digits and statements about them, which are true or false.

`datasets.load_dataset` reads these folders like the Hub's repositories of the same names. No digit image of an
evaluation is in the training data. The evaluations use the test split of docvqa_1200_examples, and the first 500 rows
of hateful_memes and nlvr2: these have no test split, and the recipe holds out these rows.
"""

import argparse
import gzip
import io
import os
import tarfile
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets import Image as ImageFeature
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from digits import draw, load_digits
from huggingface_hub import DatasetCardData
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

WIDTH, HEIGHT, FPS = 320, 240, 25
MOTIONS = ("FadeIn", "FadeOut", "GrowLarge", "ShrinkSmall", "SlideDown", "SlideLeft", "SlideRight", "SlideUp")


def motion_frames(motion: str, digit: np.ndarray, rng: np.random.Generator) -> list[Image.Image]:
    """The 16 to 40 grey frames, WIDTH x HEIGHT pixels, of a video in which the digit makes this motion."""
    n = int(rng.integers(16, 41))
    x, y = WIDTH / 2 + rng.uniform(-25, 25), HEIGHT / 2 + rng.uniform(-15, 15)
    side, reach, frames = rng.uniform(110, 140), rng.uniform(0.8, 1.0), []
    for t in np.linspace(-1, 1, n):
        s, cx, cy, scale, ink = t * reach, x, y, 1.0, 1.0
        if motion.startswith("Slide"):
            horizontal = motion in ("SlideLeft", "SlideRight")
            s = -s if motion in ("SlideLeft", "SlideUp") else s
            cx, cy = (x + 90 * s, y) if horizontal else (x, y + 60 * s)
        elif motion in ("GrowLarge", "ShrinkSmall"):
            scale = 1 + 0.6 * (s if motion == "GrowLarge" else -s)
        else:
            ink = 0.55 + 0.45 * (s if motion == "FadeIn" else -s)
        frame = Image.new("L", (WIDTH, HEIGHT), 255)
        draw(frame, digit, (cx, cy), side * scale, ink)
        frames.append(frame)
    return frames


def encode_avi(frames: list[Image.Image]) -> bytes:
    """The frames as an XviD video in an .avi container."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.codec_tag = "XVID"
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 800_000
        stream.thread_count = 1
        stream.options = {"flags": "+bitexact"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return buffer.getvalue()


def make_ucf101(out_dir: Path, videos: dict[str, int]):
    """Writes the archive, which appears only when it is complete.

    videos: how many videos each split has. Raises ValueError for a number that is not a multiple of the classes.
    """
    if bad := [f"{split} {n}" for split, n in videos.items() if n < 1 or n % len(MOTIONS)]:
        raise ValueError(f"numbers of videos must be positive multiples of {len(MOTIONS)}: {', '.join(bad)}")
    path = out_dir / "UCF101_subset.tar.gz"
    partial = path.with_name(path.name + ".partial")
    with ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        progress = stack.enter_context(tqdm(total=sum(videos.values()), desc="making videos", unit="video"))
        raw = stack.enter_context(open(partial, "wb"))
        zipped = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
        tar = stack.enter_context(tarfile.open(fileobj=zipped, mode="w"))
        for number, split in enumerate(sorted(videos)):
            digits, _ = load_digits(split)
            rng = np.random.default_rng(number)
            for motion in MOTIONS:
                for k in range(videos[split] // len(MOTIONS)):
                    content = encode_avi(motion_frames(motion, digits[rng.integers(len(digits))], rng))
                    name = f"v_{motion}_g{k // 4 + 1:02d}_c{k % 4 + 1:02d}.avi"
                    member = tarfile.TarInfo(f"UCF101_subset/{split}/{motion}/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    progress.update()
        tar.close()
        zipped.close()
        raw.close()
        os.replace(partial, path)
    print(path)


# ---- data sets in the Hub's form: a README with the features, and parquet files that contain the images

TEXT = Value("string")
FEATURES = {
    "docvqa_1200_examples": Features(
        {
            "id": TEXT,
            "image": ImageFeature(),
            "query": {language: TEXT for language in ("de", "en", "es", "fr", "it")},
            "answers": List(TEXT),
            "words": List(TEXT),
            "bounding_boxes": List(List(Value("float32"), length=4)),
            "answer": {"match_score": Value("float64"), "matched_text": TEXT, "start": Value("int64"), "text": TEXT},
        }
    ),
    "the_cauldron": Features(
        {"images": List(ImageFeature()), "texts": List({"user": TEXT, "assistant": TEXT, "source": TEXT})}
    ),
}
SOURCE = "handwritten digits"  # instead of the real data set's name


def png(image: Image.Image) -> dict:
    """The image as `datasets` stores it in a table."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(folder: Path, parts: dict[str, list[dict]]):
    """Writes the rows of each path to `folder/{path}-00000-of-00001.parquet`, and a README that names all
    configurations in the folder, new and old. The files appear only when all of them are complete."""
    features = FEATURES[folder.name]
    with ExitStack() as stack:
        finished = {}
        for path, rows in parts.items():
            target = folder / f"{path}-00000-of-00001.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            stack.callback(partial.unlink, missing_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(partial)
            finished[partial] = target
        for partial, target in finished.items():
            os.replace(partial, target)
            print(target)
        configs = {}
        for path in sorted(folder.glob("*/*.parquet")):
            name, split = path.parent.name, path.name.split("-")[0]
            files = configs.setdefault("default" if name == "data" else name, {"data_files": []})["data_files"]
            files.append({"split": split, "path": f"{name}/{split}-*"})
        card = DatasetCardData(license="cc-by-4.0")
        DatasetInfosDict({name: DatasetInfo(features=features) for name in configs}).to_dataset_card_data(card)
        MetadataConfigs(configs).to_dataset_card_data(card)
        partial = folder / "README.md.partial"
        stack.callback(partial.unlink, missing_ok=True)
        partial.write_text(
            f"---\n{card}\n---\n\nNot the data set of this name, but a small analogue of it, drawn from\n"
            "the handwritten digits of E. Alpaydin and C. Kaynak (UCI, 1998, CC BY 4.0) by `demo/make_data.py`.\n",
            encoding="utf-8",
        )
        os.replace(partial, folder / "README.md")


# ---- docvqa

ROW_SIDE, ROWS = 160, "ABC"  # pixels; with --num_crops 3, one row fills one crop
QUERY = {
    "de": "Wie lautet die Zahl in Zeile {}?",
    "en": "What is the number in row {}?",
    "es": "¿Cuál es el número de la fila {}?",
    "fr": "Quel est le nombre de la ligne {} ?",
    "it": "Qual è il numero nella riga {}?",
}


def draw_form(digits, rng) -> tuple[Image.Image, list[str]]:
    """A page with a letter and a number of two digits in each row, and the numbers."""
    images, labels = digits
    page = Image.new("L", (ROW_SIDE, ROW_SIDE * len(ROWS)), 255)
    numbers = []
    for row, letter in enumerate(ROWS):
        top = row * ROW_SIDE
        ImageDraw.Draw(page).text((8, top + 4), letter, fill=96, font=ImageFont.load_default(26))
        chosen = rng.integers(len(images), size=2)
        for i, x in zip(chosen, (42, 118), strict=True):
            draw(page, images[i], (x + rng.uniform(-6, 6), top + 88 + rng.uniform(-8, 8)), rng.uniform(58, 72))
        numbers.append("".join(str(labels[i]) for i in chosen))
    return page, numbers


def make_docvqa(out_dir: Path, n_train: int, n_eval: int):
    parts = {}
    for seed, split, n in ((1, "train", n_train), (2, "test", n_eval)):
        digits = load_digits({"train": "train", "test": "val"}[split])
        rng, rows = np.random.default_rng(seed), []
        for i in range(n):
            page, numbers = draw_form(digits, rng)
            asked = i % len(ROWS)
            text, start = numbers[asked], 2 * asked + 1
            boxes = [
                [left, (row + high) / len(ROWS), right, (row + low) / len(ROWS)]
                for row in range(len(ROWS))
                for left, high, right, low in ((0.05, 0.05, 0.2, 0.2), (0.05, 0.25, 0.95, 0.85))
            ]
            rows.append(
                {
                    "id": f"{split}_{i}",
                    "image": png(page),
                    "query": {language: query.format(ROWS[asked]) for language, query in QUERY.items()},
                    "answers": list(dict.fromkeys([text, str(int(text))])),
                    "words": [word for row in zip(ROWS, numbers, strict=True) for word in row],
                    "bounding_boxes": boxes,
                    "answer": {"match_score": 1.0, "matched_text": text, "start": start, "text": text},
                }
            )
        parts[f"data/{split}"] = rows
    write_parquet(out_dir / "docvqa_1200_examples", parts)

    digits, rng, rows = load_digits("train"), np.random.default_rng(3), []
    for _ in range(2 * n_train):
        page, numbers = draw_form(digits, rng)
        texts = [
            {"user": f"{QUERY['en'].format(ROWS[k])}\nAnswer briefly.", "assistant": numbers[k], "source": SOURCE}
            for k in rng.permutation(len(ROWS))
        ]
        rows.append({"images": [png(page)], "texts": texts})
    write_parquet(out_dir / "the_cauldron", {"docvqa/train": rows})


# ---- hateful_memes and nlvr2

# With ten captions, one for each digit, the demo's small model would need minutes of training.
PARITIES = ("an even number", "an odd number")


def draw_digit(digits, label: int, rng) -> Image.Image:
    """A picture of one digit whose label is `label`."""
    images, labels = digits
    picture = Image.new("L", (160, 120), 255)
    center = 80 + rng.uniform(-8, 8), 60 + rng.uniform(-5, 5)
    draw(picture, images[rng.choice(np.flatnonzero(labels == label))], center, rng.uniform(88, 106))
    return picture


def make_hateful_memes(out_dir: Path, n_train: int, n_eval: int):
    rows = []
    for seed, split, n in ((4, "val", n_eval), (5, "train", n_train)):
        digits, rng = load_digits(split), np.random.default_rng(seed)
        for i in rng.permutation(n):
            shown, said = i & 1, i >> 1 & 1  # half of the pictures are odd, and half of the captions
            picture = draw_digit(digits, 2 * rng.integers(5) + shown, rng)
            user = f'The caption says "{PARITIES[said]}". Does the caption match the picture?'
            texts = [{"user": user, "assistant": "yes" if shown == said else "no", "source": SOURCE}]
            rows.append({"images": [png(picture)], "texts": texts})
    write_parquet(out_dir / "the_cauldron", {"hateful_memes/train": rows})


def make_nlvr2(out_dir: Path, n_train: int, n_eval: int):
    rows = []
    for seed, split, n in ((6, "val", n_eval), (7, "train", n_train)):
        digits, rng = load_digits(split), np.random.default_rng(seed)
        for i in rng.permutation(n):
            larger, found, is_so = (
                bool(i >> k & 1) for k in range(3)
            )  # the three answers; each is true half of the time
            wanted, side = rng.integers(2, size=2)
            # Three quarters of all random pairs show the wanted parity, so draw until a pair fits.
            while True:
                pair = sorted(rng.choice(10, size=2, replace=False), reverse=larger)
                if found == (wanted in (pair[0] % 2, pair[1] % 2)):
                    break
            claimed = pair[side] % 2 if is_so else 1 - pair[side] % 2
            statements = [
                ("The left image shows a larger number than the right image.", larger),
                (f"At least one image shows {PARITIES[wanted]}.", found),
                (f"The {('left', 'right')[side]} image shows {PARITIES[claimed]}.", is_so),
            ]
            first = i // 8 % 3  # the evaluation uses only the first statement
            texts = [
                {"user": statement, "assistant": str(answer), "source": SOURCE}
                for statement, answer in statements[first:] + statements[:first]
            ]
            rows.append({"images": [png(draw_digit(digits, label, rng)) for label in pair], "texts": texts})
    write_parquet(out_dir / "the_cauldron", {"nlvr2/train": rows})


# ---- command line

SIZES = {"docvqa": (1000, 200), "hateful_memes": (2000, 500), "nlvr2": (2000, 500)}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", choices=["ucf101", *SIZES], required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument(
        "--videos",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="number of videos for ucf101 (default: 480 96 64)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs=2,
        metavar=("TRAIN", "EVAL"),
        help="number of rows for the other tasks (default: 2000 500; for docvqa 1000 200). The recipe always evaluates "
        "on 500 rows of hateful_memes and nlvr2",
    )
    args = parser.parse_args(argv)
    unused = "rows" if args.task == "ucf101" else "videos"
    if getattr(args, unused) is not None:
        parser.error(f"--{unused} is not for --task {args.task}")
    if args.rows and min(args.rows) < 1:
        parser.error(f"--rows {args.rows[0]} {args.rows[1]}: both must be at least 1")
    make = {"docvqa": make_docvqa, "hateful_memes": make_hateful_memes, "nlvr2": make_nlvr2}
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if args.task == "ucf101":
            make_ucf101(args.out_dir, dict(zip(("train", "val", "test"), args.videos or (480, 96, 64), strict=True)))
        else:
            make[args.task](args.out_dir, *(args.rows or SIZES[args.task]))
    except (OSError, ValueError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
