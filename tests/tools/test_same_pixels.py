"""Training, evaluation, tools/ask.py and the library make the same pixels of a file, or say the same about it."""

import hashlib
import json

import bad_inputs
import numpy as np
import pytest
from helpers import CHECKPOINT, SHORT, arguments
from PIL import ExifTags, Image

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VImageProcessor, Phi3VProcessor
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset
from phi3v.errors import InputError
from tools import ask, convert_conversations

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)


def colour(mode):
    return Image.fromarray(NOISE[:, :, :3]).convert(mode)


FILES = {  # name: (image, options of saving)
    "grey.png": (colour("L"), {}),
    "one_bit.png": (colour("1"), {}),
    "deep.png": (Image.fromarray(RAMP), {}),
    "deep.tif": (Image.fromarray(RAMP), {}),
    "deep_big_endian.tif": (Image.fromarray(RAMP.astype(">u2")), {}),
    "32_bit.tif": (Image.fromarray(RAMP.astype(np.int32)), {}),
    "deep.pgm": (Image.fromarray(RAMP), {}),
    "palette.png": (colour("P"), {}),
    "clear_palette.png": (colour("P"), {"transparency": 3}),
    "palette.gif": (colour("P"), {"transparency": 3}),
    "clear_grey.png": (colour("LA"), {}),
    "clear.png": (Image.fromarray(NOISE), {}),
    "clear.webp": (Image.fromarray(NOISE), {"lossless": True}),
    "colour_made_clear.png": (colour("RGB"), {"transparency": (1, 2, 3)}),
    "cmyk.jpg": (colour("CMYK"), {}),
    "cmyk.tif": (colour("CMYK"), {}),
    "lab.tif": (colour("LAB"), {}),
    "ycbcr.jpg": (colour("YCbCr"), {}),
}
REFUSED = ["float.tif", "deep.tif", "negative.tif", "thin.png"]


def four_paths(path, processor):
    """(name of a path, function that makes the sub-crops, of values between 0 and 255)."""
    turns = [{"images": [str(path)], "user": "What?", "assistant": "This."}]
    examples = [{"id": "1", "conversations": turns}]
    image_processor = processor.image_processor
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (image_processor.image_mean, image_processor.image_std))

    def bytes_of(pixels):
        """Normalised crops, of which the first is the global crop, as the bytes from which they were made."""
        values = (pixels.squeeze(0)[1:].numpy() * std + mean) * 255
        return np.round(values).astype(int)

    def training():
        return ConversationDataset(examples, processor)[0]["tiles"].permute(0, 3, 1, 2).numpy()

    def evaluation():
        dataset = ConversationDataset(examples, processor, for_generation=True)
        batch = Collator(processor, "left", normalise=False)([dataset[0]])
        return bytes_of(image_processor.crops_of_tiles(batch["tiles"], batch["grids"]))

    def asked():
        return bytes_of(ask.encode(processor, turns)["pixel_values"])

    def library():
        with Image.open(path) as image:
            return bytes_of(processor("<|image_1|>", image)["pixel_values"])

    return {"training": training, "evaluation": evaluation, "ask.py": asked, "library": library}


@pytest.mark.parametrize("exif_rotate", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_four_paths_make_the_same_pixels(name, exif_rotate, tmp_path):
    image, options = FILES[name]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    if name.endswith((".png", ".jpg", ".webp")):
        options = options | {"exif": exif}
    image.save(tmp_path / name, **options)
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4, exif_rotate=exif_rotate)
    wanted, *others = (make() for make in four_paths(tmp_path / name, processor).values())
    assert len(wanted) == 4 and wanted.std() > 5
    assert all(np.array_equal(wanted, other) for other in others)


@pytest.mark.parametrize("name", REFUSED)
def test_four_paths_give_the_same_error(name, tmp_path, processor):
    (tmp_path / name).write_bytes(bad_inputs.IMAGES[name][0])
    messages = []
    for make in four_paths(tmp_path / name, processor).values():
        with pytest.raises(ValueError) as error:
            make()
        messages.append(str(error.value))
    if name == "thin.png":  # the library is given sizes, which have no name
        messages[-1] = f"{tmp_path / name}: {messages[-1]}"
    assert len(set(messages)) == 1 and "\n" not in messages[0] and str(tmp_path / name) in messages[0]
    assert isinstance(error.value, InputError) or name == "thin.png"


@pytest.fixture
def photos(tmp_path):
    """Data whose photos lie on their side; the digest of their sub-crops as stored and upright."""
    upright = Image.fromarray(NOISE[:, :, :3]).resize((30, 50))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "data" / "images").mkdir(parents=True)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "data" / "images" / "photo.png", exif=exif)
    turns = [{"images": ["photo.png"], "user": "What?", "assistant": "This."}]
    for split in ("train", "val"):
        lines = [json.dumps({"id": i, "conversations": turns}) + "\n" for i in range(4)]
        (tmp_path / "data" / f"ucf101_{split}.jsonl").write_text("".join(lines))
    processor = Phi3VImageProcessor(num_crops=4, image_size=56, patch_size=14)
    return tmp_path / "data", *(hashlib.sha1(processor.tiles(image).numpy()).digest() for image in (stored, upright))


@pytest.fixture
def seen(monkeypatch):
    """The digests of all sub-crops that are made in this process."""
    made, tiles = set(), Phi3VImageProcessor.tiles

    def recorded(self, image):
        found = tiles(self, image)
        made.add(hashlib.sha1(found.numpy()).digest())
        return found

    monkeypatch.setattr(Phi3VImageProcessor, "tiles", recorded)
    return made


@pytest.mark.parametrize("exif_rotate", [False, True])
def test_a_run_and_what_follows_it_see_photos_in_the_same_way(exif_rotate, photos, seen, tmp_path, capsys):
    data, *ways = photos
    flags, wanted = ["--exif_rotate"] * exif_rotate, {ways[exif_rotate]}

    def made() -> set:
        found = set(seen)
        seen.clear()
        return found

    script.main(arguments(data, tmp_path / "out", *SHORT, *flags))
    assert made() == wanted
    config = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert config.get("exif_rotate", "missing") == (True if exif_rotate else "missing")
    # Nothing that comes after it needs the flag.
    evaluate = ["--evaluate_only", "--model_name_or_path", str(tmp_path / "out")]
    script.main(arguments(data, tmp_path / "evaluated", *evaluate))
    assert made() == wanted
    photo = str(data / "images" / "photo.png")
    ask.main([str(tmp_path / "out"), photo, "--question", "What?", "--max_new_tokens", "1"])
    assert made() == wanted
    Phi3VProcessor.from_pretrained(tmp_path / "out")("<|image_1|>", Image.open(photo))
    assert made() == wanted
    capsys.readouterr()
    script.main(arguments(data, tmp_path / "checked", "--check_data", *flags))
    told = "turned upright, as --exif_rotate says" if exif_rotate else "used as stored, not turned"
    assert f"4 images turned by EXIF: {told}" in capsys.readouterr().out


def test_the_converter_writes_photos_upright(photos, tmp_path, capsys):
    data, _, upright = photos
    Image.new("RGB", (8, 8)).save(data / "images" / "other.png")
    (tmp_path / "q.csv").write_text("image,question,answer\nphoto.png,What?,This.\nother.png,What?,That.\n")
    flags = ["--source", str(tmp_path / "q.csv"), "--images_dir", str(data / "images"), "--val_share", "0.5"]
    processor = Phi3VImageProcessor(num_crops=4, image_size=56, patch_size=14, exif_rotate=True)
    for more, size in (([], (50, 30)), (["--exif_rotate"], (30, 50))):
        out = tmp_path / f"out{len(more)}"
        convert_conversations.main([*flags, "--out_dir", str(out), *more])
        with Image.open(out / "images" / "photo.png") as image:
            assert image.size == size  # as stored, in the file
            assert hashlib.sha1(processor.tiles(image).numpy()).digest() == upright
        said = "1 images were turned upright, as their EXIF data say" in capsys.readouterr().out
        assert said == bool(more)
    assert (data / "images" / "photo.png").stat().st_nlink == 1  # both outputs are copies
