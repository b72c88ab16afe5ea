"""Keeps the images of an evaluation out of the training: a split by image, and a warning about images in both."""

import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from ..console import tell
from ..errors import InputError
from ..ranks import is_first
from .annotations import StoredConversations


def groups_of_shared_images(images: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """The examples as groups, each of which shares no image with another, in the order of their first examples.

    images: the images of each example. Examples that share an image are in one group, and so are examples that are
    connected through others. An example without images is a group of its own.
    """
    parent = list(range(len(images)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner = {}
    for i, own in enumerate(images):
        for image in own:
            a, b = sorted((root(owner.setdefault(image, i)), root(i)))
            parent[b] = a
    groups = {}
    for i in range(len(images)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split_by_image(images: Sequence[Sequence[Hashable]], share: float) -> set[int]:
    """The examples to keep for evaluation: about `share` of them, none of which shares an image with any other example.

    If no two examples share an image, these are every n-th example, with n = 1 / share. Otherwise a group of examples
    is kept as soon as it fits into the share of the examples up to it; the smallest group is kept if none fits.
    Raises InputError if there are too few examples, or if all of them are connected through shared images.
    """
    every = max(2, round(1 / share))
    groups = groups_of_shared_images(images)
    if len(images) < every:
        raise InputError(f"there are {len(images)} examples, too few to keep some for evaluation: see --val_share")
    if len(groups) == 1:
        image, n = Counter(image for own in images for image in set(own)).most_common(1)[0]
        raise InputError(
            f"all {len(images):,} examples are connected through images that they share ({n:,} have {image}), so that "
            "none can be kept for evaluation: convert training and evaluation examples apart, with other images"
        )
    kept, seen = set(), 0
    for group in groups:
        seen += len(group)
        if len(kept) + len(group) <= seen // every:
            kept.update(group)
    return kept or set(min(reversed(groups), key=len))


def warn_of_shared_images(train: Sequence[dict], evaluation: Sequence[dict]):
    """Rank 0 prints a warning if images of the evaluation are also trained on, so that the metric is too good.

    train, evaluation: examples as `read_conversations` returns them.
    """

    stored = isinstance(train, StoredConversations) and isinstance(evaluation, StoredConversations)
    if not is_first() or stored and not train.may_share_images(evaluation):
        return

    def paths(examples) -> Iterator[str]:
        for example in examples:
            for turn in example["conversations"]:
                yield from map(os.path.normpath, turn["images"])

    asked = dict.fromkeys(paths(evaluation))
    trained = {path for path in paths(train) if path in asked}
    shared = [path for path in asked if path in trained]
    if not shared:
        return
    names = ", ".join(map(ascii, shared[:3])) + (", …" if len(shared) > 3 else "")
    tell(
        f"warning: {len(shared):,} of the {len(asked):,} images of the evaluation are also trained on, so the metric "
        f"says little about new images: {names}; split the examples by image"
    )
