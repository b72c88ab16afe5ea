"""Converts videos into frames and conversations in jsonl, which finetune_hf_trainer_ucf101.py trains on.

    python convert_ucf101.py --out_dir /path/to/converted_ucf101               # the Hub's UCF101 subset
    python convert_ucf101.py --source my_videos --out_dir my_data              # my_videos/{train,val,test}/Class/*.avi
    python convert_ucf101.py --source UCF101_subset.tar.gz --out_dir my_data   # the same tree, packed

From a video with n frames, the converter takes frame floor(i * n / num_frames) for i = 0, 1, …; a video with fewer
than num_frames frames repeats some of them. If the frame rate varies, it takes the frames that a player shows at evenly
spaced times instead. Frames are turned as players turn them, by the video's display matrix. The converter writes
`images/{split}/{Class}/{video}.{i}.jpg` (JPEG quality 95, not resized), `ucf101_{split}.jsonl`, and `conversion.json`,
which records the settings, and lists the videos that were turned, whose frame rate varies, or that were left out.
OUT_DIR appears only when it is complete, and is the same on every run. Every video that is found gets an id, so that
leaving out a bad video does not change the ids of the others.

Every file that PyAV opens as one of CONTAINERS is a video, whatever its name ends with. All other files, and folders in
which the converter does not look, are listed as left aside. A class that has no videos, or loses all videos of a split,
is an error. So is a link that leads out of SOURCE, unless --follow_links is given.

A video is bad, and is left out with a message, if it has no frames, if its decoder is missing or stops with an error,
if its frames are larger than MOST_PIXELS, if decoding takes too long, if it is turned by an angle that is no multiple
of 90 degrees, or if an .avi is shorter than its header says: its remaining frames would not be spread over the whole
clip. A video whose damage the decoder repairs with a warning is not
bad: many old XviD clips have such damage, and any player shows them. A truncated file of another kind, such as .mkv or
.ts, may decode as a shorter video and is not noticed.

Archives and videos may come from strangers. Of an archive, only regular files and folders are unpacked, below a new
folder and up to a limit; FFmpeg gets an open file and can open no other.

This file needs only the packages av, pillow and tqdm, and huggingface_hub for a download. It also works alone, on a
machine without the other files of this repository.
"""

import argparse
import bz2
import errno
import fcntl
import gc
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import unicodedata
import zlib
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import av
from av.stream import Disposition
from PIL.Image import Transpose
from tqdm import tqdm

# The package's __init__ loads torch and transformers, which takes seconds, and a machine that converts may not have
# them. So this module is imported from a package whose __init__ has not run.
if "phi3v" not in sys.modules and (spec := importlib.util.find_spec("phi3v")):
    sys.modules["phi3v"] = importlib.util.module_from_spec(spec)
try:
    from phi3v.flag_hints import HintingParser
except ImportError:  # this file is alone, and has no hints
    HintingParser = argparse.ArgumentParser

HUB_DATASET, HUB_ARCHIVE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
ATTEMPTS, LONGEST_WAIT = 3, 900  # downloads that are tried, and seconds between two of them
SPLITS = ("train", "val", "test")
# A file of such a name that can't be opened is a bad video. A file of another name that can't be opened is none.
SUFFIXES = set(
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogm .ogv .rm .rmvb "
    ".ts .vob .webm .wmv".split()
)
# The containers, by FFmpeg's names, that are read. Not among them: lists of other files (concat, hls, dash, sdp),
# pictures, and formats that take any file (tty).
CONTAINERS = (
    "apng asf asf_o av1 avi avs2 avs3 cavsvideo dhav dirac dv flv gif gxf h261 h263 h264 hevc ivf kux live_flv m4v "
    "matroska mjpeg mov mpeg mpegts mpegtsraw mpegvideo mxf nsv nut nuv obu ogg rm vc1 vc1test vvc webm wtv "
    "yuv4mpegpipe"
).split()
MOST_PIXELS = 2**26  # of a frame; 8K video has 33 million, and training refuses images of 179 million
FFMPEG_OPTIONS = {  # it may open no other file, and refuses large frames before it decodes them
    "format_whitelist": ",".join(CONTAINERS),
    "protocol_whitelist": "none",
    "max_pixels": str(MOST_PIXELS),
}
# Tokens of the chat format, such as <|end|>, and places of images in other formats. Training refuses texts with these.
RESERVED = re.compile(r"<[^<>]*>|\[IMG", re.IGNORECASE)
SHOWN = 10  # lines of a long list
# What the display matrix does with a frame, by the signs of its upper left four numbers.
TURNS = {
    (0, 1, -1, 0): (Transpose.ROTATE_270, "90 degrees clockwise"),
    (-1, 0, 0, -1): (Transpose.ROTATE_180, "180 degrees"),
    (0, -1, 1, 0): (Transpose.ROTATE_90, "90 degrees counterclockwise"),
    (-1, 0, 0, 1): (Transpose.FLIP_LEFT_RIGHT, "mirrored, left to right"),
    (1, 0, 0, -1): (Transpose.FLIP_TOP_BOTTOM, "mirrored, top to bottom"),
    (0, 1, 1, 0): (Transpose.TRANSPOSE, "mirrored along the falling diagonal"),
    (0, -1, -1, 0): (Transpose.TRANSVERSE, "mirrored along the rising diagonal"),
}
# What conversion.json lists beside bad videos, each with what a user is told about their number.
NOTES = {
    "turned": "turned as their display matrix says",
    "uneven": "of a variable frame rate: their frames are evenly spaced in time",
    "not_square": "with pixels that are not square: used as stored, not stretched as players do",
    "left_aside": "left aside",
}
JPEG_QUALITY = 95
SECRET = re.compile("token|key|passw|secret", re.IGNORECASE)
KEPT_BYTES = 64 * 2**20  # a few hundred frames of 320 x 240
LAYOUT = "{train,val,test}/Class/video.avi"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
MARK = ".being_written"  # an empty file in a folder that is not complete yet; only such folders are deleted
RESULTS = {"images", "conversion.json", *(f"ucf101_{split}.jsonl" for split in SPLITS)}
# Limits of an archive. The bytes are counted while they are read, because headers may say anything.
MOST_MEMBERS = 500_000
MOST_GIB, MOST_TIMES, FREE_BYTES = 500, 50, 64 * 2**20  # unpacked; also no more than MOST_TIMES of the archive's size
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
DEEPEST, LONGEST_HEADER = 32, 2**20  # folders in a name, and bytes of a header with a long name
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x5d\0\0": lzma.open}


class InputError(ValueError):
    """Something that the user gave is wrong. The message is one line that says what, and what to do."""


def open_regular(path: Path, root: str | None = None) -> int:
    """A descriptor of a regular file, and of nothing else: reading from a named pipe would wait for ever.

    root: a real path that the file must be below, whatever links there are. Raises ValueError if it is not.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if root is None:
        descriptor = os.open(path, flags)
    else:
        parts = os.path.relpath(os.path.realpath(path), root).split("/")
        if parts[0] == "..":
            raise ValueError("a link out of --source")
        descriptor = os.open(root, flags)
        for part in parts:  # no longer links, unless someone puts them there now, and then this fails
            folder = descriptor
            try:
                descriptor = os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder)
            finally:
                os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


class VideoFile(io.BufferedReader):
    """An open file for PyAV to read, which does not let FFmpeg compute for ever. FFmpeg also looks at its `name`.

    root: as `open_regular` takes it. seconds: of computing, for all that is done with the file; by default 30, and 30
    more for each MB.
    """

    def __init__(self, path: Path, root: str | None = None, seconds: float | None = None):
        super().__init__(io.FileIO(str(path), opener=lambda path, _: open_regular(path, root)))
        self.seconds = seconds or 30 + 30 * os.fstat(self.fileno()).st_size / 1e6
        self.end = time.process_time() + self.seconds

    def check_time(self):
        if time.process_time() > self.end:
            raise ValueError(f"decoding takes more than {self.seconds:.0f} s: see --max_seconds_per_video")

    def read(self, size: int = -1) -> bytes:
        self.check_time()
        return super().read(size)


def convert_batch(videos: list[tuple[Path, Path]], num_frames: int, root, seconds) -> list[tuple[str | None, dict]]:
    """For each video and its stem what `convert_video` returns, and the notes that it makes."""
    results = []
    for video, stem in videos:
        notes = {}
        results.append((convert_video(video, stem, num_frames, notes, root, seconds), notes))
        gc.collect()  # a frame whose side data were read is in a reference cycle, and a large one would stay in memory
    return results


def convert_video(
    video: Path, stem: Path, num_frames: int, notes: dict[str, str] | None = None, root=None, seconds=None
) -> str | None:
    """Writes the video's frames to `{stem}.{i}.jpg`. Returns what is wrong with the video, or None if it is good.

    notes: gets the details for each of NOTES that holds for this video. root, seconds: as VideoFile and open_regular
    take them. Raises OSError if the frames can't be written.
    """
    try:
        jpegs, found = sample_jpegs(video, num_frames, root, seconds)
    except Exception as e:  # whatever a decoder raises for a broken file, the other videos are still good
        return " ".join(str(getattr(e, "strerror", None) or e or type(e).__name__).split())
    for i, jpeg in enumerate(jpegs):
        with open(f"{stem}.{i}.jpg", "xb") as file:
            file.write(jpeg)
    if notes is not None:
        notes.update(found)
    return None


def sample_jpegs(video: Path, num_frames: int, root=None, seconds=None) -> tuple[list[bytes], dict[str, str]]:
    """The wanted frames as JPEG files, and for each of NOTES that holds for this video the details.

    Raises ValueError, OSError or av.FFmpegError if the video is bad.

    All frames are decoded in order, because the number of frames in a container's header is not reliable, and seeking
    does not find the same frames. The number is known only at the end, so frames are kept until they fill KEPT_BYTES. A
    longer video is decoded twice instead, and needs the memory of only one frame.
    """
    kept, kept_bytes, times, duration, notes = [], 0, [], None, {}
    with VideoFile(video, root, seconds) as file:
        if is_cut_avi(file):
            raise ValueError("the file is shorter than its header says")
        for frame in decoded(file, notes):
            times.append(frame.pts)
            duration = frame.duration
            kept_bytes += sum(plane.buffer_size for plane in frame.planes)
            if kept_bytes <= KEPT_BYTES:
                kept.append(frame)
            else:
                kept.clear()
        if not times:
            raise ValueError("the video has no frames")
        wanted, unevenness = wanted_frames(times, duration, num_frames)
        if unevenness:
            notes["uneven"] = unevenness
        jpegs = dict.fromkeys(wanted)
        for index, frame in enumerate(kept or decoded(file, notes)):
            if index in jpegs:
                image = frame.to_image()
                if turn := turn_of(frame):
                    image = image.transpose(turn[0])
                    notes["turned"] = turn[1]
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=JPEG_QUALITY)
                jpegs[index] = buffer.getvalue()
    return [jpegs[index] for index in wanted], notes


def wanted_frames(times: list[int | None], duration: int | None, num_frames: int) -> tuple[list[int], str | None]:
    """The indices of `num_frames` frames: evenly spaced by index, or in time if the frame rate varies, with a remark.

    times: of all frames, in any unit, as the container has them; duration: of the last frame, if it is known.
    The rate varies if a frame's time differs from that of a constant rate by more than one frame, or by more than a
    quarter of the distance between two wanted frames. Rounded times and a dropped frame here and there do not count.
    """
    n = len(times)
    by_index = [i * n // num_frames for i in range(num_frames)]
    if n < 3 or None in times or times[0] == times[-1]:
        return by_index, None
    if any(later < earlier for earlier, later in zip(times, times[1:], strict=False)):
        return by_index, "its timestamps run backwards: its frames are evenly spaced by index alone"
    first, length = times[0], times[-1] - times[0]
    # How late each frame is, in units of 1 / (n - 1) of a tick. The average lateness does not matter.
    late = [(time - first) * (n - 1) - k * length for k, time in enumerate(times)]
    most = max(n - 1, min(2 * length, (n - 1) * length / (2 * num_frames)))
    if max(late) - min(late) <= most:
        return by_index, None
    end = times[-1] + (duration or length // (n - 1))
    shown = [(time - first) * num_frames for time in times]
    return [bisect_right(shown, i * (end - first)) - 1 for i in range(num_frames)], f"{n} frames"


def turn_of(frame) -> tuple[Transpose, str] | None:
    """What a player does with the frame before it shows it, as in TURNS; None if it shows the frame as stored.

    Raises ValueError if the display matrix turns the frame by an angle that is no multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    least = 0.02 * max(map(abs, (a, b, c, d)))  # the sine of about one degree
    signs = tuple((value > least) - (value < -least) for value in (a, b, c, d))
    if signs in ((1, 0, 0, 1), (0, 0, 0, 0)):
        return None
    if signs not in TURNS:
        raise ValueError(
            f"it is turned by {-frame.rotation % 360} degrees clockwise, not by 90, 180 or 270: save it upright"
        )
    return TURNS[signs]


def is_cut_avi(file) -> bool:
    """Whether an .avi is shorter than its header says. If it was cut between two frames, decoding would not notice."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF":  # an .avi of more than 1 GB has several such headers
        size = int.from_bytes(head[4:], "little")
        if size == 2**32 - 1:  # the file was written to a pipe, and the size was not known
            return False
        end = file.seek(size, os.SEEK_CUR)
    return end > os.fstat(file.fileno()).st_size


def decoded(file: VideoFile, notes: dict[str, str]):
    """Yields the frames of the first video stream, in order, and notes whether their pixels are square."""
    with opened(file) as container:
        stream = video_stream(container)
        if (ratio := stream.sample_aspect_ratio) not in (None, 0, 1):
            notes["not_square"] = f"{ratio.numerator}:{ratio.denominator}"
        stream.thread_count = 1  # each process decodes a video of its own instead
        if context := stream.codec_context:  # None if there is no decoder, as the next lines find out
            check_pixels(context)
            context.options = {"max_pixels": str(MOST_PIXELS)}
        try:
            for frame in container.decode(stream):
                file.check_time()
                check_pixels(frame)
                yield frame
        except av.ArgumentError:  # what FFmpeg says of frames larger than its max_pixels
            raise ValueError(f"it can't be decoded, or has frames of more than {MOST_PIXELS:,} pixels") from None


def opened(file: VideoFile):
    """The file as PyAV's container. Raises ValueError if it is none of CONTAINERS, and av.FFmpegError."""
    file.seek(0)
    try:
        return av.open(file, options=FFMPEG_OPTIONS)
    except av.ArgumentError:  # what FFmpeg says of a container that is not on its list
        raise ValueError("not in a container of videos") from None


def check_pixels(frame):
    if frame.width * frame.height > MOST_PIXELS:
        raise ValueError(f"frames of {frame.width} x {frame.height} pixels are larger than {MOST_PIXELS:,} pixels")


def video_stream(container):
    """The first video stream that is no cover picture. Raises ValueError that says why the file is not a video."""
    if container.metadata.get("major_brand", "") in ("avif", "heic", "mif1"):
        raise ValueError("a picture")
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("the file has no video stream")
    return streams[0]


def why_not_a_video(path: Path, root: str | None = None) -> str | None:
    """Why something in a class's folder is left aside; None for a video, which may be a bad one."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "a folder inside a class" if path.is_dir() else "not a regular file"
    if path.suffix.lower() in SUFFIXES:
        return None
    try:
        with VideoFile(path, root) as file, opened(file) as container:
            video_stream(container)
    except ValueError as e:  # FFmpeg's errors may be ValueErrors too
        return "not a video that PyAV can open" if isinstance(e, av.FFmpegError) else str(e)
    except (av.FFmpegError, OSError):
        return "not a video that PyAV can open"


def find_videos(root: Path, source: Path, real_root: str | None) -> tuple[dict[str, list[Path]], list[str]]:
    """The videos of each split below `root`, sorted by class and file name, and what is left aside, with the reasons.

    real_root: the real path of `root`, out of which no link may lead; None allows all links. Raises InputError, which
    names `source`, if the layout is another one, if a link leads out, if the output can't have these names, or if a
    class has no videos.
    """
    links = []

    def leads_out(path: Path) -> bool:
        out = real_root and path.is_symlink() and path.exists()
        if out := out and os.path.commonpath([real_root, real := os.path.realpath(path)]) != real_root:
            links.append(f"{path.relative_to(outer)}, to {real}")
        return bool(out)

    outer = root
    if not any((root / split).is_dir() for split in SPLITS):  # an archive may have one folder that holds the splits
        inner = [path for path in root.iterdir() if any((path / split).is_dir() for split in SPLITS)]
        if len(inner) != 1:
            raise InputError(f"{source} holds none of the folders train, val and test: expected {LAYOUT}")
        root = inner[0]
        leads_out(root)
    videos, classes, lost = {}, {}, []
    splits = {root / split for split in SPLITS}
    aside = {path: "not one of the folders train, val and test" for path in (*outer.iterdir(), *root.iterdir())}
    aside = {path: reason for path, reason in aside.items() if path != root and not (path in splits and path.is_dir())}
    for split in SPLITS:
        # Not glob, which silently skips a folder that this user must not read.
        found, entries = [], (root / split).iterdir() if (root / split).is_dir() else []
        leads_out(root / split)
        for folder in entries:
            if not folder.is_dir() or folder.name.startswith("."):
                aside[folder] = "in no class's folder"
                continue
            leads_out(folder)
            reasons = {path: None if leads_out(path) else why_not_a_video(path, real_root) for path in folder.iterdir()}
            others = {path: reason for path, reason in reasons.items() if reason}
            found += reasons.keys() - others.keys()
            if not others.keys() >= reasons.keys():
                aside |= others
            elif set(others.values()) <= {"hidden"}:
                aside[folder] = "an empty folder"
            else:
                first = min(path for path, reason in others.items() if reason != "hidden")
                lost.append(f"{split}/{folder.name} ({first.name}: {others[first]})")
        if not found:
            say(f"note: there are no videos for {split}, so ucf101_{split}.jsonl is not written")
            continue
        videos[split] = sorted(found, key=lambda path: (path.parent.name, path.name))
        classes[split] = {path.parent.name for path in found}
        stems = {}
        for path in videos[split]:
            if (other := stems.setdefault(path.with_suffix(""), path)) != path:
                raise InputError(f"{path} and {other.name} would give the same images: rename one of them")
            if any("\ud800" <= letter <= "\udfff" for letter in path.parent.name + path.name):
                raise InputError(f"{str(path)!r} is not UTF-8, as jsonl must be: rename it")
        for name in sorted(classes[split]):
            if problem := class_problem(name):
                raise InputError(f"{root / split / name} {problem}: rename it")
        if unseen := classes[split] - classes.get("train", classes[split]):
            say(f"warning: {split} has classes that train lacks: {shortened(sorted(unseen), ', ')}", sys.stderr)
    if links:
        raise InputError(
            f"{source}: {len(links)} links lead out of it: {shortened(sorted(links))}: give --follow_links if they may "
            "be used, or put the files themselves there"
        )
    if not videos:
        raise InputError(f"{source} holds no videos: expected {LAYOUT}; any container that PyAV opens will do")
    if lost:
        raise InputError(
            f"{source}: {len(lost)} classes have no videos: {shortened(sorted(lost))}: add some, or remove the folders"
        )
    return videos, sorted(f"{printable(str(path.relative_to(outer)))}: {reason}" for path, reason in aside.items())


def class_problem(name: str) -> str | None:
    """Why a class can't have this name, worded to follow the folder's name: it is the answer that a model learns."""
    if not name.strip():
        return "is a class with a blank name"
    if "," in name:
        return "holds a comma, which separates classes in the prompt"
    if found := RESERVED.search(name):
        return f"holds {found[0]}, and what looks like a token of the chat format can't be in the name of a class"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "holds a line break or another control character, which can't be in the name of a class"


def printable(text: str) -> str:
    """As phi3v.text.printable: with an escape for each character that a terminal may obey, or that can't be seen."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(line: str, file=None):
    """Prints a line in which names from outside can do no harm."""
    print(printable(masked(line)), file=file or sys.stdout)


def shortened(lines: list[str], separator: str = "; ") -> str:
    """The first of a long list, and how many others there are."""
    others = [f"and {len(lines) - SHOWN:,} others"] if len(lines) > SHOWN else []
    return separator.join([*lines[:SHOWN], *others])


def prepare_worker(read_end: int, write_end: int):
    """Ends this worker when its parent ends, even by SIGKILL: reading from the pipe returns when the parent is gone."""
    # Frames that the parent has left must not be freed here: FFmpeg would wait for threads that only the parent has.
    gc.freeze()
    os.close(write_end)
    threading.Thread(target=lambda: os.read(read_end, 1) or os._exit(1), daemon=True).start()


@contextmanager
def worker_pool(num_workers: int):
    """A pool of processes that end when the block is left by an exception, or when this process is killed."""
    pipe = os.pipe()
    fork = multiprocessing.get_context("fork")  # the workers inherit the pipe and the lock
    pool = ProcessPoolExecutor(num_workers, fork, initializer=prepare_worker, initargs=pipe)
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


def write_conversion(
    videos: dict[str, list[Path]], out: Path, num_frames: int, num_workers: int, real_root=None, seconds=None
) -> dict:
    """Converts the videos into the empty folder `out`; returns the counts, the bad videos, and the lists of NOTES that
    are not empty. Raises InputError if a class would lose all videos of a split."""
    jobs = [(split, path, f"{split}/{path.parent.name}/{path.stem}") for split in videos for path in videos[split]]
    gc.collect()  # a frame in a reference cycle must be freed here: a new process would wait for its threads for ever
    for folder in dict.fromkeys((split, path.parent.name) for split, path, _ in jobs):
        out.joinpath("images", *folder).mkdir(parents=True)  # fails for two names that are one on this file system
    with worker_pool(min(num_workers, len(jobs))) as pool:
        # The workers start here. They inherit that signals are blocked, since this process ends them. Python itself
        # would lose a signal during a fork, because it ignores exceptions that a signal handler raises there.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # Not pool.map, which cancels futures: for those, a pool whose workers were killed prints a traceback.
        convert = partial(convert_batch, num_frames=num_frames, root=real_root, seconds=seconds)
        pairs = [(path, out / "images" / name) for _, path, name in jobs]
        size = 1 + min(31, len(jobs) // (64 * num_workers))  # of a batch, so that many tiny files take no time
        futures = [pool.submit(convert, pairs[at : at + size]) for at in range(0, len(pairs), size)]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        # disable=None shows no progress bar in a log file
        results = []
        with tqdm(total=len(jobs), desc="converting", unit="video", disable=None) as progress:
            for future in futures:
                results += future.result()
                progress.update(len(results) - progress.n)
    classes = sorted({path.parent.name for _, path, _ in jobs})
    prompt = f"Classify the video into one of the following classes: {', '.join(classes)}."
    lines, bad, lists = {split: [] for split in videos}, [], {}
    kept, lost = set(), {}
    for number, ((split, path, name), (problem, notes)) in enumerate(zip(jobs, results, strict=True)):
        if problem:
            bad.append(printable(f"{name}{path.suffix}: {problem}"))
            lost.setdefault((split, path.parent.name), bad[-1])
            continue
        kept.add((split, path.parent.name))
        for note, details in notes.items():
            lists.setdefault(note, []).append(printable(f"{name}{path.suffix}: {details}"))
        images = [f"{name}.{i}.jpg" for i in range(num_frames)]
        turn = {"images": images, "user": prompt, "assistant": path.parent.name}
        example = {"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]}
        lines[split].append(json.dumps(example, ensure_ascii=False) + "\n")
    if len(bad) == len(jobs):
        raise InputError(f"none of the {len(jobs)} videos can be decoded; the first: {bad[0]}")
    if lost := [problem for folder, problem in lost.items() if folder not in kept]:
        raise InputError(
            f"{len(lost)} classes would lose all their videos of a split; the first of each: {shortened(lost)}: "
            "replace the videos, or remove the folders of these classes"
        )
    for split in videos:
        (out / f"ucf101_{split}.jsonl").write_text("".join(lines[split]), encoding="utf-8")
    return {"videos": {split: len(lines[split]) for split in videos}, "bad": bad, **lists}


class ArchiveBytes:
    """The bytes of an archive after decompression, of which no more than `most` are read."""

    def __init__(self, file, most: int, limit: InputError):
        self.file, self.left, self.limit = file, most, limit

    def read(self, size: int, or_less: bool = False) -> bytes:
        """`size` bytes, `or_less` at the end. Raises EOFError if there are fewer, and `limit`."""
        content = self.file.read(size)
        if len(content) < size and not or_less:
            raise EOFError("it is cut off")
        self.left -= len(content)
        if self.left < 0:
            raise self.limit
        return content


def next_member(archive: ArchiveBytes) -> tarfile.TarInfo | None:
    """The header of the next member, under its whole name; None at the end. Raises ValueError and tarfile's errors."""
    longer, is_next = {}, False
    while (block := archive.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX_HEADERS):
            member.name = longer.get("path", os.fsencode(member.name)).decode("utf-8", "surrogateescape")
            member.size = int(longer.get("size", member.size))
            if member.size < 0:
                raise ValueError("a member has a negative size")
            if any(key.startswith("GNU.sparse") for key in longer):
                member.type = tarfile.GNUTYPE_SPARSE
            return member
        # This block begins a longer header, for the next member or, as XGLTYPE, for all that follow.
        is_next |= member.type != tarfile.XGLTYPE
        if not 0 <= member.size <= LONGEST_HEADER:
            raise ValueError(f"a header of {member.size:,} bytes")
        content = archive.read(member.size)
        archive.read(-member.size % tarfile.BLOCKSIZE)
        if member.type == tarfile.GNUTYPE_LONGNAME:
            longer["path"] = content.partition(b"\0")[0]
        elif member.type != tarfile.GNUTYPE_LONGLINK and (found := pax_records(content)):
            if member.type != tarfile.XGLTYPE:
                longer |= found
            elif found.keys() & {"path", "size"}:
                raise ValueError("a header gives all members one name or size")
    if is_next:
        raise ValueError("a header without its member")
    return None


def pax_records(content: bytes) -> dict[str, bytes]:
    """The records of a pax header, each of which is `length key=value`. Raises ValueError if it is damaged.

    tarfile's own regular expressions take hours for some headers, in Python before 3.11.10 and 3.12.6.
    """
    records, at = {}, 0
    while at < len(content):
        digits = content[at : at + 20].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(content):
            raise ValueError("a damaged header")
        records[key.decode("utf-8", "replace")] = value[:-1]
        at = end
    return {key: value for key, value in records.items() if value}


def unpack(archive: Path, folder: Path, most_members: int = MOST_MEMBERS, most_gib: float | None = None):
    """Unpacks the regular files and folders of a .tar, which may be compressed, into the empty folder.

    It relies on no filter of tarfile. A file is written only where nothing is, and below folders that were made here,
    so that no member can lead out of the folder or replace what is there. Raises InputError if the archive is damaged,
    is larger than the limits, or holds anything else.
    """
    folders, name = {()}, ""

    def make_folder(parts: tuple[str, ...]):
        if parts not in folders:
            make_folder(parts[:-1])
            os.mkdir(os.path.join(folder, *parts))
            folders.add(parts)

    try:
        with open(open_regular(archive), "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            most = most_gib * 2**30 if most_gib else min(MOST_GIB * 2**30, FREE_BYTES + MOST_TIMES * size)
            start = raw.read(6)
            raw.seek(0)
            decompress = next((open for mark, open in COMPRESSED.items() if start.startswith(mark)), lambda raw: raw)
            said = f"{archive}, of {size:,} bytes, unpacks to more than {most / 2**30:.3g} GiB"
            limit = InputError(f"{said}: if you trust it, raise --max_unpacked_gib")
            content, count = ArchiveBytes(decompress(raw), most, limit), 0
            while member := next_member(content):
                name, count = member.name, count + 1
                if count > most_members:
                    said = f"{archive} holds more than {most_members:,} files and folders"
                    raise InputError(f"{said}: if you trust it, raise --max_members")
                if problem := why_not_unpacked(member):
                    raise InputError(f"{archive} is not safe to unpack: {name[:200]} is {problem}")
                parts = tuple(part for part in name.split("/") if part not in ("", "."))
                make_folder(parts if member.isdir() else parts[:-1])
                if not member.isdir():
                    write_member(content, member.size, os.path.join(folder, *parts))
            # tarfile and gzip check the end only if it is read.
            while rest := content.read(2**20, or_less=True):
                if rest.strip(b"\0"):
                    raise ValueError("data after its end")
    except InputError:
        raise
    except FileExistsError:
        problem = "twice, or as a file and as a folder, or also in other upper and lower case"
        raise InputError(f"{archive} is not safe to unpack: {name[:200]} is in it {problem}") from None
    except (tarfile.TarError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError, OSError) as e:
        reason = str(e) or type(e).__name__
        if getattr(e, "errno", None) == errno.ENAMETOOLONG:
            reason = f"the name {name[:200]} is too long"
        elif getattr(e, "errno", None):  # an error of the system, such as a full disk, not of the archive
            raise
        raise InputError(f"{archive} can't be unpacked ({reason}): is it complete, and a .tar.gz?") from None


def why_not_unpacked(member: tarfile.TarInfo) -> str | None:
    """Why a member of an archive is neither a regular file nor a folder, or may lead out of the folder, on any system;
    None for all others."""
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if member.issym() or member.islnk():
        return "a link: pack the files themselves, with --dereference --hard-dereference of GNU tar"
    if member.type == tarfile.GNUTYPE_SPARSE:
        return "a sparse file: pack it without --sparse"
    if not (member.isfile() or member.isdir()):
        return "neither a file nor a folder"
    if name.startswith("/") or ".." in parts or set(name) & {"\\", "\0"} or re.match("[A-Za-z]:", name):
        return "not a path inside of the archive"
    if len(parts) > DEEPEST or member.isfile() and not parts:
        return f"a file without a name, or inside of more than {DEEPEST} folders"
    return None


def write_member(content: ArchiveBytes, size: int, path: str):
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        for at in range(0, size, 2**20):
            file.write(content.read(min(2**20, size - at)))
    content.read(-size % tarfile.BLOCKSIZE)


def find_source(source: str | None, revision: str | None = None) -> Path:
    """The local folder or archive to convert. If none is given, downloads the archive from the Hub."""
    if source and revision:
        raise InputError(f"--data_revision {revision} is for data on the Hub, and contradicts --source")
    if source:
        if not Path(source).exists():
            raise InputError(f"--source {source} does not exist: give a folder {LAYOUT} or a .tar.gz of one")
        if not Path(source).is_dir() and not Path(source).is_file():
            raise InputError(f"--source {source} is not a file or a folder: give a folder {LAYOUT} or a .tar.gz of one")
        return Path(source)
    return download(revision)


def download(revision: str | None = None) -> Path:
    """The archive from the Hub, compared with the Hub's SHA-256; the cached one if the Hub can't be reached.

    revision: a branch, tag or commit. Raises InputError if the archive can't be had or is damaged.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings are two lines each, with long addresses
    get = partial(hf_hub_download, HUB_DATASET, HUB_ARCHIVE, repo_type="dataset", revision=revision)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not constants.is_offline_mode():
                # Fails within seconds if the Hub can't be reached; the download itself would retry for minutes.
                HfApi().dataset_info(HUB_DATASET, revision=revision, timeout=10)
            path = Path(get())
            break
        except Exception as e:  # the errors of a download have no class in common
            cause = e
            while cause.__cause__:
                cause = cause.__cause__
            reason = masked(" ".join(str(cause).split()) or type(cause).__name__)
            response = getattr(cause, "response", None)
        with suppress(Exception):
            path = Path(get(local_files_only=True))
            say(f"{HUB_DATASET} can't be fetched ({reason}): reads the cached copy instead")
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
        say(f"{HUB_DATASET} can't be downloaded ({reason}): tries again in {wait} s")
        sys.stdout.flush()
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


def fingerprint(root: Path, files: list[Path], real_root: str | None = None) -> str:
    """SHA-256 of names and contents: cheap compared with decoding, and unlike sizes it notices a repaired file."""
    digest = hashlib.sha256()
    for path in files:
        content = b"unreadable"  # a bad video, which is left out later
        with suppress(OSError, ValueError), open(open_regular(path, real_root), "rb") as file:
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
        found, result = dict(done["settings"]), {"videos": dict(done["videos"]), "bad": list(map(str, done["bad"]))}
        result |= {note: list(map(str, done[note])) for note in NOTES if note in done}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{manifest} is broken: remove {out}, or choose another --out_dir") from None
    if other := [f"{key} {found.get(key)}, not {settings[key]}" for key in settings if found.get(key) != settings[key]]:
        raise InputError(f"{out} was converted with {'; '.join(other)}: remove it, or choose another --out_dir")
    return result


@contextmanager
def locked(out: Path):
    """Makes sure that no other conversion writes to `out`. The lock ends when this process ends, however it ends."""
    path = out.parent / f".{out.name}.lock"
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # not O_TRUNC: the file may be a user's
    if path.is_symlink() or path.exists() and (not path.is_file() or path.stat().st_size):
        raise in_the_way(path)
    # A file, because NFS can't lock folders.
    with open(path, "w", opener=lambda path, _: os.open(path, flags, 0o666)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another conversion may have ended and removed the file after it was opened here.
            mine = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.lstat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise InputError(f"another conversion is writing --out_dir {out}: wait until it ends")
        try:
            yield
        finally:
            path.unlink()


def in_the_way(path: Path) -> InputError:
    return InputError(f"{path} is in the way, and was not made by this program: move it away, or choose other folders")


def is_ours(folder: Path) -> bool:
    """Whether a folder holds MARK, nothing, or what earlier versions, which made no MARK, left in such a place."""
    names = {path.name for path in folder.iterdir()}
    splits = any((path / split).is_dir() for path in (folder, *folder.iterdir()) for split in SPLITS)
    return MARK in names or names <= RESULTS or splits


@contextmanager
def fresh_folder(path: Path, mode: int = 0o777):
    """Makes a folder that holds only MARK, in place of what a killed run left, and removes it at the end unless it was
    renamed."""
    if path.is_symlink() or path.exists() and not (path.is_dir() and is_ours(path)):
        raise in_the_way(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode, parents=True)
    try:
        (path / MARK).touch(exist_ok=False)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def convert(args: argparse.Namespace) -> int:
    """Runs the conversion; returns the exit status."""
    out = Path(args.out_dir).resolve()
    source = find_source(args.source, args.data_revision)
    # The name of a snapshot's folder in the Hub's cache is the commit.
    place = {} if args.source else {"repository": HUB_DATASET, "commit": source.parent.name}
    root = None if args.follow_links or source.is_file() else os.path.realpath(source)
    videos, aside = (None, []) if source.is_file() else find_videos(source, source, root)
    sha256 = fingerprint(source, [path for paths in videos.values() for path in paths] if videos else [source], root)
    settings = {"source_sha256": sha256, "num_frames": args.num_frames, "jpeg_quality": JPEG_QUALITY}
    if result := finished_result(out, settings):
        say(f"{out} is already converted; remove it to convert again")
        return summarise(out, result, args.skip_bad_videos or args.on_bad_example == "skip")
    if os.path.ismount(out):
        raise InputError(f"--out_dir {out} is a mount point, which can't be replaced: give a folder below it")
    # Both are named after the output, so that the next run finds and removes what a killed run has left.
    partial = out.parent / f".{out.name}.partial"
    unpacked = Path(args.tmp_dir or out.parent) / f".{out.name}.{hashlib.md5(os.fsencode(out)).hexdigest()}.unpacked"
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out), fresh_folder(partial), fresh_folder(unpacked, 0o700):
            if videos is None:
                (tree := unpacked / "files").mkdir()
                unpack(source, tree, args.max_members, args.max_unpacked_gib)
                root = os.path.realpath(tree)
                videos, aside = find_videos(tree, source, root)
            result = write_conversion(
                videos, partial, args.num_frames, args.num_workers, root, args.max_seconds_per_video
            )
            result |= {"left_aside": aside} if aside else {}
            manifest = json.dumps({"settings": settings, **place, **result}, indent=2, ensure_ascii=False)
            (partial / "conversion.json").write_text(manifest + "\n", encoding="utf-8")
            (partial / MARK).unlink()
            partial.rename(out)  # `out` is an empty folder or does not exist
    except OSError as e:
        raise InputError(f"--out_dir {out} can't be written ({e}): nothing of it was kept") from None
    finally:
        for folder in made:  # these are still empty if the conversion failed
            with suppress(OSError):
                folder.rmdir()
    return summarise(out, result, args.skip_bad_videos or args.on_bad_example == "skip")


def summarise(out: Path, result: dict, skip: bool) -> int:
    """Prints what was converted, noted and left out; returns the exit status."""
    for title, problems in (("left out", result["bad"]), ("left aside", result.get("left_aside", []))):
        for problem in problems[:SHOWN]:
            say(f"{title}: {problem}", sys.stderr)
        if len(problems) > SHOWN:
            say(f"{title}: {len(problems) - SHOWN:,} others; {out}/conversion.json lists all", sys.stderr)
    counts = ", ".join(f"{n} {split}" for split, n in result["videos"].items())
    say(f"{out}: {counts} videos" + (f"; {len(result['bad'])} left out" if result["bad"] else ""))
    for note, told in NOTES.items():
        if note in result:
            say(f"{len(result[note]):,} {'files or folders' if note == 'left_aside' else 'videos'} {told}")
    if result["bad"] and not skip:
        say("the good videos are written; with --on_bad_example skip the exit status would be 0", sys.stderr)
        return 1
    return 0


def stop(number, _frame):
    """The handler of STOP_SIGNALS."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the removal of partial folders
    raise KeyboardInterrupt(number)


def positive(text: str, most: int = 10**9) -> int:
    if not text.isdecimal() or not 1 <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"{text:.40} is not a positive whole number up to {most}")
    return int(text)


def positive_number(text: str) -> float:
    if not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text:.40} is not a positive number such as 20 or 0.5")
    return float(text)


class Parser(HintingParser):
    def error(self, message, hint=""):
        raise InputError(f"{message} ({hint}see --help)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if videos were left out, 2 for wrong input, 130 or 143 after a signal."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--source", help=f"folder {LAYOUT} or a .tar.gz of one; default: {HUB_DATASET} on the Hub")
    parser.add_argument("--data_revision", help="branch, tag or commit of the data on the Hub; default: main")
    parser.add_argument("--out_dir", default="./ucf101", help="new or empty folder (default: %(default)s)")
    parser.add_argument(
        "--tmp_dir", help="folder in which an archive is unpacked meanwhile; default: beside the output"
    )
    frames, workers = partial(positive, most=10_000), partial(positive, most=1_000)
    parser.add_argument("--num_frames", type=frames, default=8, help="frames per video (default: %(default)s)")
    parser.add_argument("--num_workers", type=workers, default=cpus, help="number of processes; default: one per CPU")
    parser.add_argument(
        "--follow_links", action="store_true", help="use videos and folders behind links that lead out of --source"
    )
    parser.add_argument(
        "--max_members",
        type=positive,
        default=MOST_MEMBERS,
        help="most files and folders that an archive may hold (default: %(default)s)",
    )
    parser.add_argument(
        "--max_unpacked_gib",
        type=positive_number,
        help=f"most GiB to which an archive may unpack; default: {MOST_GIB}, or {MOST_TIMES} times its size if that is "
        "less",
    )
    parser.add_argument(
        "--max_seconds_per_video",
        type=positive_number,
        help="most seconds of computing for a video; default: 30, and 30 more for each MB of the file",
    )
    bad = parser.add_mutually_exclusive_group()
    bad.add_argument(
        "--on_bad_example",
        choices=("error", "skip"),
        help="bad videos are left out and listed; error: then end with status 1; skip: with 0 (default: error)",
    )
    bad.add_argument("--skip_bad_videos", action="store_true", help="the older name of --on_bad_example skip")
    try:
        return convert(parser.parse_args(argv))
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        message, status = f"stopped by {signal.Signals(number).name}", 128 + number
    except BrokenProcessPool:
        message, status = "a worker process was killed, perhaps for lack of memory: try fewer --num_workers", 2
    except (InputError, OSError) as e:
        message, status = " ".join(str(e).split()), 2
    say(f"error: {message}", sys.stderr)
    return status


def masked(text: str) -> str:
    """The text with a mask in place of tokens, and of users and passwords in addresses."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if len(token) >= 8:
        text = text.replace(token, "•••")
    # Each name is looked at once: a search for the words inside of it would take quadratic time.
    text = re.sub(
        r"(?<![\w-])(--[\w-]+)(=|\s+)\S+",
        lambda found: f"{found[1]}{found[2]}•••" if SECRET.search(found[1]) else found[0],
        text,
    )
    return re.sub(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{16,}", "•••", text)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    sys.exit(main())
