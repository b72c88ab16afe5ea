"""Checks a data set before training: decodes every image and counts every example's tokens."""

import hashlib
import math
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..console import tell
from ..errors import InputError, Problems
from ..model.processing_phi3v import Phi3VProcessor
from ..model.rgb import exif_orientation, to_rgb
from ..text import printable
from ..workers import explain
from .conversations import chat_text
from .images import image_name, open_image
from .loading import batches_of, make_loader

# Kinds of images that are accepted but treated in a way that may surprise, each with how.
ANIMATED = "animated or of several pages: the first frame is used"
CMYK = "CMYK: converted without a colour profile"
DEEP = "16-bit grey: the upper 8 bits are used"
ROTATED = "turned by EXIF: used as stored, not turned (--exif_rotate turns them upright)"
UPRIGHT = "turned by EXIF: turned upright, as --exif_rotate says"
TRANSPARENT = "transparent: used as if opaque, with the colours stored under it"
HUGE = "of more than {:.0f} megapixels: slow to decode"
_REMEMBERED = 10_000  # images whose result a worker keeps


@dataclass
class Summary:
    """What `check_images` found; `str` gives a short table. `problems` are errors, `kinds` are not."""

    name: str = "data"
    examples: int = 0
    images_per_example: list[int] = field(default_factory=list)
    tokens_per_example: list[int] = field(default_factory=list)  # only of examples whose images are all good
    max_length: int | None = None
    kinds: Counter = field(default_factory=Counter)  # how many images are of each special kind
    problems: Problems = field(default_factory=Problems)
    bad_examples: list = field(default_factory=list)  # their ids

    @property
    def too_long(self) -> float:
        """The share of examples with more than `max_length` tokens; 0 without a limit."""
        if self.max_length is None or not self.tokens_per_example:
            return 0.0
        return sum(tokens > self.max_length for tokens in self.tokens_per_example) / len(self.tokens_per_example)

    def __str__(self):
        lines = [
            f"{self.name}: {self.examples:,} examples, {sum(self.images_per_example):,} images",
            f"images per example: {_spread(self.images_per_example)}",
            f"tokens per example: {_spread(self.tokens_per_example)}",
        ]
        if self.max_length is not None:
            lines[-1] += f"; {self.too_long:.1%} of the examples have more than {self.max_length:,}"
        lines += [f"{count:,} images {kind}" for kind, count in sorted(self.kinds.items())]
        if self.problems:
            ids = ", ".join(map(str, self.bad_examples[: self.problems.shown]))
            more = ", …" if len(self.bad_examples) > self.problems.shown else ""
            lines.append(
                f"{len(self.problems):,} problems in {len(self.bad_examples):,} examples: {printable(ids)}{more}"
            )
            lines += [f"  {line}" for line in self.problems.lines]
        return "\n  ".join(lines)


def _spread(values: list[int]) -> str:
    if not values:
        return "none"
    return f"min {min(values):,}, median {statistics.median(values):,.0f}, max {max(values):,}"


class _Examined(Dataset):
    """Item i is the result of checking example i. A DataLoader's workers thus share the work."""

    def __init__(self, conversations: Sequence, processor: Phi3VProcessor):
        self.conversations = conversations
        self.processor = processor
        self.images = {}  # results by image, so that an image with several questions is decoded once

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i) -> tuple[str, int, int | None, list[str], list[str]]:
        """(id, number of images, tokens, special kinds, problems); tokens are None if an image is bad."""
        try:
            example = self.conversations[i]
        except InputError as e:
            return f"number {i + 1}", 0, None, [], [str(e)]
        num_img_tokens, kinds, problems = [], [], []
        for turn in example["conversations"]:
            for image in turn["images"]:
                tokens, found, problem = self._image(image)
                num_img_tokens.append(tokens)
                kinds += found
                problems += [problem] if problem else []
        length = None
        if not problems:
            try:
                length = count_tokens(self.processor, example["conversations"], num_img_tokens)
            except ValueError as e:  # the text holds an image tag, and comes from a source that does not check texts
                problems.append(str(e))
        return str(example["id"]), len(num_img_tokens), length, kinds, problems

    def _image(self, image) -> tuple[int, list[str], str | None]:
        key = None
        if isinstance(image, (str, os.PathLike)):
            key = os.fspath(image)
        elif isinstance(image, dict) and image.get("bytes") is not None:
            key = hashlib.sha1(image["bytes"]).digest()
        if key is None:
            return examine_image(image, self.processor.image_processor)
        if key not in self.images:
            if len(self.images) >= _REMEMBERED:
                self.images.clear()
            self.images[key] = examine_image(image, self.processor.image_processor)
        return self.images[key]


def examine_image(image, image_processor) -> tuple[int, list[str], str | None]:
    """(tokens, special kinds, problem or None) of one image, given in any form that `open_image` takes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about large images and odd metadata without naming the image
            with open_image(image) as opened:
                rgb = to_rgb(opened, image_name(image), image_processor.exif_rotate)
                tokens = image_processor.calc_num_image_tokens_from_image_size(*rgb.size)
                return tokens, special_kinds(opened, image_processor.exif_rotate), None
    except InputError as e:
        return 0, [], str(e)
    except ValueError as e:  # the image processor refuses empty and too thin images, and knows no names
        return 0, [], f"{image_name(image)}: {e}"


def special_kinds(image: Image.Image, exif_rotate: bool) -> list[str]:
    """The kinds of the list above that a decoded image belongs to. exif_rotate: whether it is turned upright."""

    def least_opaque() -> int:
        return image.convert("RGBA").getextrema()[3][0] if image.has_transparency_data else 255

    kinds = []
    if image.mode == "CMYK":
        kinds.append(CMYK)
    if image.mode == "I" or image.mode.startswith("I;16"):
        kinds.append(DEEP)
    if exif_orientation(image) != 1:
        kinds.append(UPRIGHT if exif_rotate else ROTATED)
    if _value_or_default(255, least_opaque) < 255:
        kinds.append(TRANSPARENT)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        kinds.append(HUGE.format(Image.MAX_IMAGE_PIXELS / 1e6))
    if _value_or_default(False, lambda: getattr(image, "is_animated", False)):  # counting frames takes quadratic time
        kinds.append(ANIMATED)
    return kinds


def _value_or_default(default, get_value):
    """`get_value()`, or `default` if it raises: damaged metadata or later frames do no harm, because only the pixels of
    the first frame are used."""
    try:
        return get_value()
    except Exception:
        return default


def count_tokens(processor: Phi3VProcessor, turns: list[dict], num_img_tokens: list[int]) -> int:
    """How many tokens `encode_conversation` would make of a conversation, without reading pixels."""
    text, _ = chat_text(processor, turns)
    return len(processor.tokenize(text, num_img_tokens)[0])


def check_images(
    conversations: Sequence[dict],
    processor: Phi3VProcessor,
    num_workers: int,
    max_length: int | None = None,
    name: str = "data",
    disable_tqdm: bool = False,
) -> Summary:
    """Decodes every image of all conversations, as training would, and counts tokens.

    conversations: `{"id", "conversations": [{"images", "user", "assistant"}]}`, images as `open_image` takes them.
    num_workers: how many processes share the work; with 0 this process does it.
    max_length: the summary tells how many examples have more tokens than this.
    name: the data set's name in the summary and its problems.
    Raises InputError only if a worker dies. Problems of the data are in the summary's `problems`.
    """
    summary = Summary(name=name, max_length=max_length)
    loader = make_loader(
        _Examined(conversations, processor),
        batch_size=8,
        num_workers=num_workers,
        batches=math.ceil(len(conversations) / 8),
        collate_fn=list,
        # Conversations of a table refer to functions of the script, which only a forked process has.
        multiprocessing_context="fork" if num_workers else None,
    )
    bar = tqdm(total=len(conversations), desc=f"checking {name}", unit="example", disable=disable_tqdm)
    try:
        with bar:
            for batch in batches_of(loader):
                for id, n_images, tokens, kinds, problems in batch:
                    summary.examples += 1
                    summary.images_per_example.append(n_images)
                    summary.kinds.update(kinds)
                    if tokens is not None:
                        summary.tokens_per_example.append(tokens)
                    for problem in problems:
                        summary.problems.add(f"{name}, example {id}", problem)
                    if problems:
                        summary.bad_examples.append(id)
                bar.update(len(batch))
    except RuntimeError as e:
        if (reason := explain(e)) is None:
            raise
        raise InputError(f"{name}, near example {summary.examples + 1}: {reason}") from None
    return summary


def check_data(
    train: Sequence[dict],
    evaluation: Sequence[dict],
    processor: Phi3VProcessor,
    max_length: int | None,
    num_workers: int,
    disable_tqdm: bool = False,
    skip_bad: bool = False,
):
    """Prints a `Summary` of each data set. Raises InputError with the first problems of both and how many there are;
    with `skip_bad` only says that a run leaves these examples out.

    max_length, num_workers: as in `check_images`.
    """
    problems = Problems()
    for name, conversations in (("training data", train), ("evaluation data", evaluation)):
        summary = check_images(conversations, processor, num_workers, max_length, name, disable_tqdm)
        tell(*str(summary).split("\n"))
        problems.extend(summary.problems)
    if not skip_bad:
        problems.raise_if_any("data")
    elif problems:
        tell("a run leaves out the examples with problems, as --on_bad_example skip says")
    if not problems:
        tell("no problems found")
