"""The speed of convert_ucf101.py against a plain loop that decodes one video after the other.

    python benchmarks/converter.py [--videos 60] [--repetitions 5]

XviD clips of 320x240 pixels and 25 to 180 frames, a third of them with B-frames, are made in a temporary folder. The
plain loop decodes all frames of a video, with PyAV's default threads, into a list of images, and saves 8 of them with
the converter's JPEG quality. Both write the same bytes, which is checked. Each case runs in a process of its own, so
that all times include the start of Python, and those of the converter also the start of its workers. The cases take
turns. The seconds are wall-clock time.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "convert_ucf101.py"
PLAIN_LOOP = """
import sys
from pathlib import Path
import av

source, out_dir = map(Path, sys.argv[1:])
for video in sorted(source.glob("train/*/*.avi")):
    with av.open(str(video)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)]
    folder = out_dir / "images" / "train" / video.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        images[i * len(images) // 8].save(folder / f"{video.stem}.{i}.jpg", quality=95)
"""


def write_clip(path: Path, n: int, rng: np.random.Generator, b_frames: bool):
    """Writes a clip of `n` frames: a window that moves over a picture of smooth random blobs."""
    coarse = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    picture = av.VideoFrame.from_ndarray(coarse).reformat(width=640, height=480).to_ndarray(format="rgb24")
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.codec_tag, stream.width, stream.height, stream.pix_fmt = "XVID", 320, 240, "yuv420p"
        stream.bit_rate = 500_000
        stream.codec_context.max_b_frames = 2 if b_frames else 0
        for i in range(n):
            window = picture[i : i + 240, 2 * i % 320 :][:, :320].astype(np.int16)
            noisy = (window + rng.integers(-6, 7, window.shape)).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy)))
        container.mux(stream.encode())


def jpegs(out_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out_dir.glob("images/train/*/*.jpg")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        (source / "train" / "Clip").mkdir(parents=True)
        rng = np.random.default_rng(0)
        lengths = rng.integers(25, 181, args.videos)
        for k, n in enumerate(lengths):
            write_clip(source / "train" / "Clip" / f"v_Clip_g01_c{k:04d}.avi", int(n), rng, b_frames=k % 3 == 0)
        out_dir, expected = Path(folder, "out"), None
        converter = [sys.executable, SCRIPT, "--source", source, "--out_dir", out_dir, "--num_workers"]
        cases = {"plain loop": [sys.executable, "-c", PLAIN_LOOP, source, out_dir]}
        for workers in sorted({1, cores}):
            cases[f"converter, {workers} worker{'s' * (workers > 1)}"] = [*converter, str(workers)]
        seconds = {name: [] for name in cases}
        for repetition in range(args.repetitions + 1):
            for name, command in cases.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                if repetition:
                    seconds[name].append(time.perf_counter() - start)
                else:  # the first round fills the file cache and is not timed
                    expected = expected or jpegs(out_dir)
                    assert jpegs(out_dir) == expected and len(expected) == 8 * args.videos
                shutil.rmtree(out_dir)
    base = statistics.median(seconds["plain loop"])
    print(f"Python {platform.python_version()}, PyAV {av.__version__}, {cores} CPUs")
    print(
        f"{args.videos} videos, {lengths.sum():,} frames, {args.repetitions} repetitions, load {os.getloadavg()[0]:.2f}"
    )
    print(f"{'case':24}{'s':>8}{'min':>8}{'max':>8}{'videos/s':>10}{'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:24}{median:>8.3f}{min(times):>8.3f}{max(times):>8.3f}{args.videos / median:>10.1f}"
            f"{base / median:>8.2f}"
        )


if __name__ == "__main__":
    main()
