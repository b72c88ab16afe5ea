"""Converts videos into frames and conversations in jsonl, which finetune_hf_trainer_ucf101.py trains on.

    python convert_ucf101.py --out_dir /path/to/converted_ucf101               # the Hub's UCF101 subset
    python convert_ucf101.py --source my_videos --out_dir my_data              # my_videos/{train,val,test}/Class/*.avi
    python convert_ucf101.py --source UCF101_subset.tar.gz --out_dir my_data   # the same tree, packed

From a video with n frames, the converter takes frame floor(i * n / num_frames) for i = 0, 1, …; a video with fewer
than num_frames frames repeats some of them. It writes `images/{split}/{Class}/{video}.{i}.jpg` (JPEG quality 95, not
resized), `ucf101_{split}.jsonl`, and `conversion.json`, which records the settings. OUT_DIR appears only when it is
complete, and is the same on every run. Every video that is found gets an id, so that leaving out a bad video does not
change the ids of the others.

A video is bad, and is left out with a message, if it has no frames, if its decoder is missing or stops with an error,
or if an .avi is shorter than its header says: its remaining frames would not be spread over the whole clip. A video
whose damage the decoder repairs with a warning is not bad: many old XviD clips have such damage, and any player shows
them. A truncated .mkv or .webm decodes as a shorter video and is not noticed.

This file needs only the packages av, pillow and tqdm, and huggingface_hub for a download. It imports nothing of phi3v,
because that would load torch and transformers, which takes seconds, and a machine that converts may not have them.
"""

import argparse
import fcntl
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import av
from tqdm import tqdm

HUB_DATASET, HUB_ARCHIVE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
ATTEMPTS, LONGEST_WAIT = 3, 900  # downloads that are tried, and seconds between two of them
SPLITS = ("train", "val", "test")
SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm")
JPEG_QUALITY = 95
KEPT_BYTES = 64 * 2**20  # a few hundred frames of 320 x 240
LAYOUT = "{train,val,test}/Class/video.avi"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line that says what, and what to do."""


def convert_video(video: Path, stem: Path, num_frames: int) -> str | None:
    """Writes the video's frames to `{stem}.{i}.jpg`. Returns what is wrong with the video, or None if it is good.

    Raises OSError if the frames can't be written.
    """
    try:
        jpegs = sample_jpegs(video, num_frames)
    except Exception as e:  # whatever a decoder raises for a broken file, the other videos are still good
        return " ".join(str(getattr(e, "strerror", None) or e or type(e).__name__).split())
    for i, jpeg in enumerate(jpegs):
        Path(f"{stem}.{i}.jpg").write_bytes(jpeg)
    return None


def sample_jpegs(video: Path, num_frames: int) -> list[bytes]:
    """The wanted frames as JPEG files. Raises ValueError, OSError or av.FFmpegError if the video is bad.

    All frames are decoded in order, because the number of frames in a container's header is not reliable, and seeking
    does not find the same frames. The number is known only at the end, so frames are kept until they fill KEPT_BYTES. A
    longer video is decoded twice instead, and needs the memory of only one frame.
    """
    if is_cut_avi(video):
        raise ValueError("the file is shorter than its header says")
    kept, kept_bytes, n = [], 0, 0
    for frame in decoded(video):
        n += 1
        kept_bytes += sum(plane.buffer_size for plane in frame.planes)
        if kept_bytes <= KEPT_BYTES:
            kept.append(frame)
        else:
            kept.clear()
    if n == 0:
        raise ValueError("the video has no frames")
    wanted = [i * n // num_frames for i in range(num_frames)]
    jpegs = dict.fromkeys(wanted)
    for index, frame in enumerate(kept or decoded(video)):
        if index in jpegs:
            buffer = io.BytesIO()
            frame.to_image().save(buffer, "JPEG", quality=JPEG_QUALITY)
            jpegs[index] = buffer.getvalue()
    return [jpegs[index] for index in wanted]


def is_cut_avi(video: Path) -> bool:
    """Whether an .avi is shorter than its header says. If it was cut between two frames, decoding would not notice."""
    end = 0
    with open(video, "rb") as file:
        while (head := file.read(8))[:4] == b"RIFF":  # an .avi of more than 1 GB has several such headers
            size = int.from_bytes(head[4:], "little")
            if size == 2**32 - 1:  # the file was written to a pipe, and the size was not known
                return False
            end = file.seek(size, os.SEEK_CUR)
    return end > video.stat().st_size


def decoded(video: Path):
    """Yields the frames of the first video stream, in order."""
    with av.open(str(video)) as container:
        if not container.streams.video:
            raise ValueError("the file has no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1  # each process decodes a video of its own instead
        yield from container.decode(stream)


def find_videos(root: Path, source: Path) -> dict[str, list[Path]]:
    """The videos of each split below `root`, sorted by class and file name.

    Raises InputError, which names `source`, if the layout is another one or if the output can't have these names.
    """
    if not any((root / split).is_dir() for split in SPLITS):  # an archive may have one folder that holds the splits
        inner = [path for path in root.iterdir() if any((path / split).is_dir() for split in SPLITS)]
        if len(inner) != 1:
            raise InputError(f"{source} holds none of the folders train, val and test: expected {LAYOUT}")
        root = inner[0]
    videos, classes = {}, {}
    for split in SPLITS:
        # Not glob, which silently skips a folder that this user must not read.
        folders = [path for path in (root / split).iterdir() if path.is_dir()] if (root / split).is_dir() else []
        found = [path for folder in folders for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        found = [path for path in found if path.is_file() and not path.name.startswith(".")]
        if not found:
            print(f"note: there are no videos for {split}, so ucf101_{split}.jsonl is not written")
            continue
        videos[split] = sorted(found, key=lambda path: (path.parent.name, path.name))
        classes[split] = {path.parent.name for path in found}
        for path, other in zip(videos[split], [None, *videos[split]], strict=False):
            if other and path.with_suffix("") == other.with_suffix(""):
                raise InputError(f"{path} and {other.name} would give the same images: rename one of them")
            if "," in path.parent.name:
                raise InputError(f"{path.parent} holds a comma, which separates classes in the prompt: rename it")
            if any("\ud800" <= letter <= "\udfff" for letter in path.parent.name + path.name):
                raise InputError(f"{str(path)!r} is not UTF-8, as jsonl must be: rename it")
        if unseen := classes[split] - classes.get("train", classes[split]):
            print(f"warning: {split} has classes that train lacks: {', '.join(sorted(unseen))}", file=sys.stderr)
    if not videos:
        raise InputError(f"{source} holds no videos: expected {LAYOUT} (or {', '.join(SUFFIXES[1:])})")
    return videos


def end_with_parent(read_end: int, write_end: int):
    """Ends this worker when its parent ends, even by SIGKILL: reading from the pipe returns when the parent is gone."""
    os.close(write_end)
    threading.Thread(target=lambda: os.read(read_end, 1) or os._exit(1), daemon=True).start()


@contextmanager
def worker_pool(num_workers: int):
    """A pool of processes that end when the block is left by an exception, or when this process is killed."""
    pipe = os.pipe()
    fork = multiprocessing.get_context("fork")  # the workers inherit the pipe and the lock
    pool = ProcessPoolExecutor(num_workers, fork, initializer=end_with_parent, initargs=pipe)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()  # otherwise a worker would write into a folder that is being removed
        raise
    finally:
        pool.shutdown()
        for end in pipe:
            os.close(end)


def write_conversion(videos: dict[str, list[Path]], out: Path, num_frames: int, num_workers: int) -> dict:
    """Converts the videos into the empty folder `out`; returns the counts and the bad videos."""
    jobs = [(split, path, f"{split}/{path.parent.name}/{path.stem}") for split in videos for path in videos[split]]
    for split, path, _ in jobs:
        (out / "images" / split / path.parent.name).mkdir(parents=True, exist_ok=True)
    with worker_pool(min(num_workers, len(jobs))) as pool:
        # The workers start here. They inherit that signals are blocked, since this process ends them. Python itself
        # would lose a signal during a fork, because it ignores exceptions that a signal handler raises there.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # Not pool.map, which cancels futures: for those, a pool whose workers were killed prints a traceback.
        futures = [pool.submit(convert_video, path, out / "images" / name, num_frames) for _, path, name in jobs]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        # disable=None shows no progress bar in a log file
        problems = [future.result() for future in tqdm(futures, desc="converting", unit="video", disable=None)]
    classes = sorted({path.parent.name for _, path, _ in jobs})
    prompt = f"Classify the video into one of the following classes: {', '.join(classes)}."
    lines, bad = {split: [] for split in videos}, []
    for number, ((split, path, name), problem) in enumerate(zip(jobs, problems, strict=True)):
        if problem:
            bad.append(f"{name}{path.suffix}: {problem}")
            continue
        images = [f"{name}.{i}.jpg" for i in range(num_frames)]
        turn = {"images": images, "user": prompt, "assistant": path.parent.name}
        example = {"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]}
        lines[split].append(json.dumps(example, ensure_ascii=False) + "\n")
    if len(bad) == len(jobs):
        raise InputError(f"none of the {len(jobs)} videos can be decoded; the first: {bad[0]}")
    for split in videos:
        (out / f"ucf101_{split}.jsonl").write_text("".join(lines[split]), encoding="utf-8")
    return {"videos": {split: len(lines[split]) for split in videos}, "bad": bad}


def unpack(archive: Path, folder: Path):
    """Unpacks into `folder`. Raises InputError if the archive is damaged or has paths outside of the folder."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
            # tarfile stops at the first block that is not a header. gzip checks the checksum only if the rest is read.
            while rest := tar.fileobj.read(2**20):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("data after its end")
    except tarfile.FilterError as e:
        raise InputError(f"{archive} is not safe to unpack: {e}") from None
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as e:
        if getattr(e, "errno", None):  # an error of the system, such as a full disk, not of the archive
            raise
        raise InputError(f"{archive} can't be unpacked ({e}): is it complete, and a .tar.gz?") from None


def find_source(source: str | None) -> Path:
    """The local folder or archive to convert. If none is given, downloads the archive from the Hub."""
    if source:
        if not Path(source).exists():
            raise InputError(f"--source {source} does not exist: give a folder {LAYOUT} or a .tar.gz of one")
        return Path(source)
    return download()


def download() -> Path:
    """The archive from the Hub, compared with the Hub's SHA-256; the cached one if the Hub can't be reached.

    Raises InputError if it can't be had or is damaged.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings are two lines each, with long addresses
    get = partial(hf_hub_download, HUB_DATASET, HUB_ARCHIVE, repo_type="dataset")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not constants.is_offline_mode():
                # Fails within seconds if the Hub can't be reached; the download itself would retry for minutes.
                HfApi().dataset_info(HUB_DATASET, timeout=10)
            path = Path(get())
            break
        except Exception as e:  # the errors of a download have no class in common
            cause = e
            while cause.__cause__:
                cause = cause.__cause__
            reason = " ".join(str(cause).split()) or type(cause).__name__
            response = getattr(cause, "response", None)
        with suppress(Exception):
            path = Path(get(local_files_only=True))
            print(f"{HUB_DATASET} can't be fetched ({reason}): reads the cached copy instead")
            break
        wait = response.headers.get("Retry-After", "") if response is not None else ""
        wait = int(wait) if wait.isdigit() else 2 ** (attempt - 1)
        final = (
            constants.is_offline_mode()
            or response is not None
            and response.status_code not in (408, 429)
            and response.status_code < 500
        )
        if final or attempt == ATTEMPTS or wait > LONGEST_WAIT:
            command = f"hf download {HUB_DATASET} {HUB_ARCHIVE} --repo-type dataset"
            raise InputError(
                f"{HUB_DATASET} can't be downloaded ({reason}): try again later, check HF_ENDPOINT, HF_TOKEN and the "
                f"proxy variables, or run `{command}` on another machine and pass the file with --source"
            )
        print(f"{HUB_DATASET} can't be downloaded ({reason}): tries again in {wait} s", flush=True)
        time.sleep(wait)
    # In the cache, the name of a large file's content is its SHA-256 on the Hub.
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", expected):
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            command = f"rm {shlex.quote(os.path.realpath(path))}"
            raise InputError(
                f"{HUB_ARCHIVE} of {HUB_DATASET} in the cache is damaged, as its SHA-256 is not the Hub's: run "
                f"`{command}` and start again, and it is downloaded anew"
            )
    return path


def fingerprint(root: Path, files: list[Path]) -> str:
    """SHA-256 of names and contents: cheap compared with decoding, and unlike sizes it notices a repaired file."""
    digest = hashlib.sha256()
    for path in files:
        content = b"unreadable"  # a bad video, which is left out later
        with suppress(OSError), open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(os.fsencode(path.relative_to(root)) + b"\0" + content)
    return digest.hexdigest()


def finished_result(out: Path, settings: dict) -> dict | None:
    """The result of an earlier conversion in `out`; None if `out` is missing or empty. Else raises InputError."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out} is a file")
    manifest = out / "conversion.json"
    if not manifest.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"--out_dir {out} holds other files: choose a new or empty folder")
        return None
    try:
        done = json.loads(manifest.read_text(encoding="utf-8"))
        found, result = dict(done["settings"]), {"videos": dict(done["videos"]), "bad": list(done["bad"])}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{manifest} is broken: remove {out}, or choose another --out_dir") from None
    if other := [f"{key} {found.get(key)}, not {settings[key]}" for key in settings if found.get(key) != settings[key]]:
        raise InputError(f"{out} was converted with {'; '.join(other)}: remove it, or choose another --out_dir")
    return result


@contextmanager
def locked(out: Path):
    """Makes sure that no other conversion writes to `out`. The lock ends when this process ends, however it ends."""
    path = out.parent / f".{out.name}.lock"
    with open(path, "w") as lock:  # a file, because NFS can't lock folders
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another conversion may have ended and removed the file after it was opened here.
            mine = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise InputError(f"another conversion is writing --out_dir {out}: wait until it ends")
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def fresh_folder(path: Path):
    """Makes an empty folder, in place of what a killed run left, and removes it at the end unless it was renamed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def convert(args: argparse.Namespace) -> int:
    """Runs the conversion; returns the exit status."""
    out = Path(args.out_dir).resolve()
    source = find_source(args.source)
    videos = None if source.is_file() else find_videos(source, source)
    sha256 = fingerprint(source, [path for paths in videos.values() for path in paths] if videos else [source])
    settings = {"source_sha256": sha256, "num_frames": args.num_frames, "jpeg_quality": JPEG_QUALITY}
    if result := finished_result(out, settings):
        print(f"{out} is already converted; remove it to convert again")
        return summarise(out, result, args.skip_bad_videos)
    if os.path.ismount(out):
        raise InputError(f"--out_dir {out} is a mount point, which can't be replaced: give a folder below it")
    # Both are named after the output, so that the next run finds and removes what a killed run has left.
    partial = out.parent / f".{out.name}.partial"
    unpacked = Path(args.tmp_dir or out.parent) / f".{out.name}.{hashlib.md5(os.fsencode(out)).hexdigest()}.unpacked"
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out), fresh_folder(partial), fresh_folder(unpacked):
            if videos is None:
                unpack(source, unpacked)
                videos = find_videos(unpacked, source)
            result = write_conversion(videos, partial, args.num_frames, args.num_workers)
            manifest = json.dumps({"settings": settings, **result}, indent=2, ensure_ascii=False)
            (partial / "conversion.json").write_text(manifest + "\n", encoding="utf-8")
            partial.rename(out)  # `out` is an empty folder or does not exist
    except OSError as e:
        raise InputError(f"--out_dir {out} can't be written ({e}): nothing of it was kept") from None
    finally:
        for folder in made:  # these are still empty if the conversion failed
            with suppress(OSError):
                folder.rmdir()
    return summarise(out, result, args.skip_bad_videos)


def summarise(out: Path, result: dict, skip_bad_videos: bool) -> int:
    """Prints what was converted and left out; returns the exit status."""
    for problem in result["bad"]:
        print(f"left out: {problem}", file=sys.stderr)
    counts = ", ".join(f"{n} {split}" for split, n in result["videos"].items())
    print(f"{out}: {counts} videos" + (f"; {len(result['bad'])} left out" if result["bad"] else ""))
    if result["bad"] and not skip_bad_videos:
        print("the good videos are written; with --skip_bad_videos the exit status would be 0", file=sys.stderr)
        return 1
    return 0


def stop(number, _frame):
    """The handler of STOP_SIGNALS."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the removal of partial folders
    raise KeyboardInterrupt(number)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if videos were left out, 2 for wrong input, 130 or 143 after a signal."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", help=f"folder {LAYOUT} or a .tar.gz of one; default: {HUB_DATASET} on the Hub")
    parser.add_argument("--out_dir", default="./ucf101", help="new or empty folder (default: %(default)s)")
    parser.add_argument(
        "--tmp_dir", help="folder in which an archive is unpacked meanwhile; default: beside the output"
    )
    parser.add_argument("--num_frames", type=positive, default=8, help="frames per video (default: %(default)s)")
    parser.add_argument("--num_workers", type=positive, default=cpus, help="number of processes; default: one per CPU")
    parser.add_argument(
        "--skip_bad_videos", action="store_true", help="end with status 0 even if bad videos were left out"
    )
    try:
        return convert(parser.parse_args(argv))
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        message, status = f"stopped by {signal.Signals(number).name}", 128 + number
    except BrokenProcessPool:
        message, status = "a worker process was killed, perhaps for lack of memory: try fewer --num_workers", 2
    except (InputError, OSError) as e:
        message, status = " ".join(str(e).split()), 2
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    sys.exit(main())
