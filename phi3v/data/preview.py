"""One example as text, as the model is trained on it."""

import re

from ..model.packing import IGNORE_INDEX
from .conversations import ConversationDataset

SHOWN = 300  # characters of a text on either side


def render_example(dataset: ConversationDataset, index: int = 0) -> str:
    """An example as the model is trained on it: its text with images as they are cut, what is learned, and ids."""
    example = dataset[index]
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    tokenizer, grids = dataset.processor.tokenizer, list(example["grids"])
    pieces, start = [], 0
    while start < len(ids):
        end, is_image, is_target = start, ids[start] < 0, labels[start] != IGNORE_INDEX
        while end < len(ids) and (ids[end] < 0, labels[end] != IGNORE_INDEX) == (is_image, is_target):
            end += 1
        if is_image:
            for number, image_ids in _images(ids[start:end]):
                h, w = grids[number - 1]
                pieces.append(f"<image {number}: {h} x {w} crops and the whole, {image_ids} tokens>")
        else:
            text = tokenizer.decode(ids[start:end]).replace("\n", "\\n")
            pieces.append(f"[[{_short(text)}]]" if is_target else _short(text))
        start = end
    targets = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    return (
        f"example {dataset.conversations[index]['id']}, {len(ids):,} tokens; what is learned stands in [[ ]]\n"
        f"  {''.join(pieces)}\n"
        f"  ids of what is learned: {' '.join(map(str, targets[:20]))}{' …' if len(targets) > 20 else ''}"
    )


def _images(ids: list[int]):
    """(number, tokens) of images that follow one another; image k's tokens are all -k."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[start]:
            yield -ids[start], i - start
            start = i


def _short(text: str) -> str:
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text)  # data must not steer a terminal
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"
