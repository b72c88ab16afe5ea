"""Wrong annotations and images, and what the message about each must contain.

    python tests/bad_inputs.py FOLDER

writes one file of annotations or one image for each case. They are made by code, so none is kept in the repository.
bad_folders.py has output folders, checkpoints and DeepSpeed configurations.
"""

import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

TURN = {"images": ["a.png"], "user": "Which?", "assistant": "yes"}
GOOD = {"id": "1", "conversations": [TURN]}


def line(**changes) -> bytes:
    return json.dumps(GOOD | changes).encode() + b"\n"


def turn(**changes) -> bytes:
    return line(conversations=[TURN | changes])


def without(key) -> bytes:
    return line(conversations=[{k: v for k, v in TURN.items() if k != key}])


# name: (content of the file, what the message holds). {path} is the file, {images} the folder with the images.
ANNOTATIONS = {
    # not a line of JSON
    "no_json": (b"{\n", "{path}:1: not a JSON object"),
    "random_bytes": (bytes(range(128, 256)), "{path}:1: the file's last line is cut off: not UTF-8"),
    "python_not_json": (repr(GOOD).encode() + b"\n", "{path}:1: not a JSON object"),
    "two_objects_a_line": (b'{"id": 1} {"id": 2}\n', "{path}:1: not a JSON object (Extra data"),
    "json_array": (json.dumps([GOOD], indent=1).encode(), "{path}:1: the file is one JSON array"),
    "cut_off": (line() + line(id="2")[:50], "{path}:2: the file's last line is cut off: not a JSON object"),
    "cut_in_a_letter": (line() + '{"id": "Zoë'.encode()[:-1], "{path}:2: the file's last line is cut off: not UTF-8"),
    "nul_bytes": (line() + b"\0" * 4096, "{path}:2: the file's last line is cut off: holds NUL bytes"),
    "nul_byte_in_text": (line().replace(b"Which", b"Wh\0ch"), "{path}:1: holds NUL bytes"),
    "latin_1": (line() + '{"id": "Zoë"}\n'.encode("latin-1"), "{path}:2: not UTF-8 (invalid continuation byte at byte"),
    "utf_16": (line().decode().encode("utf-16"), "{path} is UTF-16: save it as UTF-8"),
    "encoded_surrogate": (line().replace(b"Which", b"\xed\xa0\x80"), "{path}:1: not UTF-8"),
    "deep_lists": (b"[" * 100_000 + b"]" * 100_000 + b"\n", "one JSON array"),
    "deep_after_good": (line() + b"[" * 100_000 + b"\n", "{path}:2: not a readable JSON object: nested too"),
    "deep_field": (b'{"id": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001, "nested too deeply"),
    "huge_int": (b'{"id": ' + b"9" * 10_000 + b"}\n", "{path}:1: holds a number with more digits than can be read"),
    "key_twice": (line().replace(b'"id"', b'"id": "0", "id"'), "{path}:1: the key 'id' occurs twice in an object"),
    "key_twice_in_turn": (line().replace(b'"user"', b'"user": "a", "user"'), "the key 'user' occurs twice"),
    "control_character": (b'{"id": "a\tb"}\n', "{path}:1: not a JSON object (Invalid control character"),
    "empty": (b"", "{path} holds no examples"),
    "blank_lines": (b"\n \r\n\t\n", "{path} holds no examples"),
    "only_a_mark": (b"\xef\xbb\xbf\n", "holds no examples"),
    # not the schema
    "list": (line() + b"[]\n", "{path}:2: a line must hold a JSON object, not list"),
    "number": (b"3\n", "{path}:1: a line must hold a JSON object, not int"),
    "not_a_number": (b"NaN\n", "{path}:1: a line must hold a JSON object, not float"),
    "null": (b"null\n", "{path}:1: a line must hold a JSON object, not NoneType"),
    "no_conversations": (b'{"id": "1"}\n', "{path}:1: conversations must be a list of turns"),
    "no_turns": (line(conversations=[]), "conversations must be a list of turns with at least one"),
    "turns_in_object": (line(conversations={"0": TURN}), "conversations must be a list of turns"),
    "turn_is_text": (line(conversations=["hello"]), "conversations[0] must be an object with images"),
    "second_turn_is_null": (line(conversations=[TURN, None]), "{path}:1: conversations[1] must be an object"),
    "llava": (line(conversations=[{"from": "human", "value": "Which?"}]), "conversations[0].user is None"),
    "id_is_list": (line(id=[1]), "{path}:1: id is [1], must be a text or a whole number"),
    "id_is_float": (line(id=0.5), "{path}:1: id is 0.5, must be a text or a whole number"),
    "id_is_true": (line(id=True), "{path}:1: id is True, must be a text"),
    "id_is_empty": (line(id=""), "{path}:1: id is '', must be a text"),
    "id_is_half_a_pair": (line(id="\ud800"), "{path}:1: id is '\\ud800', which is not valid Unicode"),
    "id_twice": (line() + line(id="2") + line(), "{path}:3: id is '1', which line 1 already has"),
    "id_twice_as_number": (line() + line(id=1), "{path}:2: id is 1, which line 1 already has"),
    # texts
    "user_missing": (without("user"), "conversations[0].user is None, must be a text"),
    "user_is_number": (turn(user=3), "conversations[0].user is 3, must be a text"),
    "user_is_deep": (turn(user=eval("[" * 60 + "]" * 60)), "conversations[0].user is [[[[[["),
    "answer_missing": (without("assistant"), "conversations[0].assistant is None"),
    "answer_empty": (turn(assistant=""), "conversations[0].assistant is '', must be a text that is not empty"),
    "answer_blank": (turn(assistant=" \n\u00a0"), "conversations[0].assistant is ' \\n\\xa0', must be a text"),
    "answer_is_list": (turn(assistant=["yes"]), "conversations[0].assistant is ['yes'], must be a text"),
    "image_tag": (turn(user="<|image_1|>\nWhich?"), "conversations[0].user holds '<|image_1|>'"),
    "role_token": (turn(assistant="yes<|user|>"), "conversations[0].assistant holds '<|user|>'"),
    "sentence_token": (turn(user="a</s>"), "conversations[0].user holds '</s>'"),
    "half_a_pair": (
        turn(user="Which \udc00?"),
        "conversations[0].user is 'Which \\udc00?', which is not valid Unicode",
    ),
    "nul_character": (turn(user="Wh\0ch"), "conversations[0].user is 'Wh\\x00ch', which holds a NUL character"),
    # images
    "images_is_text": (turn(images="a.png"), "conversations[0].images is 'a.png', must be a list of file names"),
    "images_is_null": (turn(images=None), "conversations[0].images is None, must be a list"),
    "image_is_number": (turn(images=["a.png", 1]), "conversations[0].images is ['a.png', 1], must be a list"),
    "image_missing": (turn(images=["b.png"]), "images[0] is 'b.png', but {images}/b.png does not exist"),
    "second_image_missing": (turn(images=["a.png", "no/b.png"]), "images[1] is 'no/b.png', but"),
    "image_is_folder": (turn(images=["folder"]), "images[0] is 'folder', but {images}/folder is not a file"),
    "image_is_pipe": (turn(images=["pipe"]), "images[0] is 'pipe', but {images}/pipe is not a file"),
    "image_name_empty": (turn(images=[""]), "images[0] is '', but {images}/ is not a file"),
    "image_in_file": (turn(images=["a.png/b.png"]), "images[0] is 'a.png/b.png', but"),
    "image_absolute": (turn(images=["/a.png"]), "images[0] is '/a.png', must be a path inside {images}"),
    "image_of_the_system": (turn(images=["/etc/passwd"]), "images[0] is '/etc/passwd', must be a path inside"),
    "image_above": (turn(images=["../secret.png"]), "images[0] is '../secret.png', must be a path inside"),
    "image_back_and_in": (turn(images=["folder/../a.png"]), "is 'folder/../a.png', must be a path inside"),
    "image_links_out": (turn(images=["out.png"]), "images[0] is 'out.png', which is a symbolic link out of {images}"),
    "image_in_link_out": (turn(images=["away/secret.png"]), "'away/secret.png', which is a symbolic link out of"),
    "image_links_nowhere": (turn(images=["broken.png"]), "images[0] is 'broken.png', but"),
    "image_links_in_a_ring": (turn(images=["ring.png"]), "images[0] is 'ring.png', but"),
    "image_name_with_nul": (turn(images=["a\0.png"]), "images[0] is 'a\\x00.png', but"),
    "image_name_too_long": (turn(images=["a" * 5000]), "does not exist"),
    "image_name_half_a_pair": (turn(images=["\ud800.png"]), "images[0] is '\\ud800.png', but"),
    "image_name_with_colours": (turn(images=["\x1b[31mred\nline"]), "images[0] is '\\x1b[31mred\\nline', but"),
    # fields and tags whose content would be lost
    "images_beside_the_turns": (line(images=["a.png"]), "{path}:1: images is ['a.png'], but images belong into a turn"),
    "image_in_a_turn": (turn(image="a.png"), "{path}:1: conversations[0].image is 'a.png', but images belong"),
    "system_in_a_turn": (turn(system="Be brief."), "conversations[0].system is 'Be brief.', but it belongs beside"),
    "system_is_number": (line(system=3), "{path}:1: system is 3, must be a text that is not empty"),
    "system_with_a_token": (line(system="a<|end|>"), "{path}:1: system holds '<|end|>'"),
    "system_with_a_place": (line(system="see <image>"), "{path}:1: system holds '<image>', which stands for"),
    "train_is_text": (turn(train="no"), "{path}:1: conversations[0].train is 'no', must be true or false"),
    "train_beside_the_turns": (line(train=False), "{path}:1: train is False, but it belongs into a turn"),
    "train_is_number": (turn(train=0), "{path}:1: conversations[0].train is 0, must be true or false"),
    "messages": (line(messages=[1]), "{path}:1: messages is [1], but convert the file with tools/"),
    "video": (line(video="v.mp4"), "{path}:1: video is 'v.mp4', but the model sees images only"),
    "video_in_a_turn": (turn(videos=["v.mp4"]), "{path}:1: conversations[0].videos is ['v.mp4'], but the model"),
    "rejected": (line(rejected="no"), "{path}:1: rejected is 'no', but preferences"),
    "image_in_an_unknown_field": (
        json.dumps({"conversations": [{"user": "a", "assistant": "b"}], "picture": "a.png"}).encode(),
        "{path}:1: picture is 'a.png', but no field of this name is read",
    ),
    "video_tag": (turn(user="<video>\nWhich?"), "{path}:1: conversations[0].user holds '<video>', which stands for"),
    "too_many_places": (
        turn(user="<image> or <image>?"),
        "{path}:1: conversations[0].user is '<image> or <image>?', with 2 of the places <image> for 1 images: write",
    ),
    "too_few_places": (
        turn(images=["a.png", "folder/c.png", "a.png"], user="Is <image> larger than <image>?"),
        "{path}:1: conversations[0].user is 'Is <image> larger than <image>?', with 2 of the places <image> for 3",
    ),
    "nothing_but_places": (
        turn(user=" <image>\n"),
        "conversations[0].user is ' <image>\\n', which holds no text beside",
    ),
    "a_place_without_images": (turn(images=[], user="Is <image> red?"), "conversations[0].user holds '<image>', which"),
    "a_place_of_another_kind": (turn(user="<Image> <image> red?"), "conversations[0].user holds '<Image>', which"),
    "a_place_with_a_backslash": (turn(user="\\<image> red?"), "conversations[0].user holds '<image>', which"),
    "image_tag_of_llava": (turn(assistant="see <image>"), "{path}:1: conversations[0].assistant holds '<image>'"),
    # several at once
    "several": (
        turn(user="", assistant=None, images=["b.png"]) + b"{\n" + line(id="2"),
        "{path}: 4 problems\n  {path}:1: conversations[0].user is ''",
    ),
    "many": (b"{\n" * 2_000, "{path}: 2,000 problems; these are the first 10\n  {path}:1: not a JSON"),
}

# Unusual, and right.
ACCEPTED = {
    "mark": b"\xef\xbb\xbf" + line(),
    "windows_line_ends": line().replace(b"\n", b"\r\n") + line(id="2").replace(b"\n", b"\r\n"),
    "no_last_line_end": line()[:-1],
    "no_id": json.dumps({"conversations": [TURN]}).encode(),
    "null_id": line(id=None),
    "number_as_id": line(id=12345678901234567890123),
    "other_fields": line(source="x", extra={"deep": [1, 2, {"a": None}]}),
    "empty_fields": line(image=None, images=[], video="", tools=[], system=None),
    "tags_of_html": turn(user='<video src="a.mp4">, <b>, <img src="a.png">'),
    "no_images": without("images"),
    "system": line(system="Be brief."),
    "train": line(conversations=[TURN | {"train": False}, TURN | {"train": True}, TURN | {"train": None}]),
    "a_place": turn(user="Is <image> red?"),
    "link_inside": turn(images=["inside.png"]),
    "unusual_spelling": turn(images=["./folder//c.png"]),
    "any_script": turn(user="日本語 🙂 עברית", assistant="Zoë"),
    "line_separator_in_text": json.dumps(GOOD | {"id": "a\u2028b"}, ensure_ascii=False).encode(),
}


def write_images_folder(folder: Path) -> Path:
    """A folder `images` with the files, links and pipe that the annotations name, and a secret beside it."""
    images = folder / "images"
    (images / "folder").mkdir(parents=True)
    for path in (images / "a.png", images / "folder" / "c.png", folder / "secret.png"):
        Image.new("RGB", (9, 9)).save(path)
    (images / "inside.png").symlink_to("folder/c.png")
    (images / "out.png").symlink_to(folder / "secret.png")
    (images / "away").symlink_to(folder)
    (images / "broken.png").symlink_to("nowhere.png")
    (images / "ring.png").symlink_to("ring.png")
    os.mkfifo(images / "pipe")
    return images


def encoded(format: str, width=80, height=60, mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def cut(content: bytes, share=0.5) -> bytes:
    return content[: int(len(content) * share)]


def png(width: int, height: int, data: bytes = b"", colour: int = 2, depth: int = 8) -> bytes:
    """A PNG whose header claims any size, whatever its data hold."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "tiff")
    return buffer.getvalue()


def flipped(content: bytes, at: float) -> bytes:
    changed = bytearray(content)
    changed[int(len(content) * at)] ^= 0xFF
    return bytes(changed)


# name: (content of the file, what the message holds besides the file's name)
IMAGES = {
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"This is no image.", "in none of the formats that are read"),
    "page.png": (b"<!DOCTYPE html><html>404</html>", "in none of the formats that are read"),
    "vector.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "in none of the formats that are read"),
    "large_files.png": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "in none of the formats",
    ),
    "film.avi": (b"RIFF\0\0\0\0AVI LIST", "in none of the formats that are read"),
    "noise.bin": (bytes(range(256)) * 9, "can't be read as an image"),
    "cut.png": (cut(encoded("png")), "can't be read as an image"),
    "cut.jpg": (cut(encoded("jpeg")), "truncated"),
    "cut_in_head.jpg": (encoded("jpeg")[:30], "can't be read as an image"),
    "cut.gif": (cut(encoded("gif")), "truncated"),
    "cut.webp": (cut(encoded("webp")), "can't be read as an image"),
    "cut.bmp": (cut(encoded("bmp")), "truncated"),
    "cut.tif": (cut(encoded("tiff")), "can't be read as an image"),
    "cut.ppm": (cut(encoded("ppm")), "truncated"),
    "signature.png": (b"\x89PNG\r\n\x1a\n", "can't be read as an image"),
    "damaged_head.png": (flipped(encoded("png"), 20 / len(encoded("png"))), "can't be read as an image"),
    "no_pixels.png": (png(40, 40), "can't be read as an image"),
    "few_pixels.png": (png(40, 40, b"\0" * 100), "can't be read as an image"),
    "zero_wide.png": (png(0, 40), "can't be read as an image"),
    "zero_high.gif": (b"GIF89a\x05\0\0\0\0\0\0,\0\0\0\0\x05\0\0\0\0\x02\x02L\x01\0;", "zero_high.gif"),
    "bomb.png": (png(60_000, 60_000), "decompression bomb"),
    "bomb.gif": (b"GIF89a\xff\xff\xff\xff" + encoded("gif")[10:], "decompression bomb"),
    "bomb.txt.png": (
        b"\x89PNG\r\n\x1a\n"
        + png(9, 9)[8:33]
        + (lambda body: struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body)))(
            b"a\0\0" + zlib.compress(b" " * 50_000_000)
        )
        + png(9, 9, b"\0" * 252)[33:],
        "can't be read as an image",
    ),
    "thin.png": (encoded("png", 2000, 1), "2000 x 1 pixels is too thin"),
    "thin_upright.png": (encoded("png", 1, 2000), "pixels is too thin"),
    "float.tif": (tiff(np.ones((9, 9), np.float32)), "floating-point pixels have no fixed range"),
    "deep.tif": (tiff(np.full((9, 9), 2**20, np.int32)), "its values go from 1048576 to 1048576"),
    "negative.tif": (tiff(np.full((9, 9), -1, np.int32)), "its values go from -1 to -1"),
}


# ---- Random inputs, for hypothesis

IMAGE_MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
]

IMAGE_SIZES = st.tuples(st.integers(0, 90), st.integers(0, 90)) | st.sampled_from(
    [(1, 2000), (3000, 2), (1, 1), (700, 400)]
)

RANDOM_IMAGES = st.builds(Image.new, st.sampled_from(IMAGE_MODES), IMAGE_SIZES, st.sampled_from([0, 1, 200]))

RANDOM_TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ["<|image_1|>", "<|image_2|>", "<|", "|>", "<s>", "\n", "{{ 1 }}", "{% x", "yes", "\u0301", "\u202e"]
    )
).map("".join)


def main():
    folder = Path(sys.argv[1])
    write_images_folder(folder)
    for name, (content, _) in ANNOTATIONS.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "bad_images").mkdir()
    for name, (content, _) in IMAGES.items():
        (folder / "bad_images" / name).write_bytes(content)
    print(f"{len(ANNOTATIONS)} files of annotations and {len(IMAGES)} images")


if __name__ == "__main__":
    main()

# Paths in a folder of `write_images_folder` that can't be read as a file, each with what messages say of it.
NOT_REGULAR = [
    ("nowhere.jsonl", "does not exist"),
    ("a" * 5000, "does not exist"),
    ("images", "not a regular"),
    ("images/pipe", "not a regular"),
]
