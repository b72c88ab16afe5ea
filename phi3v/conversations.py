"""Conversations with images → token ids, labels and crops; collation.

A conversation is a list of turns `{"images": [...], "user": text, "assistant": text}`. The images of a turn stand
before its text, and their numbers run on over the turns.
"""

import torch
from torch.utils.data import Dataset

from .annotations import END_TOKENS, ROLE_TOKENS, check_text, read_conversations  # noqa: F401 (for importers of this)
from .errors import InputError
from .images import image_name, read_image
from .modeling_phi3v import IGNORE_INDEX
from .processing_phi3v import Phi3VProcessor


def encode_conversation(processor: Phi3VProcessor, turns: list[dict], for_generation: bool = False) -> dict:
    """Token ids, labels and crops of one conversation, in the official chat template.

    Every turn ends `<|end|>\\n` and the last also `<|endoftext|>`. The loss covers each answer and its end tokens.
    `for_generation` leaves out the last answer, so that the ids are exactly those that stand before it in training.
    Images in `turns` are PIL images, paths, or undecoded images of `datasets`.

    Returns `input_ids` and `labels` int64 (length,), `pixel_values` float32 (n_crops, 3, S, S) and `image_sizes`
    int64 (n_images, 2) in pixels; without images the last two have length 0.
    Raises InputError for an image that cannot be read.
    """
    messages, images = [], []
    for turn in turns:
        first = len(images) + 1
        images += turn["images"]
        tags = "".join(f"<|image_{k}|>" for k in range(first, len(images) + 1))
        messages.append({"role": "user", "content": f"{tags}\n{turn['user']}" if tags else turn["user"]})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    if for_generation:
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False) + tokenizer.eos_token

    size, g = image_processor.image_size, image_processor.crop_tokens_per_side
    crops, image_sizes, num_img_tokens = [], [], []
    for image in images:
        rgb = read_image(image)
        try:
            h, w = image_processor.crop_grid(*rgb.size)
        except ValueError as e:
            raise InputError(f"{image_name(image)}: {e}") from None
        crops.append(image_processor.crops(rgb))
        image_sizes.append((h * size, w * size))
        num_img_tokens.append((h * w + 1) * g * g + 1 + (h + 1) * g)
    ids, _ = processor.tokenize(text, num_img_tokens)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(_labels(ids, tokenizer)),
        "pixel_values": torch.cat(crops) if crops else torch.zeros(0, 3, size, size),
        "image_sizes": torch.tensor(image_sizes, dtype=torch.long).view(-1, 2),
    }


def _labels(ids: list[int], tokenizer) -> list[int]:
    """The ids of every answer up to the next turn, and IGNORE_INDEX elsewhere."""
    roles = dict(zip(tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS)), ROLE_TOKENS, strict=True))
    labels, answering = [], False
    for token in ids:
        if token in roles:
            answering = roles[token] == "<|assistant|>"
            labels.append(IGNORE_INDEX)
        else:
            labels.append(token if answering else IGNORE_INDEX)
    return labels


class ConversationDataset(Dataset):
    """Encodes a conversation when it is asked for, so that images are opened one micro-batch at a time.

    conversations: examples as `read_conversations` returns them; for_generation as in `encode_conversation`.
    """

    def __init__(self, conversations: list[dict], processor: Phi3VProcessor, for_generation: bool = False):
        self.conversations = conversations
        self.processor = processor
        self.for_generation = for_generation

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i):
        return encode_conversation(self.processor, self.conversations[i]["conversations"], self.for_generation)


class Collator:
    """Encoded conversations → a padded micro-batch; crops of all examples in one tensor.

    padding_side: "right" to train, "left" to generate.
    """

    def __init__(self, processor: Phi3VProcessor, padding_side: str):
        self.processor = processor
        self.padding_side = padding_side

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.processor.pad([example["input_ids"].tolist() for example in examples], self.padding_side)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels[batch["attention_mask"].bool()] = torch.cat([example["labels"] for example in examples])
        batch["labels"] = labels
        for key in ("pixel_values", "image_sizes"):
            batch[key] = torch.cat([example[key] for example in examples])
        return batch
