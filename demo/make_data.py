"""Writes the demo's data: a small analogue of a task's real data set, drawn from handwritten digits.

    python demo/make_data.py --task ucf101 --out_dir DIR

ucf101: DIR/UCF101_subset.tar.gz, XviD videos of a digit that moves, in eight classes of motion, laid out as the
archive of that name is on the Hub. Byte for byte the same on every run.
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
from digits import draw, load_digits
from PIL import Image
from tqdm import tqdm

WIDTH, HEIGHT, FPS = 320, 240, 25
MOTIONS = ("FadeIn", "FadeOut", "GrowLarge", "ShrinkSmall", "SlideDown", "SlideLeft", "SlideRight", "SlideUp")


def motion_frames(motion: str, digit: np.ndarray, rng: np.random.Generator) -> list[Image.Image]:
    """16 to 40 grey frames of WIDTH x HEIGHT pixels."""
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
    """Writes the archive, whole or not at all. `videos`: how many of each split.

    Raises ValueError for a number that the classes can't share.
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


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", choices=["ucf101"], required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--videos", type=int, nargs=3, default=[480, 96, 64], metavar=("TRAIN", "VAL", "TEST"))
    args = parser.parse_args(argv)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        make_ucf101(args.out_dir, dict(zip(("train", "val", "test"), args.videos, strict=True)))
    except (OSError, ValueError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
