"""Turns conversations with images into token ids, labels and the images' sub-crops.

A conversation is a list of turns `{"images": [...], "user": text, "assistant": text}`. The images of a turn stand
before its text, or with `"places": True` where the text has `<image>`; images are numbered from 1 over all turns. A
turn may have `"system"`, a text that comes before it with the role of the system, and `"train": False` if its answer
has no targets.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from ..model.chat import ASSISTANT, END_OF_CONVERSATION, ROLE_TOKENS, render
from ..model.image_processing_phi3v import num_image_tokens
from ..model.packing import IGNORE_INDEX
from ..model.processing_phi3v import Phi3VProcessor, image_tag
from .images import State, image_name, image_size, read_image
from .measuring import Size, measure
from .places import text_with_tags


def encode_conversation(
    processor: Phi3VProcessor, turns: list[dict], for_generation: bool = False, loss_on: str = "all"
) -> dict:
    """Token ids, labels and sub-crops of one conversation, in the official chat template.

    Every turn ends with `<|end|>\\n`, and the last one also with `<|endoftext|>`. The loss covers each answer and its
    end tokens, as `learned_answers` says. `for_generation` leaves out the last answer: the ids are exactly those that
    precede it in training. Images in `turns` are given in any form that `open_image` takes.

    Returns `input_ids` and `labels` int64 (length,), the sub-crops `tiles` uint8 (n_tiles, S, S, 3), and `grids`, for
    each image the number of its sub-crops (down, across). Raises InputError for an image that can't be read.
    """
    text, images = chat_text(processor, turns, for_generation)
    tiles, grids = encode_images(processor, images)
    return {**_encode_text(processor, text, grids, learned_answers(turns, loss_on)), "tiles": tiles, "grids": grids}


def learned_answers(turns: list[dict], loss_on: str = "all") -> tuple[bool, ...] | None:
    """Which answers of a conversation have targets; None if all have. loss_on: as --loss_on says, all or last."""
    found = tuple(
        turn.get("train", True) and (loss_on == "all" or i == len(turns)) for i, turn in enumerate(turns, start=1)
    )
    return None if all(found) else found


def chat_text(processor: Phi3VProcessor, turns: list[dict], for_generation: bool = False) -> tuple[str, list]:
    """The text of a conversation in the chat template, with tags for its images, and the list of these images."""
    messages, images = [], []
    for turn in turns:
        first = len(images) + 1
        images += turn["images"]
        if system := turn.get("system"):
            messages.append({"role": "system", "content": system})
        tags = map(image_tag, range(first, len(images) + 1))
        messages.append({"role": "user", "content": text_with_tags(turn, tags)})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    if for_generation:
        return render(messages[:-1], add_generation_prompt=True), images
    return render(messages) + END_OF_CONVERSATION, images


def _encode_text(processor: Phi3VProcessor, text: str, grids: list[tuple[int, int]], learned) -> dict:
    g = processor.image_processor.crop_tokens_per_side
    ids, _ = processor.tokenize(text, [num_image_tokens(h, w, g) for h, w in grids])
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(_answer_labels(ids, processor.tokenizer, learned))}


def encode_images(processor: Phi3VProcessor, images: list) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The sub-crops of all images, uint8 (n_tiles, S, S, 3), and for each image their number (down, across).

    Raises InputError for an image that can't be read.
    """
    image_processor = processor.image_processor
    size = image_processor.image_size
    tiles, grids = [torch.zeros(0, size, size, 3, dtype=torch.uint8)], []
    for image in images:
        rgb = read_image(image, exif_rotate=image_processor.exif_rotate)
        grids.append(_grid(image_processor, image, rgb.size))
        tiles.append(image_processor.tiles(rgb))
    return torch.cat(tiles), grids


def _grid(image_processor, image, size: tuple[int, int]) -> tuple[int, int]:
    """`crop_grid` of an image of this size, with errors that name the image."""
    try:
        return image_processor.crop_grid(*size)
    except ValueError as e:
        raise InputError(f"{image_name(image)}: {e}") from None


def _answer_labels(ids: list[int], tokenizer, learned: Sequence[bool] | None) -> list[int]:
    """The ids of every answer that is learned up to the next turn, and IGNORE_INDEX for all other tokens."""
    roles = dict(zip(tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS)), ROLE_TOKENS, strict=True))
    labels, answering, answers = [], False, iter(learned or ())
    for token in ids:
        if token in roles:
            answering = roles[token] == ASSISTANT and next(answers, True)
            labels.append(IGNORE_INDEX)
        else:
            labels.append(token if answering else IGNORE_INDEX)
    return labels


class ConversationDataset(Dataset):
    """Encodes each conversation at access, so that only the images of one micro-batch are in memory.

    An item is what `encode_conversation` returns, with `features` in place of `tiles` if there is a `feature_cache`,
    and with `images_key`. Index ~i stands for example i without targets, which trains nothing. When a DataLoader asks
    for several examples at once, images that neighbours share are read once.

    conversations: examples as `read_conversations` returns them.
    for_generation: as in `encode_conversation`.
    max_length: an example with more tokens raises InputError. With `truncate` its end is cut off instead; InputError is
        raised only if that would cut an image or leave nothing of the answer.
    skip_bad: an example whose images can't be read gets blank images and no targets, and its item has the error as
        `problem`. Otherwise InputError is raised.
    loss_on: as in `learned_answers`.
    """

    def __init__(
        self,
        conversations: Sequence[dict],
        processor: Phi3VProcessor,
        for_generation: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        skip_bad: bool = False,
        loss_on: str = "all",
    ):
        self.conversations = conversations
        self.processor = processor
        self.for_generation = for_generation
        self.max_length = max_length
        self.truncate = truncate
        self.skip_bad = skip_bad
        self.loss_on = loss_on
        self.sizes: list[Size] | None = None  # set by `all_sizes`
        self.feature_cache = None  # set by `cache_features`

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        form = "features" if self.feature_cache else "tiles"
        examples, last_key, encoded, grids, problem = [], None, None, None, None
        for i in indices:
            index = i if i >= 0 else ~i
            text, images, learned = self.chat(index)
            key = self.images_key(index)
            if key is None or key != last_key:
                encoded, grids, problem = self._read_images(images)
                last_key = key
            example = self.encode_text(index, text, grids, learned)
            if i < 0 or problem:
                example["labels"] = torch.full_like(example["labels"], IGNORE_INDEX)
            examples.append({**example, form: encoded, "grids": grids, "images_key": key})
            if problem and i >= 0:
                examples[-1]["problem"] = f"example {self.conversations[index]['id']}: {problem}"
        return examples

    def _read_images(self, images: list) -> tuple[torch.Tensor, list[tuple[int, int]], str | None]:
        """(tiles or features, grids, problem). With `skip_bad`, blank images replace images that can't be read."""
        cache = self.feature_cache
        try:
            if cache is None:
                return *encode_images(self.processor, images), None
            grids = self.grids(images)
            return cache.read(images, grids), grids, None
        except InputError as e:
            if not self.skip_bad:
                raise
            blanks = [Image.new("RGB", self._size_or_square(image)[0]) for image in images]
            tiles, grids = encode_images(self.processor, blanks)
            return cache.blank(grids) if cache else tiles, grids, str(e)

    def chat(self, index: int) -> tuple[str, list, tuple[bool, ...] | None]:
        """The text of an example and its images, as `chat_text` makes them, and its `learned_answers`."""
        turns = self.conversations[index]["conversations"]
        return *chat_text(self.processor, turns, self.for_generation), learned_answers(turns, self.loss_on)

    def _size_or_square(self, image, state: State = None) -> tuple[tuple[int, int], bool]:
        """(width, height) of an image in pixels; those of a single crop, and False, if they can't be read or used."""
        try:
            size = self._image_size(image, state)
            self.processor.image_processor.crop_grid(*size)
            return size, True
        except ValueError:  # InputError is one
            return (self.processor.image_processor.image_size,) * 2, False

    def grids(self, images: list) -> list[tuple[int, int]]:
        """The sub-crops (down, across) of each image, from its header alone. Raises InputError as items do."""
        return [_grid(self.processor.image_processor, image, self._image_size(image)) for image in images]

    def grid(self, image, state: State) -> tuple[tuple[int, int], bool]:
        """The same for one image, and whether it could be read. state: what `state_of_image` says of it."""
        size, is_good = self._size_or_square(image, state) if self.skip_bad else (self._image_size(image, state), True)
        return _grid(self.processor.image_processor, image, size), is_good

    def _image_size(self, image, state: State = None) -> tuple[int, int]:
        return image_size(image, self.processor.image_processor.exif_rotate, state)

    def encode_text(self, index: int, text: str, grids, learned: tuple[bool, ...] | None = None) -> dict:
        """Ids and labels of an example, cut off as `truncate` says. text, learned: as `chat` returns them."""
        example = _encode_text(self.processor, text, grids, learned)
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

    def bytes_of_crops(self, crops: float) -> float:
        """What so many crops take in items that hold tiles: a byte for each value of a pixel."""
        return crops * 3 * self.processor.image_processor.image_size**2

    def images_key(self, index: int):
        """A key that is equal for examples with the same images; None for an example that can't share its images,
        because it has none or its later turns have some."""
        if hasattr(self.conversations, "keys"):  # all conversations about one row of a table have the same images
            return self.conversations.keys[index][0]
        turns = self.conversations[index]["conversations"]
        if not turns[0]["images"] or any(turn["images"] for turn in turns[1:]):
            return None
        return tuple(map(str, turns[0]["images"]))

    def keep_largest(self, n: int):
        """Drops all examples but the `n` that have most tokens. `all_sizes` must have been called."""
        order = sorted(range(len(self)), key=lambda i: (-self.sizes[i].tokens, i))[:n]
        self.sizes = [self.sizes[i] for i in order]
        if hasattr(self.conversations, "select"):
            self.conversations = self.conversations.select(order)
        else:
            self.conversations = [self.conversations[i] for i in order]

    def size(self, index: int) -> Size:
        """The example's Size, from its text and the headers of its images. Raises InputError as items do."""
        ((size, _),) = measure(self, [index])
        return size
