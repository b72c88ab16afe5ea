"""The converter on real .avi files, whose frames tell their own number."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
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


def convert(*args):
    return convert_ucf101.main([*map(str, args), "--num_workers", "1"])


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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
        assert convert_ucf101.convert_video(video, tmp_path / "frames" / "v", 8) is None
        for i in range(8):
            expected = io.BytesIO()
            frames[i * n // 8].save(expected, "JPEG", quality=convert_ucf101.JPEG_QUALITY)
            assert (tmp_path / "frames" / f"v.{i}.jpg").read_bytes() == expected.getvalue()


def test_same_bytes_from_archive_folder_and_any_number_of_workers(source, tmp_path):
    archive = tmp_path / "UCF101_subset.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "UCF101_subset")
    assert convert("--source", source, "--out_dir", tmp_path / "a") == 0
    assert convert_ucf101.main(["--source", str(archive), "--out_dir", str(tmp_path / "b"), "--num_workers", "2"]) == 0
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    first.pop("conversion.json"), second.pop("conversion.json")
    assert first == second and len(first) == 123


def test_bad_videos_are_left_out_and_reported(tmp_path, capfd):
    root = make_source(tmp_path / "source", (5,))
    run = root / "train" / "Run"
    (run / "empty.avi").write_bytes(b"")
    (run / "text.avi").write_text("no video at all")
    whole = (run / "v_Run_g01_c01.avi").read_bytes()
    (run / "cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 1
    message = capfd.readouterr().err
    for name in ("empty", "text", "cut"):
        assert f"left out: train/Run/{name}.avi: " in message
    assert "Traceback" not in message
    lines = (tmp_path / "out" / "ucf101_train.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["train-0000000000", "train-0000000004"]
    assert not [p for p in (tmp_path / "out").rglob("*.jpg") if not p.name.startswith("v_")]
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 1  # the rerun says so again
    assert convert("--source", root, "--out_dir", tmp_path / "skip", "--skip_bad_videos") == 0


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


def test_a_truncated_archive(source, tmp_path, capfd):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        tar.add(source, "UCF101_subset")
    archive = tmp_path / "cut.tar.gz"
    archive.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    assert convert("--source", archive, "--out_dir", tmp_path / "out") == 2
    assert capfd.readouterr().err.startswith(f"error: {archive} can't be unpacked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.tar.gz"]


def test_reruns_never_mix(source, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    assert convert("--source", source, "--out_dir", out) == 0
    before = content(out)
    assert convert("--source", source, "--out_dir", out) == 0
    assert "converted already" in capfd.readouterr().out
    assert convert("--source", source, "--out_dir", out, "--num_frames", "4") == 2
    assert "was converted with other settings" in capfd.readouterr().err
    assert content(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    assert convert("--source", source, "--out_dir", tmp_path / "other") == 2
    assert "holds other files" in capfd.readouterr().err
    assert content(tmp_path / "other") == {"mine.txt": b"keep"}


def test_a_killed_run_leaves_nothing_behind(tmp_path):
    root = make_source(tmp_path / "source", (300,) * 12)
    command = [sys.executable, SCRIPT, "--source", root, "--out_dir", tmp_path / "out", "--num_workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".out.partial-*/images/*/*/*.jpg")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and any(tmp_path.glob(".out.partial-*"))
    assert convert("--source", root, "--out_dir", tmp_path / "out") == 0
    assert convert("--source", root, "--out_dir", tmp_path / "whole") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds none of the folders train, val and test"),
        (("train/notes.txt",), "holds no videos"),
        (("train/Run/a.avi", "train/Run/a.mp4"), "would give the same images"),
        (("train/Run, fast/a.avi",), "holds a comma"),
    ],
)
def test_sources_of_another_layout(files, message, tmp_path, capfd):
    (tmp_path / "source").mkdir()
    for name in files:
        write_avi(tmp_path / "source" / name, 2) if name.endswith("i") else None
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
    ],
)
def test_wrong_flags(flags, message, tmp_path, capfd):
    assert convert_ucf101.main([*flags, "--out_dir", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_failed_download_names_the_way_out(tmp_path, capfd, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert convert_ucf101.main(["--out_dir", str(tmp_path / "out")]) == 2
    assert "can't be downloaded (no route to host): pass a local copy with --source" in capfd.readouterr().err
