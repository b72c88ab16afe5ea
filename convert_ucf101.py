"""Videos → frames and conversations in jsonl, ready for finetune_hf_trainer_ucf101.py.

    python convert_ucf101.py --out_dir /path/to/converted_ucf101               # the Hub's UCF101 subset
    python convert_ucf101.py --source my_videos --out_dir my_data              # my_videos/{train,val,test}/Class/*.avi
    python convert_ucf101.py --source UCF101_subset.tar.gz --out_dir my_data   # the same tree, packed

Of a video with n frames, frame floor(i * n / num_frames) is taken for i = 0, 1, …, so that a video with fewer frames
repeats the nearest ones. OUT_DIR gets `images/{split}/{Class}/{video}.{i}.jpg` (JPEG quality 95, not resized),
`ucf101_{split}.jsonl`, and `conversion.json`, which says how it was made. It appears whole or not at all, and is the
same on every run. Ids number the videos found, so that leaving out a bad one renumbers no other.
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
from tqdm import tqdm

HUB_DATASET, HUB_ARCHIVE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm")
JPEG_QUALITY = 95
KEPT_BYTES = 64 * 2**20  # a few hundred frames of 320 x 240
LAYOUT = "{train,val,test}/Class/video.avi"


class InputError(ValueError):
    """Something a user gave is wrong: one line that says what, and what to do."""


def wanted_frames(n: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames, evenly spaced from the first, among `n`."""
    return [i * n // num_frames for i in range(num_frames)]


def convert_video(video: Path, stem: Path, num_frames: int) -> str | None:
    """Writes the video's frames to `{stem}.{i}.jpg`; returns what is wrong with the video, or None.

    All frames are decoded in order: what a container says about their number is not reliable, and seeking finds
    other frames. The number is known only at the end, so frames are kept until they fill KEPT_BYTES. A video that
    has more is decoded a second time, and needs the memory of one frame however long it is.
    """
    try:
        if is_cut_avi(video):
            return "its file ends too early"
        kept, kept_bytes, n = [], 0, 0
        for frame in decoded(video):
            n += 1
            kept_bytes += sum(plane.buffer_size for plane in frame.planes)
            if kept_bytes <= KEPT_BYTES:
                kept.append(frame)
            else:
                kept.clear()
        if n == 0:
            return "it has no frames"
        wanted = {}
        for i, index in enumerate(wanted_frames(n, num_frames)):
            wanted.setdefault(index, []).append(i)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(kept or decoded(video)):
            if index in wanted:
                image = frame.to_image()
                for i in wanted[index]:
                    image.save(f"{stem}.{i}.jpg", quality=JPEG_QUALITY)
            if index == max(wanted):
                break
    except (av.FFmpegError, OSError, ValueError) as e:
        for i in range(num_frames):
            Path(f"{stem}.{i}.jpg").unlink(missing_ok=True)
        return f"it can't be decoded ({' '.join(str(e).split())})"
    return None


def is_cut_avi(video: Path) -> bool:
    """Whether an .avi is shorter than its header says: cut between two frames, it would decode as a shorter video."""
    with open(video, "rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 > video.stat().st_size


def decoded(video: Path):
    """The frames of the first video stream, in order. Raises ValueError without one, av.FFmpegError if damaged."""
    with av.open(str(video)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1  # videos are decoded beside one another instead
        # Damage is an error instead of a frame that is patched up.
        stream.codec_context.options = {"err_detect": "explode"}
        yield from container.decode(stream)


def find_videos(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Videos of each split, sorted by class and file name, and the sorted class names of all splits.

    Raises InputError if the folder has another layout, or names that can't be told apart in the output.
    """
    if not any((root / split).is_dir() for split in SPLITS):  # an archive may hold a folder around the splits
        inner = [path for path in root.iterdir() if path.is_dir() and any((path / s).is_dir() for s in SPLITS)]
        if len(inner) != 1:
            raise InputError(f"{root} holds none of the folders train, val and test: expected {LAYOUT}")
        root = inner[0]
    videos, classes = {}, set()
    for split in SPLITS:
        found = [
            path
            for path in (root / split).glob("*/*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
        ]
        if not found:
            print(f"note: no videos for {split}, so no ucf101_{split}.jsonl", file=sys.stderr)
            continue
        videos[split] = sorted(found, key=lambda path: (path.parent.name, path.name))
        seen = {}
        for path in videos[split]:
            if other := seen.get((path.parent.name, path.stem)):
                raise InputError(f"{path} and {other.name} would give the same images: rename one of them")
            seen[path.parent.name, path.stem] = path
        names = {path.parent.name for path in found}
        if comma := [name for name in sorted(names) if "," in name]:
            raise InputError(
                f"class {comma[0]!r} holds a comma, which separates classes in the prompt: rename the folder"
            )
        if unseen := names - classes if split != "train" and "train" in videos else None:
            print(f"warning: {split} has classes that train lacks: {', '.join(sorted(unseen))}", file=sys.stderr)
        classes |= names
    if not videos:
        raise InputError(f"{root} holds no videos: expected {LAYOUT} (or {', '.join(SUFFIXES[1:])})")
    return videos, sorted(classes)


def write_conversion(root: Path, out: Path, num_frames: int, num_workers: int) -> dict:
    """Converts all videos below `root` into the empty folder `out`; returns the counts and the bad videos."""
    videos, classes = find_videos(root)
    prompt = f"Classify the video into one of the following classes: {', '.join(classes)}."
    jobs = [(split, path) for split, paths in videos.items() for path in paths]
    names = [f"{split}/{path.parent.name}/{path.stem}" for split, path in jobs]
    with ProcessPoolExecutor(num_workers) as pool:
        try:
            problems = list(
                tqdm(
                    pool.map(
                        convert_video,
                        [path for _, path in jobs],
                        [out / "images" / name for name in names],
                        [num_frames] * len(jobs),
                    ),
                    total=len(jobs),
                    desc="converting",
                    unit="video",
                )
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    counts, bad = dict.fromkeys(videos, 0), []
    files = {split: open(out / f"ucf101_{split}.jsonl", "w", encoding="utf-8") for split in videos}
    try:
        for number, ((split, path), name, problem) in enumerate(zip(jobs, names, problems, strict=True)):
            if problem:
                bad.append(f"{split}/{path.parent.name}/{path.name}: {problem}")
                continue
            turn = {
                "images": [f"{name}.{i}.jpg" for i in range(num_frames)],
                "user": prompt,
                "assistant": path.parent.name,
            }
            example = {"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]}
            files[split].write(json.dumps(example, ensure_ascii=False) + "\n")
            counts[split] += 1
    finally:
        for file in files.values():
            file.close()
    if not any(counts.values()):
        raise InputError(f"none of the {len(jobs)} videos can be decoded; the first: {bad[0]}")
    return {"videos": counts, "bad": bad}


def unpack(archive: Path, folder: Path):
    """Unpacks into `folder`, and refuses an archive that reaches out of it."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.FilterError as e:
        raise InputError(f"{archive} is not safe to unpack: {e}") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
        raise InputError(f"{archive} can't be unpacked ({e}): is it complete, and a .tar.gz?") from None


def find_source(source: str | None) -> Path:
    """The local folder or archive to convert; without one, the Hub's archive is downloaded."""
    if source:
        if not Path(source).exists():
            raise InputError(f"--source {source} does not exist: give a folder {LAYOUT} or a .tar.gz of one")
        return Path(source)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_DATASET, HUB_ARCHIVE, repo_type="dataset"))
    except Exception as e:  # the download's errors have no class in common
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{HUB_DATASET} can't be downloaded ({reason}): pass a local copy with --source") from None


def describe(source: Path, num_frames: int) -> dict:
    """What a finished conversion depends on."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return {"files": len(files), "bytes": size, "num_frames": num_frames, "jpeg_quality": JPEG_QUALITY}


def convert(args: argparse.Namespace) -> int:
    """Runs the conversion; returns the exit status."""
    out = Path(args.out_dir).absolute()
    source = find_source(args.source)
    settings = describe(source, args.num_frames)
    manifest = out / "conversion.json"
    if out.is_file():
        raise InputError(f"--out_dir {out} is a file")
    if manifest.is_file():
        done = json.loads(manifest.read_text(encoding="utf-8"))
        if done["settings"] != settings:
            raise InputError(
                f"{out} was converted with other settings ({done['settings']}): remove it, or choose another --out_dir"
            )
        print(f"{out} is converted already; remove it to convert again")
        return summarise(out, done["result"], args.skip_bad_videos)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out_dir {out} holds other files: choose a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.partial-*"):
        if not is_running(int(leftover.name.rsplit("-", 1)[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        if source.is_file():
            if args.tmp_dir:
                Path(args.tmp_dir).mkdir(parents=True, exist_ok=True)
            # Beside the output by default: inside the folder that the next run clears up if this one is killed.
            with tempfile.TemporaryDirectory(dir=args.tmp_dir or partial) as unpacked:
                unpack(source, Path(unpacked))
                result = write_conversion(Path(unpacked), partial, args.num_frames, args.num_workers)
        else:
            result = write_conversion(source, partial, args.num_frames, args.num_workers)
        content = {"settings": settings, "result": result}
        (partial / "conversion.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        try:
            partial.rename(out)  # onto an empty folder, or none
        except OSError:
            raise InputError(f"--out_dir {out} was filled by another process meanwhile: nothing was changed") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summarise(out, result, args.skip_bad_videos)


def summarise(out: Path, result: dict, skip_bad_videos: bool) -> int:
    for problem in result["bad"]:
        print(f"left out: {problem}", file=sys.stderr)
    counts = ", ".join(f"{n} {split}" for split, n in result["videos"].items())
    print(f"{out}: {counts} videos" + (f"; {len(result['bad'])} left out" if result["bad"] else ""))
    if result["bad"] and not skip_bad_videos:
        print("the good videos are written; --skip_bad_videos accepts this with status 0", file=sys.stderr)
        return 1
    return 0


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if videos were left out, 2 for wrong input."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", help=f"folder {LAYOUT} or a .tar.gz of one; default: {HUB_DATASET} on the Hub")
    parser.add_argument("--out_dir", default="./ucf101", help="new or empty folder (default: %(default)s)")
    parser.add_argument("--tmp_dir", help="where an archive is unpacked for the time being; default: beside the output")
    parser.add_argument("--num_frames", type=positive, default=8, help="frames a video (default: %(default)s)")
    parser.add_argument(
        "--num_workers", type=positive, default=len(os.sched_getaffinity(0)), help="processes; default: one per CPU"
    )
    parser.add_argument("--skip_bad_videos", action="store_true", help="status 0 although videos had to be left out")
    try:
        return convert(parser.parse_args(argv))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
