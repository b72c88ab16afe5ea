"""Videos, names and folders of strangers: nothing outside of the source is read, nothing that is not ours is deleted,
nothing takes for ever, and no terminal obeys a name."""

import hashlib
import json
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import fuzz
from hypothesis import given
from hypothesis import strategies as st

import convert_ucf101
from convert_ucf101 import InputError, class_problem, convert_video, find_videos, main, printable, why_not_a_video
from phi3v.data.texts import text_problem
from phi3v.data.unsupported import tag_problem
from phi3v.model.chat import END_TOKENS, OTHER_TOKENS, ROLE_TOKENS


def write_video(path, n=9, width=64, height=48, codec="mpeg4", format=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24" if codec == "png" else "yuv420p"
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 9 * i % 256, np.uint8))
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


@pytest.fixture
def source(tmp_path):
    for name in ("train/Run/a.mp4", "train/Jump/a.mp4"):
        write_video(tmp_path / "source" / name)
    return tmp_path / "source"


def convert(source, out, *flags):
    return main(["--source", str(source), "--out_dir", str(out), "--num_workers", "1", *flags])


# ---- Links


def links_of(source, root="the source"):
    """What is said of links that lead out of the source; None if there are none."""
    real = os.path.realpath(source) if root else None
    try:
        find_videos(source, source, real)
    except InputError as e:
        return str(e)


@pytest.mark.parametrize("name", ["train/Run/b.mp4", "train/Run/b", "train/Far", "val"])
def test_links_out_of_the_source(name, source, tmp_path):
    write_video(tmp_path / "far" / "Far" / "b.mp4")
    target = {"train/Far": "far/Far", "val": "far"}.get(name, "far/Far/b.mp4")
    (source / name).symlink_to(tmp_path / target)
    said = links_of(source)
    assert said.startswith(f"{source}: 1 links lead out of it: {name}, to {tmp_path / target}: give --follow_links")
    assert links_of(source, root=None) is None


def test_the_folder_with_the_splits_may_not_be_a_link_out(source, tmp_path):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner").symlink_to(source)
    assert "1 links lead out of it: inner, to" in links_of(tmp_path / "outer")


def test_links_inside_of_the_source_and_the_source_itself(source, tmp_path):
    (source / "train" / "Run" / "b.mp4").symlink_to("../Jump/a.mp4")
    (source / "val").symlink_to("train")
    (tmp_path / "link").symlink_to(source)
    for given_source in (source, tmp_path / "link"):
        real = os.path.realpath(given_source)
        videos, _ = find_videos(given_source, given_source, real)
        assert len(videos["train"]) == len(videos["val"]) == 3
        for i, path in enumerate(videos["train"] + videos["val"]):
            assert convert_video(path, tmp_path / f"{given_source.name}{i}", 1, root=real) is None


@pytest.mark.slow
def test_with_follow_links_they_are_converted(source, tmp_path, capfd):
    write_video(tmp_path / "far" / "b.mp4")
    (source / "train" / "Run" / "b.mp4").symlink_to(tmp_path / "far" / "b.mp4")
    assert convert(source, tmp_path / "out") == 2 and "give --follow_links" in capfd.readouterr().err
    assert convert(source, tmp_path / "out", "--follow_links") == 0
    assert (tmp_path / "out" / "images" / "train" / "Run" / "b.0.jpg").is_file()


@pytest.mark.parametrize("swapped", ["train/Run/a.mp4", "train/Run", "train"])
def test_what_is_opened_is_checked(swapped, source, tmp_path, monkeypatch):
    """A file or a folder becomes a link after its real path was looked at."""
    path, real = source / "train" / "Run" / "a.mp4", os.path.realpath(source)
    assert convert_video(path, tmp_path / "a", 1, root=real) is None
    (source / swapped).rename(tmp_path / "moved")
    (source / swapped).symlink_to(tmp_path / "moved")
    assert convert_video(path, tmp_path / "b", 1, root=real) == "a link out of --source"
    monkeypatch.setattr(os.path, "realpath", lambda path: str(path))  # as it was before
    assert convert_video(path, tmp_path / "b", 1, root=real) in (
        "Too many levels of symbolic links",
        "Not a directory",
    )
    assert not (tmp_path / "b.0.jpg").exists()


@pytest.mark.slow
def test_a_video_swapped_while_the_converter_runs_is_left_out(source, tmp_path, capfd, monkeypatch):
    write_video(source / "train" / "Run" / "b.mp4")
    find = convert_ucf101.find_videos

    def find_and_swap(*args):
        found = find(*args)
        (source / "train" / "Run" / "a.mp4").rename(tmp_path / "moved.mp4")
        (source / "train" / "Run" / "a.mp4").symlink_to(tmp_path / "moved.mp4")
        return found

    monkeypatch.setattr(convert_ucf101, "find_videos", find_and_swap)
    assert convert(source, tmp_path / "out") == 1
    assert "left out: train/Run/a.mp4: a link out of --source" in capfd.readouterr().err
    assert not (tmp_path / "out" / "images" / "train" / "Run" / "a.0.jpg").exists()


def test_neither_pipes_nor_devices_are_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.avi")
    assert convert_video(tmp_path / "pipe.avi", tmp_path / "a", 1) == "not a regular file"
    assert convert_video(Path("/dev/zero"), tmp_path / "a", 1) == "not a regular file"
    convert_ucf101.fingerprint(tmp_path, [tmp_path / "pipe.avi"])


# ---- Lists of other files, large frames, and time

LISTS = {
    "ffconcat": "ffconcat version 1.0\n" + "file good.mp4\n" * 200_000,
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\ngood.mp4\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>good.mp4</BaseURL>',
    "tty": "any text",
}


@pytest.mark.parametrize("suffix", ["avi", "mkv", "ffconcat", "m3u8", "sdp", "mpd", "txt", "ans", ""])
@pytest.mark.parametrize("name", LISTS)
def test_no_list_of_other_files_is_a_video(name, suffix, tmp_path):
    write_video(tmp_path / "good.mp4")
    path = tmp_path / f"list.{suffix}"
    path.write_text(LISTS[name])
    started = time.monotonic()
    assert convert_video(path, tmp_path / "v", 1) in (
        "not in a container of videos",
        "Invalid data found when processing input",
    )
    assert why_not_a_video(path) or suffix in ("avi", "mkv")
    assert time.monotonic() - started < 100  # it would wait for ever


def test_ffmpeg_opens_nothing_but_the_file(tmp_path, monkeypatch):
    """Even if the list of containers had a gap."""
    monkeypatch.delitem(convert_ucf101.FFMPEG_OPTIONS, "format_whitelist")
    write_video(tmp_path / "good.mp4")
    for name in ("ffconcat", "hls"):
        (tmp_path / f"list.{name}").write_text(LISTS[name])
        assert convert_video(tmp_path / f"list.{name}", tmp_path / "v", 1)
    assert not (tmp_path / "v.0.jpg").exists()


def test_large_frames_are_refused(tmp_path, monkeypatch):
    paths = [write_video(tmp_path / f"v{i}.mov", codec=codec) for i, codec in enumerate(("mpeg4", "png"))]
    for path in paths:
        assert convert_video(path, tmp_path / "a", 1) is None
        (tmp_path / "a.0.jpg").unlink()
    monkeypatch.setattr(convert_ucf101, "MOST_PIXELS", 3000)
    for path in paths:
        assert convert_video(path, tmp_path / "b", 1) == "frames of 64 x 48 pixels are larger than 3,000 pixels"
    monkeypatch.setitem(convert_ucf101.FFMPEG_OPTIONS, "max_pixels", "3000")
    monkeypatch.setattr(convert_ucf101, "check_pixels", lambda frame: None)
    for path in paths:  # FFmpeg itself refuses them, before it takes memory for a frame
        assert "more than 3,000 pixels" in convert_video(path, tmp_path / "b", 1)
    assert not (tmp_path / "b.0.jpg").exists()


def test_the_largest_frames_can_be_read_in_training_and_8k_is_among_them():
    from PIL import Image

    assert 7680 * 4320 < convert_ucf101.MOST_PIXELS <= Image.MAX_IMAGE_PIXELS
    assert convert_ucf101.FFMPEG_OPTIONS["max_pixels"] == str(convert_ucf101.MOST_PIXELS)


def test_a_video_that_takes_too_long_is_bad(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 300)
    assert convert_video(path, tmp_path / "a", 1, seconds=60) is None
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))  # each look at it is a second
    assert convert_video(path, tmp_path / "b", 1, seconds=100) == (
        "decoding takes more than 100 s: see --max_seconds_per_video"
    )
    assert not (tmp_path / "b.0.jpg").exists()
    with convert_ucf101.VideoFile(path) as file:  # also where FFmpeg only reads
        assert file.seconds > 30
        with pytest.raises(ValueError, match="decoding takes more than"):
            while True:
                file.read(1)


def test_an_image_is_never_written_over_another_one(tmp_path):
    """As of A.mp4 and a.mp4 on a file system that ignores the case of names."""
    path = write_video(tmp_path / "v.mp4")
    (tmp_path / "v.0.jpg").write_text("another video's")
    with pytest.raises(FileExistsError):
        convert_video(path, tmp_path / "v", 1)
    assert (tmp_path / "v.0.jpg").read_text() == "another video's"


# ---- Names

TOKENS = [*ROLE_TOKENS, *END_TOKENS, *OTHER_TOKENS, "<|image_1|>", "<|placeholder1|>", "<image>", "<video>", "[IMG]"]


@pytest.mark.parametrize("name", ["", " ", "\u3000", "a\nb", "a\x1b[2J", "a\x7f", "a\x9b", "a,b", *TOKENS, "a<|END|>b"])
def test_names_that_no_class_can_have(name, tmp_path):
    assert class_problem(name)
    if name and "/" not in name:
        write_video(tmp_path / "source" / "train" / "Run" / "a.mp4")
        (tmp_path / "source" / "train" / "Run").rename(tmp_path / "source" / "train" / name)
        with pytest.raises(InputError, match="rename it"):
            find_videos(tmp_path / "source", tmp_path / "source", None)


@fuzz(60)
@given(
    st.text(min_size=1, max_size=12) | st.lists(st.sampled_from([*TOKENS, "a", "<", "|", " "]), min_size=1).map("".join)
)
def test_training_reads_the_names_that_are_accepted(name):
    if not class_problem(name) and name.isprintable():
        for text in (name, f"Classify the video into one of the following classes: {name}, Run."):
            assert not text_problem(text) and not tag_problem(text)


def test_ordinary_names_are_accepted():
    for name in ("ApplyEyeMakeup", "打篮球", "Zoë's class", "a-b_c (d)", "🏀", "a < b", "سلام\u200cها"):
        assert class_problem(name) is None


@pytest.mark.slow
def test_no_terminal_obeys_a_name(source, tmp_path, capfd):
    run = source / "train" / "Run"
    for name in ("\x1b]0;PWNED\x07\n.avi", "\x9b2J.txt", "\u202egpj.avi"):
        (run / name).write_bytes(b"no video")
    write_video(source / "val" / "\u202eunseen" / "\x1b[2J.mp4")
    (source / "\x1b[31mREADME").write_text("")
    assert convert(source, tmp_path / "\x1b[1mout") == 1
    assert convert(source, tmp_path / "\x1b[1mout") == 1  # and from conversion.json
    assert convert(tmp_path / "\x1b[2Jnowhere", tmp_path / "other") == 2
    said = "".join(capfd.readouterr())
    assert all(line.isprintable() for line in said.replace("\r", "\n").split("\n"))
    assert "left out: train/Run/\\x1b]0;PWNED\\x07\\n.avi: Invalid data" in said and "\\u202eunseen" in said
    manifest = json.loads((tmp_path / "\x1b[1mout" / "conversion.json").read_text())
    assert all(line.isprintable() for line in manifest["bad"] + manifest["left_aside"])


def test_the_escapes_are_those_of_the_library():
    from phi3v import text

    for name in ("a", "\x1b[2J", "\u202e", "\x9b", "a\nb", "\udcff", "打篮球 é"):
        assert printable(name) == text.printable(name)


def test_masking_takes_linear_time():
    started = time.process_time()
    for letters in ("-", "--a", "a-", "--token", "://", "--key ", "x@"):
        convert_ucf101.masked(letters * 100_000)
    assert time.process_time() - started < 10
    assert convert_ucf101.masked("--my-token=abc --api_KEY  d --num 3") == "--my-token=••• --api_KEY  ••• --num 3"


# ---- Folders and flags


def unpacked_folder(out):
    return out.parent / f".{out.name}.{hashlib.md5(os.fsencode(out)).hexdigest()}.unpacked"


@pytest.mark.parametrize(
    "kind", ["partial", "unpacked", "lock", "linked lock", "pipe as lock", "file", "linked folder"]
)
def test_what_is_not_ours_stays(kind, source, tmp_path, capfd):
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    path = {"unpacked": unpacked_folder(out)}.get(kind, tmp_path / f".out.{'lock' if 'lock' in kind else 'partial'}")
    if kind in ("partial", "unpacked"):
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
    elif kind == "linked lock":
        path.symlink_to(mine / "thesis.txt")
    elif kind == "pipe as lock":
        os.mkfifo(path)
    elif kind == "linked folder":
        path.symlink_to(mine)
    else:
        path.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert convert(source, out) == 2
    error = capfd.readouterr().err
    assert (
        error.startswith(f"error: {path} is in the way, and was not made by this program: move it")
        and error.count("\n") == 1
    )
    assert sorted(tmp_path.rglob("*")) == before and (mine / "thesis.txt").read_text() == "mine"
    if path.is_dir() and not path.is_symlink():
        assert (path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_what_killed_runs_left_is_removed(source, tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.lock").touch()
    for folder in (tmp_path / ".out.partial" / "images" / "train", unpacked_folder(out) / "UCF101_subset" / "train"):
        folder.mkdir(parents=True)  # of an earlier version
    assert convert(source, out) == 0
    for folder in (tmp_path / ".out2.partial", unpacked_folder(tmp_path / "out2") / "files"):
        folder.mkdir(parents=True)
        (folder / "anything").touch()
        (tmp_path / folder.relative_to(tmp_path).parts[0] / convert_ucf101.MARK).touch()
    assert convert(source, tmp_path / "out2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2", "source"]
    assert convert_ucf101.MARK not in os.listdir(out) and out.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, '{"settings": {}, "videos": {}, "bad": 3}'])
def test_a_strange_conversion_json(content, source, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversion.json").write_text(content)
    assert convert(source, tmp_path / "out") == 2
    assert "conversion.json is broken: remove" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--num_frames", value) for value in ("0", "-1", "1.5", "nan", "10001", "9" * 5000)),
        *(("--num_workers", value) for value in ("1001", "99999999999999999999")),
        *(("--max_members", value) for value in ("0", "1e9", "x")),
        *(("--max_unpacked_gib", value) for value in ("0", "-1", "nan", "inf", "1e999", "9" * 5000)),
        *(("--max_seconds_per_video", value) for value in ("0", "0.0", "-3", "nan", "")),
    ],
)
def test_numbers_out_of_range(flag, value, source, tmp_path, capfd):
    assert convert(source, tmp_path / "out", f"{flag}={value}") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: argument {flag}: ") and "is not a positive" in error and len(error) < 300


@pytest.mark.parametrize("out", ["", ".", "/", "/dev/null", "x" * 5000])
def test_places_for_the_output(out, source, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(source)
    before = sorted(tmp_path.rglob("*"))
    assert main(["--source", str(source), "--out_dir", out]) == 2
    assert capfd.readouterr().err.startswith("error: ") and sorted(tmp_path.rglob("*")) == before
