"""A look through all examples before a training: every image decoded, every length counted."""

import hashlib
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import InputError, Problems
from ..model.processing_phi3v import Phi3VProcessor
from .conversations import chat_text
from .images import image_name, open_image, to_rgb

EXIF_ORIENTATION = 0x0112
# Special kinds of images, and what becomes of them.
ANIMATED = "animated or of several pages: the first frame is used"
CMYK = "CMYK: converted without a colour profile"
DEEP = "16-bit grey: the upper 8 bits are used"
ROTATED = "turned by EXIF: used as stored, not turned"
TRANSPARENT = "transparent: used as if opaque, with the colours stored under it"
HUGE = "of more than {:.0f} megapixels: slow to decode"
_REMEMBERED = 10_000


@dataclass
class Summary:
    """What `check_images` found. Printed, it is a table of some lines; `problems` are errors, `kinds` are not."""

    name: str = "data"
    examples: int = 0
    images_per_example: list[int] = field(default_factory=list)
    tokens_per_example: list[int] = field(default_factory=list)  # without examples of which an image is bad
    max_length: int | None = None
    kinds: Counter = field(default_factory=Counter)  # images of each special kind
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
            f"images an example: {_spread(self.images_per_example)}",
            f"tokens an example: {_spread(self.tokens_per_example)}",
        ]
        if self.max_length is not None:
            lines[-1] += f"; {self.too_long:.1%} of the examples have more than {self.max_length:,}"
        lines += [f"{count:,} images {kind}" for kind, count in sorted(self.kinds.items())]
        if self.problems:
            ids = ", ".join(map(str, self.bad_examples[: self.problems.shown]))
            more = ", …" if len(self.bad_examples) > self.problems.shown else ""
            lines.append(
                f"{len(self.problems):,} problems in {len(self.bad_examples):,} examples: "
                f"{ids.encode('unicode_escape').decode()}{more}"
            )
            lines += [f"  {line}" for line in self.problems.lines]
        return "\n  ".join(lines)


def _spread(values: list[int]) -> str:
    if not values:
        return "none"
    return f"min {min(values):,}, median {statistics.median(values):,.0f}, max {max(values):,}"


class _Examined(Dataset):
    """What is found out about each example, by the worker that is asked for it."""

    def __init__(self, conversations: Sequence, processor: Phi3VProcessor):
        self.conversations = conversations
        self.processor = processor
        self.images = {}  # several questions about an image, and it is decoded once

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i) -> tuple[str, int, int | None, list[str], list[str]]:
        """(id, images, tokens, special kinds, problems); tokens are None where an image is bad."""
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
            except ValueError as e:  # a text with an image's tag, where no reader has looked
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
    """(tokens, special kinds, problem or None) of one image as `open_image` takes it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd metadata: of no use without the image's name
            with open_image(image) as opened:
                tokens = image_processor.calc_num_image_tokens_from_image_size(*to_rgb(opened, image_name(image)).size)
                return tokens, special_kinds(opened), None
    except InputError as e:
        return 0, [], str(e)
    except ValueError as e:  # from the image processor, which knows no names: empty, or too thin
        return 0, [], f"{image_name(image)}: {e}"


def special_kinds(image: Image.Image) -> list[str]:
    kinds = []
    if image.mode == "CMYK":
        kinds.append(CMYK)
    if image.mode == "I" or image.mode.startswith("I;16"):
        kinds.append(DEEP)
    if _value_or_default(1, lambda: image.getexif().get(EXIF_ORIENTATION, 1)) not in (0, 1):
        kinds.append(ROTATED)
    if (
        _value_or_default(255, lambda: image.convert("RGBA").getextrema()[3][0] if image.has_transparency_data else 255)
        < 255
    ):
        kinds.append(TRANSPARENT)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        kinds.append(HUGE.format(Image.MAX_IMAGE_PIXELS / 1e6))
    if (
        _value_or_default(1, lambda: getattr(image, "n_frames", 1)) > 1
    ):  # at last: counting can move on to another frame
        kinds.append(ANIMATED)
    return kinds


def _value_or_default(default, get_value):
    """Damage in metadata or in a later frame is no problem where only the first one's pixels are used."""
    try:
        return get_value()
    except Exception:
        return default


def count_tokens(processor: Phi3VProcessor, turns: list[dict], num_img_tokens: list[int]) -> int:
    """The length in tokens of what `encode_conversation` makes of a conversation, without its pixels."""
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
    num_workers: processes that share the work; 0 for this one.
    max_length: a number of tokens, to count the examples that have more.
    Raises InputError only where a worker dies; what is wrong with the data is in the summary's `problems`.
    """
    summary = Summary(name=name, max_length=max_length)
    loader = DataLoader(
        _Examined(conversations, processor),
        batch_size=8,
        num_workers=num_workers,
        collate_fn=list,
        # Conversations of a table hold functions of the script, which can't be sent to a process that starts anew.
        multiprocessing_context="fork" if num_workers else None,
    )
    bar = tqdm(total=len(conversations), desc=f"checking {name}", unit="example", disable=disable_tqdm)
    try:
        with bar:
            for batch in loader:
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
        if not str(e).startswith("DataLoader worker"):  # exited unexpectedly, or was killed
            raise
        raise InputError(
            f"{name}: a process that decodes images died near example {summary.examples + 1}, perhaps for want of "
            "memory: check with fewer workers"
        ) from None
    return summary


def check_data(
    train: Sequence[dict],
    evaluation: Sequence[dict],
    processor: Phi3VProcessor,
    max_length: int | None,
    num_workers: int,
    disable_tqdm: bool = False,
):
    """Prints a `Summary` of either set. Raises InputError with the first problems of both, and the number of all."""
    problems = Problems()
    for name, conversations in (("training data", train), ("evaluation data", evaluation)):
        summary = check_images(conversations, processor, num_workers, max_length, name, disable_tqdm)
        print(summary, flush=True)
        problems.extend(summary.problems)
    problems.raise_if_any("data")
