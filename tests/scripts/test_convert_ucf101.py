"""The converter on real .avi files, in which the brightness of a frame tells its number."""

import errno
import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import convert_ucf101

SCRIPT = Path(convert_ucf101.__file__)


def write_avi(path, n, b_frames=False):
    """`n` frames of 64 x 48 pixels; frame i has brightness 20 + 24 * (i % 9) left and 20 + i % 230 right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.codec_tag, stream.width, stream.height, stream.pix_fmt = "XVID", 64, 48, "yuv420p"
        stream.codec_context.max_b_frames = 2 if b_frames else 0
        stream.bit_rate = 2_000_000
        container.start_encoding()  # writes a header even if no frame follows
        for i in range(n):
            pixels = np.full((48, 64, 3), 20 + 24 * (i % 9), np.uint8)
            pixels[:, 32:] = 20 + i % 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())


def make_source(root, lengths=(3, 8, 30)):
    for split, classes in {"train": ("Jump", "Run"), "val": ("Jump", "Run"), "test": ("Run",)}.items():
        for name in classes:
            for k, n in enumerate(lengths):
                write_avi(root / split / name / f"v_{name}_g01_c{k + 1:02d}.avi", n)
    (root / "train" / "Run" / "._v_Run_g01_c01.avi").write_bytes(b"not a video")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "UCF101_subset")


def pack(source, archive, mode="w:gz"):
    with tarfile.open(archive, mode, dereference=True) as tar:  # files that are hard links are packed as files
        tar.add(source, "UCF101_subset")
    return archive


@pytest.fixture(scope="module")
def long_source(tmp_path_factory):
    """A source that takes about ten seconds to convert."""
    first = tmp_path_factory.mktemp("long") / "source" / "train" / "Run" / "v_000.avi"
    write_avi(first, 300)
    for k in range(1, 400):
        os.link(first, first.with_name(f"v_{k:03d}.avi"))
    return first.parents[2]


def start(*args, **kwargs):
    command = [sys.executable, SCRIPT, *args, "--num_workers", "2"]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_frames(process, partial):
    wait_for(lambda: process.poll() is not None or next(partial.glob("images/*/*/*.jpg"), None))
    assert process.poll() is None, process.stderr.read()


def alive(session):
    """The ids of the processes of a session, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def convert(*args):
    return convert_ucf101.main([*map(str, args), "--num_workers", "1"])


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_output_of_a_folder(source, tmp_path):
    out = tmp_path / "out"
    assert convert("--source", source, "--out_dir", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "conversion.json",
        "images",
        "ucf101_test.jsonl",
        "ucf101_train.jsonl",
        "ucf101_val.jsonl",
    ]
    lines = [json.loads(line) for line in (out / "ucf101_val.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"val-{i:010d}" for i in range(6, 12)]
    assert lines[3] == {
        "id": "val-0000000009",
        "source": "ucf101",
        "conversations": [
            {
                "images": [f"val/Run/v_Run_g01_c01.{i}.jpg" for i in range(8)],
                "user": "Classify the video into one of the following classes: Jump, Run.",
                "assistant": "Run",
            }
        ],
    }
    for line in lines:
        for name in line["conversations"][0]["images"]:
            with Image.open(out / "images" / name) as image:
                assert (image.format, image.size) == ("JPEG", (64, 48))
    assert json.loads((out / "ucf101_test.jsonl").read_text().splitlines()[0])["id"] == "test-0000000012"
    assert len(list((out / "images").rglob("*.jpg"))) == 15 * 8


@pytest.mark.parametrize("b_frames", [False, True])
@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 25, 180])
def test_frames_are_those_of_a_sequential_decode(n, b_frames, tmp_path, monkeypatch):
    video = tmp_path / "v.avi"
    write_avi(video, n, b_frames)
    frames = [frame.to_image() for frame in av.open(str(video)).decode(video=0)]
    assert len(frames) == n
    for kept_bytes in (convert_ucf101.KEPT_BYTES, 10 * 64 * 48):  # all frames kept, and decoded twice
        monkeypatch.setattr(convert_ucf101, "KEPT_BYTES", kept_bytes)
        (tmp_path / str(kept_bytes)).mkdir()
        assert convert_ucf101.convert_video(video, tmp_path / str(kept_bytes) / "v", 8) is None
        for i in range(8):
            expected = io.BytesIO()
            frames[i * n // 8].save(expected, "JPEG", quality=convert_ucf101.JPEG_QUALITY)
            assert (tmp_path / str(kept_bytes) / f"v.{i}.jpg").read_bytes() == expected.getvalue()


@pytest.mark.slow
def test_same_bytes_from_archive_folder_and_any_number_of_workers(source, tmp_path):
    archive = pack(source, tmp_path / "UCF101_subset.tar.gz")
    assert convert("--source", source, "--out_dir", tmp_path / "a") == 0
    assert convert_ucf101.main(["--source", str(archive), "--out_dir", str(tmp_path / "b"), "--num_workers", "2"]) == 0
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    first.pop("conversion.json"), second.pop("conversion.json")
    assert first == second and len(first) == 123


@pytest.mark.slow
def test_bad_videos_are_left_out_and_reported(tmp_path, capfd):
    root = make_source(tmp_path / "source", (5,))
    run = root / "train" / "Run"
    (run / "empty.avi").write_bytes(b"")
    (run / "text.avi").write_text("no video at all")
    whole = (run / "v_Run_g01_c01.avi").read_bytes()
    (run / "cut.avi").write_bytes(whole[: whole.rindex(b"00dc", 0, whole.rindex(b"idx1"))])  # between two frames
    (run / "codec.avi").write_bytes(whole.replace(b"XVID", b"ZZZZ"))
    write_avi(run / "frames.avi", 0)
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 1
    message = capfd.readouterr().err
    for name, reason in {
        "empty": "Invalid data found",
        "text": "Invalid data found",
        "cut": "the file is shorter than its header says",
        "codec": "Decoder not found",
        "frames": "the video has no frames",
    }.items():
        assert f"left out: train/Run/{name}.avi: {reason}" in message
    assert "Traceback" not in message
    lines = (tmp_path / "out" / "ucf101_train.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["train-0000000000", "train-0000000006"]
    assert not [p for p in (tmp_path / "out").rglob("*.jpg") if not p.name.startswith("v_")]
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 1  # the rerun says so again
    assert "--on_bad_example skip" in capfd.readouterr().err
    for number, flags in enumerate((["--on_bad_example", "skip"], ["--skip_bad_videos"])):
        assert convert("--source", root, "--out_dir", tmp_path / f"skip{number}", *flags) == 0
        assert "left out: train/Run/empty.avi" in capfd.readouterr().err


@pytest.mark.slow
def test_nothing_but_bad_videos(tmp_path, capfd):
    (tmp_path / "source" / "train" / "Run").mkdir(parents=True)
    (tmp_path / "source" / "train" / "Run" / "a.avi").write_bytes(b"")
    assert convert("--source", tmp_path / "source", "--out_dir", tmp_path / "out") == 2
    assert "error: none of the 1 videos can be decoded" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("escape", ["../outside.avi", "absolute", "link"])
def test_archives_cannot_write_outside(escape, tmp_path, capfd):
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(escape)
        if escape == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "../../outside"
        elif escape == "absolute":
            member.name = "../" * 12 + str(tmp_path / "outside.avi").lstrip("/")
        tar.addfile(member, io.BytesIO())
    assert convert("--source", archive, "--out_dir", tmp_path / "out") == 2
    assert "is not safe to unpack" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar.gz"]


DAMAGES = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut in its checksum": lambda whole: whole[:-5],
    "wrong checksum": lambda whole: whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:],
    "two in one, of which tarfile reads the first": lambda whole: whole + whole,
    "no archive": lambda whole: b"not an archive",
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive(damage, source, tmp_path, capfd):
    archive = pack(source, tmp_path / "UCF101_subset.tar.gz")
    archive.write_bytes(DAMAGES[damage](archive.read_bytes()))
    assert convert("--source", archive, "--out_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {archive} can't be unpacked") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


def decodes_to(data, **options):
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.options = options
        try:
            return sum(1 for _ in container.decode(video=0))
        except av.FFmpegError:
            return None


def test_damage_that_the_decoder_patches_up_is_accepted(tmp_path):
    video = tmp_path / "v.avi"
    write_avi(video, 30)
    whole = video.read_bytes()
    for position in range(whole.index(b"movi") + 12, whole.rindex(b"idx1")):
        damaged = whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :]
        if decodes_to(damaged) == 30 and decodes_to(damaged, err_detect="explode") is None:
            break
    else:
        pytest.fail("no damage of that kind found")
    video.write_bytes(damaged)
    assert convert_ucf101.convert_video(video, tmp_path / "v", 8) is None
    assert len(list(tmp_path.glob("v.*.jpg"))) == 8


@pytest.mark.parametrize(
    ("head", "cut"),
    [
        (b"RIFF\x0c\0\0\0AVI 12345678", False),
        (b"RIFF\x0d\0\0\0AVI 12345678", True),
        (b"RIFF\x04\0\0\0AVI RIFF\x04\0\0\0AVIX", False),
        (b"RIFF\x04\0\0\0AVI RIFF\x05\0\0\0AVIX", True),
        (b"RIFF\xff\xff\xff\xffAVI 1234", False),  # written to a pipe
        (b"", False),
    ],
)
def test_is_cut_avi(head, cut, tmp_path):
    (tmp_path / "v.avi").write_bytes(head)
    assert convert_ucf101.is_cut_avi(open(tmp_path / "v.avi", "rb")) == cut


@pytest.mark.slow
def test_reruns_never_mix(source, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    assert convert("--source", source, "--out_dir", out) == 0
    before = content(out)
    assert convert("--source", source, "--out_dir", out) == 0
    assert "already converted" in capfd.readouterr().out
    assert convert("--source", source, "--out_dir", out, "--num_frames", "4") == 2
    assert "was converted with num_frames 8, not 4" in capfd.readouterr().err
    assert content(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    assert convert("--source", source, "--out_dir", tmp_path / "other") == 2
    assert "holds other files" in capfd.readouterr().err
    assert content(tmp_path / "other") == {"mine.txt": b"keep"}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_video_repaired_in_place_is_noticed(packed, tmp_path, capfd):
    video = tmp_path / "source" / "train" / "Run" / "v.avi"
    write_avi(video, 3)
    write_avi(video.with_name("w.avi"), 3)
    good = video.read_bytes()
    for content, status in ((bytes(len(good)), 1), (good, 2)):
        video.write_bytes(content)
        os.utime(video, (1, 1))
        source = pack(video.parents[2], tmp_path / "source.tar", "w:") if packed else video.parents[2]
        os.utime(source, (1, 1))
        assert convert("--source", source, "--out_dir", tmp_path / "out") == status
    assert "out was converted with source_sha256" in capfd.readouterr().err


@pytest.mark.parametrize("manifest", [b"", b"\xff", b"[]", b"{}", b'{"settings": 1, "videos": {}, "bad": []}'])
def test_a_broken_conversion_json(manifest, source, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_bytes(manifest)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and "conversion.json is broken: remove" in error and error.count("\n") == 1
    assert content(tmp_path / "out") == {"conversion.json": manifest}


@pytest.mark.parametrize("flags", [["--out_dir", "file/out"], ["--out_dir", "/proc/out"], ["--out_dir", "x" * 255],
                                   ["--out_dir", "new/folder/out", "--tmp_dir", "file/tmp"]])  # fmt: skip
def test_places_that_cannot_be_written(flags, source, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert convert("--source", source, *flags) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --out_dir ") and "can't be written" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_mount_point_is_refused_before_the_work(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    assert "is a mount point" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_failed_write_ends_the_run(packed, source, tmp_path):
    given = pack(source, tmp_path / "source.tar.gz") if packed else source
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # noqa: E731
    process = start("--source", given, "--out_dir", tmp_path / "new" / "out", preexec_fn=limit)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2, error
    assert error.startswith("error: --out_dir ") and "File too large" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == (["source.tar.gz"] if packed else [])


@pytest.mark.slow
def test_output_appears_only_when_all_is_written(source, tmp_path, capfd, monkeypatch):
    write_text = Path.write_text

    def full_disk(path, *args, **kwargs):
        if path.name == "conversion.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        assert not (tmp_path / "out").exists()
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    assert "No space left on device" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_worker_that_dies(source, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(convert_ucf101, "sample_jpegs", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    assert capfd.readouterr().err.startswith("error: a worker process was killed")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_busy_worker_is_not_waited_for(source, tmp_path, monkeypatch):
    def sample_jpegs(video, *_):
        if "train/Jump" not in str(video):
            time.sleep(300)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_ucf101, "sample_jpegs", sample_jpegs)
    before = time.monotonic()
    flags = ["--source", str(source), "--out_dir", str(tmp_path / "out"), "--num_workers", "15"]
    assert convert_ucf101.main(flags) == 130
    assert time.monotonic() - before < 200 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send", "packed"),
    [(signal.SIGINT, os.killpg, False), (signal.SIGTERM, os.kill, True)],  # as Ctrl-C in a terminal; as `kill`
)
def test_a_stopped_run_leaves_nothing_behind(number, send, packed, long_source, tmp_path):
    source = pack(long_source, tmp_path / "source.tar.gz") if packed else long_source
    (tmp_path / "tmp").mkdir()
    process = start("--source", source, "--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp")
    wait_for_frames(process, tmp_path / ".out.partial")
    workers = [pid for pid in alive(process.pid) if pid != process.pid]
    assert len(workers) == 2
    for pid in workers:  # a signal to them alone changes nothing
        os.kill(pid, number)
    time.sleep(0.1)
    assert process.poll() is None and len(alive(process.pid)) == 3
    send(process.pid, number)
    with suppress(ProcessLookupError):
        send(process.pid, number)  # an impatient user
    error = process.communicate(timeout=300)[1]
    assert (process.returncode, error) == (128 + number, f"error: stopped by {number.name}\n")
    assert not alive(process.pid)
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["source.tar.gz", "tmp"] if packed else ["tmp"])


@pytest.mark.slow
def test_after_a_killed_run_the_next_one_starts_clean(source, long_source, tmp_path):
    flags = ["--out_dir", tmp_path / "out", "--tmp_dir", tmp_path / "tmp"]
    process = start("--source", pack(long_source, tmp_path / "long.tar.gz"), *flags)
    wait_for_frames(process, tmp_path / ".out.partial")
    process.kill()
    process.communicate(timeout=300)
    wait_for(lambda: not alive(process.pid))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", ".out.partial", "long.tar.gz", "tmp"]
    assert convert("--source", source, *flags) == 0
    assert convert("--source", source, "--out_dir", tmp_path / "whole") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.tar.gz", "out", "tmp", "whole"]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_two_conversions_at_once(source, long_source, tmp_path, capfd):
    process = start("--source", long_source, "--out_dir", tmp_path / "out")
    wait_for_frames(process, tmp_path / ".out.partial")
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    assert "error: another conversion is writing --out_dir" in capfd.readouterr().err
    assert convert("--source", source, "--out_dir", tmp_path / "other") == 0
    assert process.poll() is None and (tmp_path / ".out.partial" / "images" / "train" / "Run" / "v_000.0.jpg").exists()
    process.terminate()
    process.communicate(timeout=300)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 0


def test_a_lock_that_its_holder_removed_meanwhile(source, tmp_path, capfd, monkeypatch):
    flock = fcntl.flock

    def late(file, operation):
        Path(file.name).unlink()
        Path(file.name).touch()  # a third conversion's
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 2
    assert "another conversion is writing" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [".out.lock"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds none of the folders train, val and test"),
        (("train/Run/a.avi", "train/Run/a.b.avi", "train/Run/a.mp4"), "would give the same images"),
        (("train/notes.txt",), "holds no videos"),
        (("train/Run/a.avi", "train/Run/a.mp4"), "would give the same images"),
        (("train/Run, fast/a.avi",), "holds a comma"),
        (("train/Run/\udcff.avi",), "is not UTF-8"),
    ],
)
def test_sources_of_another_layout(files, message, tmp_path, capfd):
    (tmp_path / "source").mkdir()
    for name in files:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert convert("--source", tmp_path / "source", "--out_dir", tmp_path / "out") == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_frames", "0"], "0 is not a positive whole number"),
        (["--num_workers", "-1"], "-1 is not a positive whole number"),
        (["--source", "nowhere"], "--source nowhere does not exist"),
        (["--frames", "4"], "unrecognized arguments: --frames 4"),
        (["--source", "tests", "--data_revision", "v1"], "--data_revision v1 is for data on the Hub, and contradicts"),
        (["--token", "s3cret"], "unrecognized arguments: --token ••• (see --help)"),
        (["--source", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"], "--source ••• does not exist"),
        (["--on_bad_example", "ignore"], "invalid choice: 'ignore'"),
        (["--on_bad_example", "error", "--skip_bad_videos"], "not allowed with argument --on_bad_example"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capfd):
    assert convert_ucf101.main([*flags, "--out_dir", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_default_source_is_the_archive_on_the_hub(source, tmp_path, monkeypatch):
    import huggingface_hub

    archive = pack(source, tmp_path / "hub.tar.gz")
    wanted = {("sayakpaul/ucf101-subset", "UCF101_subset.tar.gz", "dataset"): str(archive)}
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, repo_type, revision: wanted[repo, file, repo_type]
    )
    assert convert("--out_dir", tmp_path / "out") == 0
    assert len((tmp_path / "out" / "ucf101_train.jsonl").read_text().splitlines()) == 6


def test_a_failed_download_names_the_way_out(tmp_path, capfd, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert convert_ucf101.main(["--out_dir", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "can't be downloaded (no route to host): " in error and "pass the file with --source" in error


# ---- Turned videos, other containers, variable frame rates, and files that are left aside


def write_video(path, n=20, codec="mpeg4", format=None, times=None, **how):
    """A video of 64 x 48 pixels that is white in its upper left corner; below, its brightness is 20 + 5 * frame.

    times: of the frames in milliseconds. how: `rotation` and flips, or `matrix`, or `ratio` of the pixels' sides.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=1000 if times else 25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        if "matrix" in how:
            stream.set_display_matrix(how["matrix"])
        elif "rotation" in how:
            stream.set_display_rotation(**{"degrees" if key == "rotation" else key: how[key] for key in how})
        if "ratio" in how:
            stream.codec_context.sample_aspect_ratio = how["ratio"]
        for i in range(n):
            pixels = np.full((48, 64, 3), 20 + 5 * i, np.uint8)
            pixels[:24, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format="yuv420p")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def frames_of(video, folder, num_frames=8):
    """The images that the converter writes, its remarks, and what is wrong with the video."""
    folder.mkdir(exist_ok=True)
    notes = {}
    problem = convert_ucf101.convert_video(video, folder / "v", num_frames, notes)
    return [Image.open(folder / f"v.{i}.jpg") for i in range(0 if problem else num_frames)], notes, problem


def numbers_of(images):
    """The numbers of the frames in the video."""
    return [round((int(np.asarray(image)[40, 50, 0]) - 20) / 5) for image in images]


UNIT = 65536
MATRICES = {  # as phones write them: (the matrix's upper left numbers, where the white corner is shown, what is said)
    "upright": ((UNIT, 0, 0, UNIT), "upper left", None),
    "portrait": ((0, UNIT, -UNIT, 0), "upper right", "90 degrees clockwise"),
    "upside down": ((-UNIT, 0, 0, -UNIT), "lower right", "180 degrees"),
    "other portrait": ((0, -UNIT, UNIT, 0), "lower left", "90 degrees counterclockwise"),
    "front camera": ((-UNIT, 0, 0, UNIT), "upper right", "mirrored, left to right"),
    "flipped": ((UNIT, 0, 0, -UNIT), "lower left", "mirrored, top to bottom"),
    "transposed": ((0, UNIT, UNIT, 0), "upper left", "mirrored along the falling diagonal"),
    "transversed": ((0, -UNIT, -UNIT, 0), "lower right", "mirrored along the rising diagonal"),
    "half a degree": ((UNIT, 572, -572, UNIT), "upper left", None),
    "reduced": ((0, UNIT // 2, -UNIT // 2, 0), "upper right", "90 degrees clockwise"),
    "nothing": ((0, 0, 0, 0), "upper left", None),
}


def white_corner(image):
    corners = {"upper left": (0, 0), "upper right": (1, 0), "lower left": (0, 1), "lower right": (1, 1)}
    at = {name: ((image.width - 8) * x + 4, (image.height - 8) * y + 4) for name, (x, y) in corners.items()}
    (found,) = [name for name, place in at.items() if min(image.getpixel(place)) > 200]
    return found


TURNED_FILES = [(name, suffix) for name in MATRICES for suffix in ("mp4", "mov", "3gp")]
# A .mkv has an angle in place of a matrix.
TURNED_FILES += [(name, "mkv") for name in ("portrait", "upside down", "other portrait")]


@pytest.mark.parametrize(("name", "suffix"), TURNED_FILES)
def test_frames_are_turned_as_players_turn_them(name, suffix, tmp_path):
    (a, b, c, d), corner, said = MATRICES[name]
    write_video(tmp_path / f"v.{suffix}", matrix=[a, b, 0, c, d, 0, 0, 0, 2**30])
    images, notes, problem = frames_of(tmp_path / f"v.{suffix}", tmp_path / "frames")
    assert problem is None and notes.get("turned") == said
    sideways = said and ("90" in said or "diagonal" in said)
    assert {image.size for image in images} == {(48, 64) if sideways else (64, 48)}
    assert {white_corner(image) for image in images} == {corner}


@pytest.mark.parametrize(
    ("how", "corner"),
    [
        ({"rotation": 90}, "lower left"),
        ({"rotation": 180}, "lower right"),
        ({"rotation": 270}, "upper right"),
        ({"rotation": 0, "hflip": True}, "upper right"),
        ({"rotation": 90, "vflip": True}, "upper left"),
    ],
)
def test_turns_as_pyav_names_them(how, corner, tmp_path):
    """PyAV counts degrees counterclockwise, and mirrors afterwards."""
    write_video(tmp_path / "v.mp4", **how)
    images, notes, _ = frames_of(tmp_path / "v.mp4", tmp_path / "frames")
    assert notes["turned"] and {white_corner(image) for image in images} == {corner}


def test_a_video_at_an_angle_is_bad(tmp_path):
    write_video(tmp_path / "v.mp4", rotation=45)
    _, _, problem = frames_of(tmp_path / "v.mp4", tmp_path / "frames")
    assert problem == "it is turned by 315 degrees clockwise, not by 90, 180 or 270: save it upright"


def test_pixels_that_are_not_square_are_noted(tmp_path):
    write_video(tmp_path / "v.mp4", ratio=Fraction(16, 11))
    images, notes, problem = frames_of(tmp_path / "v.mp4", tmp_path / "frames")
    assert problem is None and notes == {"not_square": "16:11"} and images[0].size == (64, 48)


CONTAINERS = {  # suffix: (codec, PyAV's name of the container)
    ".wmv": ("wmv2", None),
    ".m4v": ("mpeg4", None),
    ".MTS": ("mpeg2video", "mpegts"),
    ".mpg": ("mpeg2video", None),
    ".3gp": ("mpeg4", None),
    ".flv": ("flv", None),
    ".ts": ("mpeg2video", None),
    ".ogv": ("libvpx", "ogg"),
    ".WMV": ("wmv1", "asf"),
    ".asf": ("msmpeg4", None),
    ".vob": ("mpeg2video", "vob"),
    ".m2ts": ("mpeg2video", "mpegts"),
    ".mxf": ("mpeg2video", None),
    ".f4v": ("libx264", None),
    ".nut": ("mpeg4", None),
    ".ogg": ("libvpx", "ogg"),
    ".y4m": ("rawvideo", None),
    ".ivf": ("libvpx", None),
    ".h264": ("libx264", None),
    ".unknown": ("mpeg4", "matroska"),
    "": ("mpeg4", "mp4"),
}


@pytest.mark.slow
def test_every_container_that_pyav_opens_is_taken(tmp_path, capfd):
    run = tmp_path / "source" / "train" / "Run"
    for number, (suffix, (codec, format)) in enumerate(CONTAINERS.items()):
        write_video(run / f"v{number:02d}{suffix}", codec=codec, format=format)
    assert convert("--source", tmp_path / "source", "--out_dir", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["videos"] == {"train": len(CONTAINERS)} and manifest.keys() == {"settings", "videos", "bad"}
    for number in range(len(CONTAINERS)):
        images = [Image.open(tmp_path / "out/images/train/Run" / f"v{number:02d}.{i}.jpg") for i in range(8)]
        assert numbers_of(images) == [i * 20 // 8 for i in range(8)], list(CONTAINERS)[number]


UNEVEN = [i * 28 for i in range(20)] + [3900, 6950, 10000]  # milliseconds


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "webm", "flv", "ts", "wmv"])
@pytest.mark.parametrize("kept_bytes", [convert_ucf101.KEPT_BYTES, 0])
def test_frames_are_evenly_spaced_in_time_if_the_rate_varies(suffix, kept_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_ucf101, "KEPT_BYTES", kept_bytes)
    codec = {"webm": "libvpx", "flv": "flv", "wmv": "wmv2"}.get(suffix, "mpeg4")
    write_video(tmp_path / f"v.{suffix}", len(UNEVEN), codec, times=UNEVEN)
    images, notes, problem = frames_of(tmp_path / f"v.{suffix}", tmp_path / "frames")
    assert problem is None and notes == {"uneven": "23 frames"}
    with av.open(str(tmp_path / f"v.{suffix}")) as container:
        end = [frame for frame in container.decode(video=0)][-1]
        length = 10 + (float(end.duration * end.time_base) or 10 / 22)  # if it is unknown, as long as the average
    assert numbers_of(images)[:3] == [0, 19, 19]
    for i, number in enumerate(numbers_of(images)):  # the frame that a player shows at that time
        shown = [k for k, time in enumerate(UNEVEN) if time / 1000 <= i * length / 8 + 0.002]
        assert number == shown[-1]


def by_index(n, num_frames=8):
    return [i * n // num_frames for i in range(num_frames)]


EVEN_TIMES = {
    "constant": [40 * i for i in range(50)],
    "rounded to milliseconds": [round(i * 1000 / 29.97) for i in range(300)],
    "rounded to a 25th": [round(i * 25 / 24) for i in range(100)],
    "rounded to a 100th": [round(i * 100 / 30) for i in range(60)],
    "begins late": [3 * 90000 + 3600 * i for i in range(50)],
    "jitter": [40 * i + (7 * i) % 11 for i in range(50)],
    "a frame was dropped": [40 * i for i in range(100) if i != 60],
    "the first is early": [0] + [40 * i for i in range(2, 60)],
    "two frames": [0, 900],
    "one frame": [0],
    "no times": [None] * 40,
    "some times": [0, None, 80, *range(120, 2000, 40)],
    "all at once": [0] * 9,
}


@pytest.mark.parametrize("name", EVEN_TIMES)
def test_the_index_rule_holds_for_even_times(name):
    times = EVEN_TIMES[name]
    assert convert_ucf101.wanted_frames(times, 40, 8) == (by_index(len(times)), None)


UNEVEN_TIMES = {
    "a pause": [40 * i + 5000 * (i > 25) for i in range(50)],
    "half as fast": [33 * i if i < 30 else 990 + 66 * (i - 30) for i in range(45)],
    "a bit slower": [33 * i if i < 30 else 990 + 50 * (i - 30) for i in range(50)],
    "three frames": [0, 10, 1000],
    "a still end": [40 * i for i in range(20)] + [9000],
    "ten dropped": [40 * i for i in range(120) if not 50 <= i < 60],
}


@pytest.mark.parametrize("name", UNEVEN_TIMES)
@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_the_time_rule_holds_for_uneven_times(name, num_frames):
    times = UNEVEN_TIMES[name]
    found, remark = convert_ucf101.wanted_frames(times, 40, num_frames)
    length = times[-1] + 40
    expected = [max(k for k, time in enumerate(times) if time <= i * length / num_frames) for i in range(num_frames)]
    assert found == expected != by_index(len(times), num_frames) and remark == f"{len(times)} frames"


def test_times_that_run_backwards():
    times = [40 * i for i in range(20)] + [40 * i for i in range(20)]
    found, remark = convert_ucf101.wanted_frames(times, 40, 8)
    assert found == by_index(40) and "run backwards" in remark


@pytest.fixture
def mixed(tmp_path):
    """A source with everything that can be beside good videos."""
    root = make_source(tmp_path / "source", (5,))
    run = root / "train" / "Run"
    write_video(run / "turned.mp4", rotation=90)
    write_video(run / "uneven.mkv", len(UNEVEN), times=UNEVEN)
    for name, content in {"notes.txt": b"hello", "labels.csv": b"a,b", "README": b"read", "s.srt": b"1\n"}.items():
        (run / name).write_bytes(content)
    (run / "log.nfo").write_text("as a terminal shows it")
    Image.new("RGB", (9, 9)).save(run / "thumb.jpg")
    Image.new("RGB", (9, 9)).save(run / "thumb.avif")
    Image.new("RGB", (16, 16)).save(run / "thumb.ico")
    (run / "clips").mkdir()
    (run / "gone").symlink_to("nowhere")
    (root / "train" / "loose.avi").write_bytes(b"")
    (root / "train" / "Empty").mkdir()
    (root / "train" / ".cache").mkdir()
    (root / "validation").mkdir()
    (root / "README.md").write_text("about")
    return root


ASIDE = {
    "README.md": "not one of the folders train, val and test",
    "train/.cache": "in no class's folder",
    "train/Empty": "an empty folder",
    "train/Run/._v_Run_g01_c01.avi": "hidden",
    "train/Run/README": "not a video that PyAV can open",
    "train/Run/clips": "a folder inside a class",
    "train/Run/gone": "not a regular file",
    "train/Run/labels.csv": "not a video that PyAV can open",
    "train/Run/log.nfo": "not in a container of videos",
    "train/Run/notes.txt": "not a video that PyAV can open",
    "train/Run/s.srt": "not a video that PyAV can open",
    "train/Run/thumb.avif": "a picture",
    "train/Run/thumb.ico": "not in a container of videos",
    "train/Run/thumb.jpg": "not in a container of videos",
    "train/loose.avi": "in no class's folder",
    "validation": "not one of the folders train, val and test",
}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_left_aside_in_silence(packed, mixed, tmp_path, capfd):
    aside, given, top = dict(ASIDE), mixed, ""
    if packed:  # an archive with links is refused
        (mixed / "train" / "Run" / "gone").unlink()
        aside.pop("train/Run/gone")
        given, top = pack(mixed, tmp_path / "source.tar.gz"), "UCF101_subset/"
    for _ in range(2):  # the rerun says so again
        assert convert("--source", given, "--out_dir", tmp_path / "out") == 0
        told = capfd.readouterr()
        manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
        assert manifest["left_aside"] == sorted(f"{top}{name}: {reason}" for name, reason in aside.items())
        assert manifest["turned"] == ["train/Run/turned.mp4: 90 degrees counterclockwise"]
        assert manifest["uneven"] == ["train/Run/uneven.mkv: 23 frames"]
        assert manifest["videos"] == {"train": 4, "val": 2, "test": 1} and manifest["bad"] == []
        assert told.err.count("left aside: ") == 11 and f"left aside: {len(aside) - 10} others; " in told.err
        assert f"\n{len(aside)} files or folders left aside\n" in told.out
        assert "\n1 videos turned as their display matrix says\n" in told.out
        assert "\n1 videos of a variable frame rate: their frames are evenly spaced in time\n" in told.out


@pytest.mark.slow
def test_conversion_json_is_as_before_if_there_is_nothing_to_say(source, tmp_path):
    (source / "train" / "Run" / "._v_Run_g01_c01.avi").unlink(missing_ok=True)
    assert convert("--source", source, "--out_dir", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert list(manifest) == ["settings", "videos", "bad"]


def test_classes_without_videos(tmp_path, capfd):
    root = make_source(tmp_path / "source", (5,))
    for k in range(12):
        (root / "val" / f"Other{k:02d}").mkdir()
        (root / "val" / f"Other{k:02d}" / "a.txt").write_text("no video")
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert "12 classes have no videos: val/Other00 (a.txt: not a video that PyAV can open); val/Other01 " in error
    assert "val/Other10" not in error and "and 2 others" in error and "remove the folders" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--on_bad_example", "skip"]])
def test_a_class_that_loses_all_videos_is_an_error(flags, tmp_path, capfd):
    root = make_source(tmp_path / "source", (5,))
    (root / "val" / "Jump" / "v_Jump_g01_c01.avi").write_bytes(b"damaged")
    assert convert("--source", root, "--out_dir", tmp_path / "out", *flags) == 2
    error = capfd.readouterr().err
    assert (
        "error: 1 classes would lose all their videos of a split; the first of each: val/Jump/v_Jump_g01_c01" in error
    )
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", sorted(convert_ucf101.SUFFIXES))
def test_a_damaged_video_is_bad_and_not_left_aside(suffix, tmp_path):
    path = tmp_path / f"a{suffix.upper()}"
    path.write_bytes(b"damaged")
    assert convert_ucf101.why_not_a_video(path) is None
    assert convert_ucf101.convert_video(path, tmp_path / "a", 8)


def test_a_cover_picture_is_no_video(tmp_path):
    class Stream:
        def __init__(self, flags):
            self.disposition = flags

    class Container:
        format, metadata, streams = type("", (), {"name": "mov,mp4"}), {}, type("", (), {"video": []})

    cover, film = Stream(convert_ucf101.Disposition.attached_pic), Stream(convert_ucf101.Disposition.default)
    Container.streams.video = [cover, film]
    assert convert_ucf101.video_stream(Container) is film
    Container.streams.video = [cover]
    with pytest.raises(ValueError, match="the file has no video stream"):
        convert_ucf101.video_stream(Container)
