"""Conversations with images → token ids, labels and crops.

A conversation is a list of turns `{"images": [...], "user": text, "assistant": text}`. The images of a turn stand
before its text, and their numbers run on over the turns.
"""

from collections.abc import Sequence
from functools import partial

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from ..model.image_processing_phi3v import num_image_tokens
from ..model.packing import IGNORE_INDEX
from ..model.processing_phi3v import ASSISTANT, ROLE_TOKENS, Phi3VProcessor, image_tag
from .images import image_name, image_size, read_image
from .sizes import Size, digest


def encode_conversation(processor: Phi3VProcessor, turns: list[dict], for_generation: bool = False) -> dict:
    """Token ids, labels and crops of one conversation, in the official chat template.

    Every turn ends `<|end|>\\n` and the last also `<|endoftext|>`. The loss covers each answer and its end tokens.
    `for_generation` leaves out the last answer, so that the ids are exactly those that stand before it in training.
    Images in `turns` are PIL images, paths, or undecoded images of `datasets`.

    Returns `input_ids` and `labels` int64 (length,), `tiles` (n_tiles, S, S, 3) uint8 sub-crops and `grids`, the
    (down, across) sub-crops of each image. Raises InputError for an image that cannot be read.
    """
    text, images = chat_text(processor, turns, for_generation)
    tiles, grids = encode_images(processor, images)
    return {**_encode_text(processor, text, grids), "tiles": tiles, "grids": grids}


def chat_text(processor: Phi3VProcessor, turns: list[dict], for_generation: bool = False) -> tuple[str, list]:
    """The text of a conversation, with tags for its images, and these."""
    messages, images = [], []
    for turn in turns:
        first = len(images) + 1
        images += turn["images"]
        tags = "".join(map(image_tag, range(first, len(images) + 1)))
        messages.append({"role": "user", "content": f"{tags}\n{turn['user']}" if tags else turn["user"]})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    tokenizer = processor.tokenizer
    if for_generation:
        return tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True), images
    return tokenizer.apply_chat_template(messages, tokenize=False) + tokenizer.eos_token, images


def _encode_text(processor: Phi3VProcessor, text: str, grids: list[tuple[int, int]]) -> dict:
    g = processor.image_processor.crop_tokens_per_side
    ids, _ = processor.tokenize(text, [num_image_tokens(h, w, g) for h, w in grids])
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(_answer_labels(ids, processor.tokenizer))}


def encode_images(processor: Phi3VProcessor, images: list) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(n_tiles, S, S, 3) uint8 sub-crops of all images, and each image's (down, across). Raises InputError."""
    image_processor = processor.image_processor
    size = image_processor.image_size
    tiles, grids = [torch.zeros(0, size, size, 3, dtype=torch.uint8)], []
    for image in images:
        rgb = read_image(image)
        grids.append(_grid(image_processor, image, rgb.size))
        tiles.append(image_processor.tiles(rgb))
    return torch.cat(tiles), grids


def _grid(image_processor, image, size: tuple[int, int]) -> tuple[int, int]:
    try:
        return image_processor.crop_grid(*size)
    except ValueError as e:
        raise InputError(f"{image_name(image)}: {e}") from None


def _answer_labels(ids: list[int], tokenizer) -> list[int]:
    """The ids of every answer up to the next turn, and IGNORE_INDEX elsewhere."""
    roles = dict(zip(tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS)), ROLE_TOKENS, strict=True))
    labels, answering = [], False
    for token in ids:
        if token in roles:
            answering = roles[token] == ASSISTANT
            labels.append(IGNORE_INDEX)
        else:
            labels.append(token if answering else IGNORE_INDEX)
    return labels


class ConversationDataset(Dataset):
    """Encodes a conversation when it is asked for, so that images are opened one micro-batch at a time.

    conversations: examples as `read_conversations` returns them; for_generation as in `encode_conversation`.
    max_length: more tokens than that are refused, or with `truncate` cut off at the end, if some of the answer is left
        and every image whole.
    skip_bad: an example whose images can't be read stays, with blank ones, but trains nothing; its item has the error
        under "problem".
    Index ~i stands for example i without targets, which trains nothing. Asked for several examples at once, as a
    DataLoader does, it reads images that stand next to one another and are the same only once.
    """

    def __init__(
        self,
        conversations: Sequence[dict],
        processor: Phi3VProcessor,
        for_generation: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        skip_bad: bool = False,
    ):
        self.conversations = conversations
        self.processor = processor
        self.for_generation = for_generation
        self.max_length = max_length
        self.truncate = truncate
        self.skip_bad = skip_bad
        self.sizes: list[Size] | None = None  # as `all_sizes` finds them
        self.feature_cache = None  # a FeatureCache, from which features come in place of tiles

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples, last, encoded, problem = [], None, None, None
        form = "features" if self.feature_cache else "tiles"
        for i in indices:
            index = i if i >= 0 else ~i
            text, images = self._chat(index)
            key = self.images_key(index)
            if key is None or key != last:
                problem = None
                try:
                    read = self.feature_cache.read if self.feature_cache else partial(encode_images, self.processor)
                    encoded, last = read(images), key
                except InputError as e:
                    if not self.skip_bad:
                        raise
                    problem = str(e)
                    blanks = [Image.new("RGB", self._size_or_square(image)) for image in images]
                    tiles, grids = encode_images(self.processor, blanks)
                    encoded, last = (self.feature_cache.blank(grids) if self.feature_cache else tiles, grids), key
            example = self._encode_text(index, text, encoded[1])
            if i < 0 or problem:
                example["labels"] = torch.full_like(example["labels"], IGNORE_INDEX)
            examples.append({**example, form: encoded[0], "grids": encoded[1], "images_key": key})
            if problem and i >= 0:
                examples[-1]["problem"] = problem
        return examples

    def _chat(self, index: int) -> tuple[str, list]:
        return chat_text(self.processor, self.conversations[index]["conversations"], self.for_generation)

    def _size_or_square(self, image) -> tuple[int, int]:
        """(width, height) of an image, of a single crop where not even that can be read."""
        try:
            self.processor.image_processor.crop_grid(*image_size(image))
            return image_size(image)
        except ValueError:  # InputError is one
            return (self.processor.image_processor.image_size,) * 2

    def _encode_text(self, index: int, text: str, grids) -> dict:
        example = _encode_text(self.processor, text, grids)
        ids, labels, limit = example["input_ids"], example["labels"], self.max_length
        if limit is None or len(ids) <= limit:
            return example
        name = f"example {self.conversations[index]['id']} has {len(ids):,} tokens, more than --max_length {limit:,}"
        if not self.truncate:
            raise InputError(f"{name}: shorten it, lower --num_crops, or cut off its end with --truncate")
        if (ids[limit:] < 0).any():
            raise InputError(f"{name}, and an image would be cut: take images out, or lower --num_crops")
        if not self.for_generation and not (labels[:limit] != IGNORE_INDEX).any():
            raise InputError(f"{name}, and nothing would be left of its answer: shorten its question")
        return {key: value[:limit] for key, value in example.items()}

    def images_key(self, index: int):
        """Equal for examples of the same images; None for one without images, or whose later turns have some."""
        if hasattr(self.conversations, "keys"):  # a table's row, whatever is asked about it
            return self.conversations.keys[index][0]
        turns = self.conversations[index]["conversations"]
        if not turns[0]["images"] or any(turn["images"] for turn in turns[1:]):
            return None
        return tuple(map(str, turns[0]["images"]))

    def keep_largest(self, n: int):
        """Leaves the `n` examples with most tokens; after `all_sizes`."""
        order = sorted(range(len(self)), key=lambda i: (-self.sizes[i].tokens, i))[:n]
        self.sizes = [self.sizes[i] for i in order]
        if hasattr(self.conversations, "select"):
            self.conversations = self.conversations.select(order)
        else:
            self.conversations = [self.conversations[i] for i in order]

    def size(self, index: int) -> Size:
        """What the example takes, from its text and the headers of its images. Raises InputError."""
        text, images = self._chat(index)
        sizes = [self._size_or_square(image) if self.skip_bad else image_size(image) for image in images]
        grids = [_grid(self.processor.image_processor, image, size) for image, size in zip(images, sizes, strict=True)]
        encoded = self._encode_text(index, text, grids)
        ids, targets = encoded["input_ids"], encoded["labels"] != IGNORE_INDEX
        crops = sum(h * w + 1 for h, w in grids)
        return Size(len(ids), int((ids < 0).sum()), crops, int(targets.sum()), digest(text, images))
