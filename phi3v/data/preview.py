"""Shows one example as text, so that a user sees what the model is trained on."""

from ..model.packing import IGNORE_INDEX
from .conversations import ConversationDataset

SHOWN = 300  # characters at the beginning and at the end of a long text


def render_example(dataset: ConversationDataset, index: int = 0) -> list[str]:
    """Three lines: the id, an example's text with its images and their crops and its supervised tokens in [[ ]], and
    the ids of these tokens."""
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
                pieces.append(f"<image {number}: {h} x {w} sub-crops and a global crop, {image_ids} tokens>")
        else:
            text = tokenizer.decode(ids[start:end])
            pieces.append(f"[[{_short(text)}]]" if is_target else _short(text))
        start = end
    targets = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
    return [
        f"example {dataset.conversations[index]['id']}, {len(ids):,} tokens; supervised tokens are in [[ ]]",
        f"  {''.join(pieces)}",
        f"  supervised ids: {' '.join(map(str, targets[:20]))}{' …' if len(targets) > 20 else ''}",
    ]


def _images(ids: list[int]):
    """(number of the image, its number of tokens) for images that follow one another. All tokens of image k are -k."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[start]:
            yield -ids[start], i - start
            start = i


def _short(text: str) -> str:
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"
