"""Feeds the readers of foreign files with changed inputs, guided by the code that they reach, and lists what is not
answered by a result or by an error in one line.

    pip install atheris
    python tests/fuzz.py images --seconds 300 --out_dir FOLDER

An input is a finding if a reader raises anything but InputError, works for more than `LONGEST` seconds, or writes
outside its own folder. FOLDER gets each finding's input and traceback; the last line counts executions and findings.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LONGEST = 10  # seconds


class TooSlow(Exception):
    pass


def on_alarm(number, frame):
    raise TooSlow(f"works for more than {LONGEST} s")


class Target:
    """A reader, the inputs to begin with, and words that its inputs hold."""

    seeds: list[bytes] = []
    words: list[str] = []

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, data: bytes):
        raise NotImplementedError


JSON_WORDS = ["{", "}", "[", "]", ":", ",", "null", "true", "NaN", "1e999", "-1", "\\ud800", "\\u0000", '""']


class Annotations(Target):
    """read_conversations, on one file."""

    words = [*JSON_WORDS, '"id"', '"conversations"', '"images"', '"user"', '"assistant"', "<image>", "<|end|>", "a.png"]

    def __init__(self, folder):
        super().__init__(folder)
        import bad_inputs
        from PIL import Image

        self.seeds = [bad_inputs.line(), *(content for content, _ in bad_inputs.ANNOTATIONS.values())]
        self.seeds = [seed for seed in self.seeds if len(seed) < 20_000]
        Image.new("RGB", (8, 8)).save(folder / "a.png")

    def run(self, data):
        from phi3v.data.annotations import read_conversations
        from phi3v.errors import BadExamples

        (self.folder / "a.jsonl").write_bytes(data[1:])
        read_conversations(self.folder / "a.jsonl", self.folder, BadExamples(skip=bool(data[:1] > b"\x7f")))


class Converter(Target):
    """tools/convert_conversations.py; the first byte chooses the form of the file."""

    words = [
        *JSON_WORDS,
        '"image"',
        '"images"',
        '"conversations"',
        '"messages"',
        '"from"',
        '"human"',
        '"gpt"',
        '"value"',
    ]
    words += ['"role"', '"content"', '"question"', '"answer"', '"system"', '"type"', "<image>", "image,question,answer"]
    words += ["\t", "\n", '"a.png"', "a.png", '"text"', '"user"', '"assistant"', '"url"', '"image_url"', "\\n"]

    def __init__(self, folder):
        super().__init__(folder)
        from PIL import Image

        Image.new("RGB", (8, 8)).save(folder / "a.png")
        Image.new("RGB", (8, 8)).save(folder / "b.png")
        two = [
            {"image": "a.png", "question": "Which?", "answer": "A cat"},
            {"image": "b.png", "question": "Q", "answer": "B"},
        ]
        chats = [
            {
                "image": i,
                "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "cat"}],
            }
            for i in ("a.png", "b.png")
        ]
        messages = [
            {
                "images": [i],
                "messages": [{"role": "user", "content": "<image>W"}, {"role": "assistant", "content": "c"}],
            }
            for i in ("a.png", "b.png")
        ]
        table = b'image,question,answer\na.png,Which?,A cat\nb.png,"Q, then",B\n'
        self.seeds = [b"\0" + table, b"\1" + table.replace(b",", b"\t")]
        for rows in (two, chats, messages):
            self.seeds += [b"\2" + json.dumps(rows).encode(), b"\3" + "\n".join(map(json.dumps, rows)).encode()]

    def run(self, data):
        from tools import convert_conversations as converter

        source = self.folder / f"source.{('csv', 'tsv', 'json', 'jsonl')[data[0] % 4 if data else 0]}"
        source.write_bytes(data[1:])
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        skip = "skip" if data and data[0] & 8 else "error"
        flags = ["--source", source, "--out_dir", out, "--val_share", "0.5", "--on_bad_example", skip]
        converter.main([str(flag) for flag in flags])


class Images(Target):
    """An image, as training, the report and the check open it."""

    words = [
        "JFIF",
        "Exif",
        "IHDR",
        "IDAT",
        "acTL",
        "zTXt",
        "iCCP",
        "RIFF",
        "WEBP",
        "VP8L",
        "GIF89a",
        "%!PS",
        "P6",
        "II*",
        "BM",
    ]

    def __init__(self, folder):
        super().__init__(folder)
        from PIL import Image, features

        formats = [
            "JPEG",
            "PNG",
            "GIF",
            "BMP",
            "TIFF",
            "PPM",
            "WEBP",
            "EPS",
            *(["AVIF"] if features.check("avif") else []),
        ]
        for name in formats:
            for mode in ("RGB", "L"):
                content = io.BytesIO()
                with contextlib.suppress(OSError):
                    Image.effect_noise((9, 7), 50).convert(mode).save(content, name)
                    self.seeds = [*self.seeds, content.getvalue()]

    def run(self, data):
        from phi3v.data.images import image_size, read_image

        path = self.folder / "cat.jpg"
        path.write_bytes(data)
        image_size(str(path))
        read_image(str(path))
        read_image({"bytes": data, "path": None})


class Archives(Target):
    """An archive of videos is unpacked; the first byte chooses its kind."""

    words = [
        "../",
        "/etc/",
        "\0",
        "ustar",
        "PAX",
        "path=",
        "linkpath=",
        "size=",
        "GNU.sparse.size=",
        "PK\3\4",
        "PK\1\2",
    ]

    def __init__(self, folder):
        super().__init__(folder)
        for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w", format=format) as archive:
                for name in ("UCF/train/A/v_1.avi", "UCF/val/B/" + "ä" * 30 + ".mp4"):
                    member = tarfile.TarInfo(name)
                    member.size = 20
                    archive.addfile(member, io.BytesIO(b"x" * 20))
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "../outside"
                archive.addfile(link)
            self.seeds = [*self.seeds, b"\0" + content.getvalue()]
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("UCF/train/A/v_1.avi", b"x" * 20)
        self.seeds = [*self.seeds, b"\1" + content.getvalue()]
        (folder / "outside").write_text("untouched")

    def run(self, data):
        import convert_ucf101

        archive = self.folder / ("videos.zip" if data[:1] == b"\1" else "videos.tar")
        archive.write_bytes(data[1:])
        target = self.folder / "unpacked"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            convert_ucf101.unpack(archive, target)
        finally:
            there = {path.name for path in self.folder.iterdir()} - {"videos.zip", "videos.tar"}
            assert there == {"outside", "unpacked"}, f"written outside: {there}"
            assert (self.folder / "outside").read_text() == "untouched", "a file outside was overwritten"
            for path in target.rglob("*"):
                assert not path.is_symlink() and (path.is_dir() or path.is_file()), f"{path} is no regular file"


class Folders(Target):
    """An adapter on its base, and a checkpoint to resume from: one file of theirs has other content. The first byte
    chooses the file."""

    words = [
        *JSON_WORDS,
        '"r"',
        '"peft_type"',
        '"LORA"',
        '"target_modules"',
        '"rank_pattern"',
        '"modules_to_save"',
        '"dtype"',
    ]
    words += [
        '"vision_config"',
        '"hidden_size"',
        '"rope_scaling"',
        '"weight_map"',
        '"F32"',
        '"shape"',
        '"data_offsets"',
    ]

    def __init__(self, folder):
        super().__init__(folder)
        golden = ROOT / "tests" / "golden" / "checkpoint_801afc1"
        shutil.copytree(golden / "lora", folder / "lora")
        shutil.copytree(golden / "full" / "checkpoint-2", folder / "full" / "checkpoint-2")
        shutil.copytree(ROOT / "demo" / "base_checkpoint", folder / "base")
        adapter = folder / "lora" / "checkpoint-2" / "adapter_config.json"
        config = json.loads(adapter.read_text()) | {"base_model_name_or_path": str(folder / "base")}
        adapter.write_text(json.dumps(config))
        self.files = sorted(
            p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "tokenizer.json"))
        )
        self.contents = [path.read_bytes() for path in self.files]
        self.seeds = [bytes([i]) + content[:20_000] for i, content in enumerate(self.contents)]

    def run(self, data):
        from phi3v.errors import InputError
        from phi3v.model.loading import find_saved
        from phi3v.training import checkpoints

        number = data[0] % len(self.files) if data else 0
        whole = self.contents[number]
        self.files[number].write_bytes(data[1:] + whole[20_000:])  # the fuzzer sees the beginnings of long files
        try:
            for use in (
                lambda: find_saved(str(self.folder / "lora" / "checkpoint-2")),
                lambda: find_saved(str(self.folder / "full" / "checkpoint-2")),
                lambda: checkpoints.find_checkpoint("auto", self.folder / "lora"),
                lambda: checkpoints.find_checkpoint("auto", self.folder / "full"),
            ):
                with contextlib.suppress(InputError):
                    use()
        finally:
            self.files[number].write_bytes(whole)


class Commands(Target):
    """The command line of the scripts: flags from the frozen list, with values that no flag expects."""

    values = (
        "nan inf -inf -1 0 1 1e30 -1e-30 99999999999999999999 4294967296 0.5 true no none auto x "
        "\x1b[2J \ud800 [1] {} / . ../x"
    )

    def __init__(self, folder):
        super().__init__(folder)
        frozen = json.loads((ROOT / "tests/scripts/flags.json").read_text())
        names = [*frozen["Trainer"], *frozen["finetune_hf_trainer_docvqa.py"]]
        self.flags = sorted(name if isinstance(name, str) else name["flag"] for name in names)
        self.seeds = [bytes([i, j]) for i in range(0, 256, 16) for j in range(0, 256, 64)]

    def run(self, data):
        import helpers

        import finetune_hf_trainer_docvqa as script

        pick = atheris.FuzzedDataProvider(data)
        argv = ["--output_dir", str(self.folder / "out")]
        for _ in range(pick.ConsumeIntInRange(1, 4)):
            argv.append(f"--{pick.PickValueInList(self.flags)}")
            for _ in range(pick.ConsumeIntInRange(0, 2)):
                argv.append(pick.PickValueInList([*self.values.split(" "), ""]))
        self.last = argv
        helpers.parse_command(script, argv)


TARGETS = {t.__name__.lower(): t for t in (Annotations, Converter, Images, Archives, Folders, Commands)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out_dir", type=Path, required=True, help="gets the findings")
    args = parser.parse_args()
    with atheris.instrument_imports(include=["phi3v", "tools", "convert_ucf101"]):
        import convert_ucf101
        from phi3v import errors, run  # noqa: F401

        if args.target == "converter":
            from tools import convert_conversations  # noqa: F401
    expected = (errors.InputError, convert_ucf101.InputError)
    out = args.out_dir / args.target
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    target = TARGETS[args.target](work)
    for i, seed in enumerate(target.seeds):
        (out / "corpus" / f"seed{i}").write_bytes(seed)
    escaped = ("".join(f"\\x{b:02x}" for b in word.encode()) for word in target.words)
    (out / "words").write_text("\n".join(f'"{word}"' for word in escaped) + "\n")
    signal.signal(signal.SIGALRM, on_alarm)
    findings, executions, started = {}, 0, time.monotonic()

    def one(data: bytes):
        nonlocal executions
        if time.monotonic() - started > args.seconds:
            print(
                f"{args.target}: {executions:,} executions in {args.seconds} s, {len(findings)} findings",
                file=sys.__stderr__,
            )
            shutil.rmtree(work, ignore_errors=True)
            os._exit(0)
        executions += 1
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                target.run(data)
        except expected:
            pass
        except SystemExit as e:
            if e.code not in (0, 2):
                note(data, e)
        except BaseException as e:
            note(data, e)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def note(data: bytes, error: BaseException):
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if str(ROOT) in f.filename and "fuzz.py" not in f.filename
        ]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        key = f"{type(error).__name__} at {place}"
        if key not in findings:
            findings[key] = hashlib.sha256(data).hexdigest()[:12]
            (out / findings[key]).write_bytes(data)
            trace = "".join(traceback.format_exception(error))
            (out / f"{findings[key]}.txt").write_text(
                f"{getattr(target, 'last', '')}\n{trace}", errors="backslashreplace"
            )
            print(f"FINDING {key}: {str(error)[:200]!r}", file=sys.__stderr__, flush=True)

    atheris.Setup(
        [sys.argv[0], f"-dict={out / 'words'}", "-timeout=0", "-max_len=20000", "-verbosity=0", str(out / "corpus")],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
