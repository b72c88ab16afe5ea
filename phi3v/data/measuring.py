"""Counts the tokens and crops of examples by arithmetic, without making the ids of image tokens or reading pixels."""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..model.chat import ASSISTANT, ROLE_TOKENS
from ..model.image_processing_phi3v import num_image_tokens
from ..model.packing import IGNORE_INDEX
from .images import State, state_of_image
from .kept_sizes import KeptSizes, Key, key_of

TOGETHER = 64  # examples whose texts go to the tokenizer in one call


class Size(NamedTuple):
    """How large an example is, and a checksum by which a changed example is noticed."""

    tokens: int
    image_tokens: int  # of these tokens
    crops: int  # sub-crops and global crops of all its images
    targets: int  # supervised tokens
    digest: int  # as `digest` computes it


def digest(text, states: Sequence[State]) -> int:
    """A checksum of an example's text and of its images: of the sizes of their files, or of their content in memory.

    text: as `_content` returns it. states: of the images, as `state_of_image` returns them. Checkpoints hold the
    checksum, so it never changes.
    """
    of_images = [state and (state[1] if len(state) == 2 else state[0]) for state in states]
    return zlib.crc32(repr([text, *of_images]).encode())


def measure(dataset, indices: Sequence[int], kept: KeptSizes | None = None) -> Iterator[tuple[Size, Key | None]]:
    """Yields the Size of each of these examples of a `ConversationDataset`, and the key under which it may be kept.

    The key is None if an image can't be read, or can't be recognised later, and if the example was cut off. Images that
    neighbours share are looked at once. kept: sizes that are not measured again. Raises InputError as the dataset's
    items do.
    """
    last_key, looked_at = None, []
    for start in range(0, len(indices), TOGETHER):
        part, new_texts = [], []
        for index in indices[start : start + TOGETHER]:
            text, images, learned = dataset.chat(index)
            images_key = dataset.images_key(index)
            if images_key is None or images_key != last_key:
                last_key, looked_at = images_key, [_Look(dataset, image) for image in images]
            states = [look.state for look in looked_at]
            key = key_of(_content(text, learned), images, states)
            size, grids = kept.get(key) if kept and key else None, None
            if size is None or not _fits(dataset, size[0]):
                grids = [look.grid for look in looked_at]
                key = key if all(look.is_good for look in looked_at) else None
                new_texts.append(text)
            part.append((index, text, learned, states, key, size, grids))
        chunks = iter(dataset.processor.chunks_of(new_texts) if new_texts else ())
        for index, text, learned, states, key, size, grids in part:
            if grids is None:
                yield Size(*size), key
            else:
                counts, is_whole = _count(dataset, index, text, learned, grids, *next(chunks))
                yield Size(*counts, digest(_content(text, learned), states)), key if is_whole else None


def _content(text: str, learned: tuple[bool, ...] | None):
    """What identifies a text and what is learned of it: the text alone if that is every answer."""
    return text if learned is None else (text, learned)


def _fits(dataset, tokens: int) -> bool:
    return dataset.max_length is None or tokens <= dataset.max_length


class _Look:
    """An image's state, and its grid once that is needed. is_good: whether the image could be read."""

    def __init__(self, dataset, image):
        self.dataset, self.image, self.state = dataset, image, state_of_image(image)
        self.is_good, self.known = True, None

    @property
    def grid(self) -> tuple[int, int]:
        if self.known is None:
            self.known, self.is_good = self.dataset.grid(self.image, self.state)
        return self.known


def _count(
    dataset, index: int, text: str, learned, grids, chunks: list[list[int]], tags: list[int]
) -> tuple[tuple[int, int, int, int], bool]:
    """A Size without its digest, and whether it is that of the whole example, which was not cut off.

    chunks, tags: as the processor's `chunks_of` returns them.
    """
    processor = dataset.processor
    processor.check_tags(tags, len(grids))
    of_images = [num_image_tokens(h, w, processor.image_processor.crop_tokens_per_side) for h, w in grids]
    image_tokens = sum(of_images[tag - 1] for tag in tags)
    tokens = sum(map(len, chunks)) + image_tokens
    is_whole = _fits(dataset, tokens)
    if not is_whole:  # which is an error, or the example is cut off
        encoded = dataset.encode_text(index, text, grids, learned)
        ids, labels = encoded["input_ids"], encoded["labels"]
        tokens, image_tokens, targets = len(ids), int((ids < 0).sum()), int((labels != IGNORE_INDEX).sum())
    else:
        targets = _targets(chunks, tags, of_images, processor.tokenizer, learned)
    return (tokens, image_tokens, sum(h * w + 1 for h, w in grids), targets), is_whole


def _targets(chunks: list[list[int]], tags: list[int], of_images: list[int], tokenizer, learned) -> int:
    """The number of supervised tokens: those of every learned answer up to the next turn, as labels have them.

    of_images: the tokens of each image. learned: as `ConversationDataset.chat` returns it.
    """
    roles = dict(zip(tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS)), ROLE_TOKENS, strict=True))
    targets, answering, answers = 0, False, iter(learned or ())
    for tag, chunk in zip([None, *tags], chunks, strict=True):
        if answering and tag and -tag != IGNORE_INDEX:
            targets += of_images[tag - 1]
        for token in chunk:
            if token in roles:
                answering = roles[token] == ASSISTANT and next(answers, True)
            else:
                targets += answering
    return targets
