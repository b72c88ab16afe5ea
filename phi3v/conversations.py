"""Conversations with images → token ids, labels and crops; the jsonl reader; collation.

A conversation is a list of turns `{"images": [...], "user": text, "assistant": text}`. The images of a turn stand
before its text, and their numbers run on over the turns.
"""

import io
import json
import re
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from .errors import InputError
from .modeling_phi3v import IGNORE_INDEX
from .processing_phi3v import IMAGE_TAG, Phi3VProcessor

ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
END_TOKENS = ("<|end|>", "<|endoftext|>")
OTHER_TOKENS = ("<s>", "</s>", "<unk>", "<|image|>")
# What PIL raises for a file that is no image, or a damaged one.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_RESERVED = re.compile(
    "|".join(map(re.escape, ROLE_TOKENS + END_TOKENS + OTHER_TOKENS)) + r"|<\|placeholder\d+\|>|" + IMAGE_TAG.pattern
)


def read_conversations(path: Path, images_dir: Path) -> list[dict]:
    """Reads `{"id", "source", "conversations": [turn, …]}`, one object a line, as `convert_ucf101.py` writes it.

    Image names, given relative to `images_dir`, become paths. Raises InputError naming file, line and field where
    the content is not of that form, an image is missing or lies elsewhere, or a text holds a token of the chat format.
    """
    examples = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    examples.append(_read_line(line, f"{path}:{number}", images_dir))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: convert the videos first, or check the folder") from None
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8") from None
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


def _read_line(line: str, where: str, images_dir: Path) -> dict:
    try:
        example = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not a JSON object ({e.msg} at column {e.colno})") from None
    if not isinstance(example, dict):
        raise InputError(f"{where}: a line must hold a JSON object, not {type(example).__name__}")
    turns = example.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: conversations must be a list of turns with at least one")
    for i, turn in enumerate(turns):
        field = f"{where}: conversations[{i}]"
        if not isinstance(turn, dict):
            raise InputError(f"{field} must be an object with images, user and assistant")
        for role in ("user", "assistant"):
            check_text(turn.get(role), f"{field}.{role}")
        names = turn.get("images", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{field}.images is {names!r}, must be a list of file names (empty for none)")
        turn["images"] = [_image_path(name, f"{field}.images[{k}]", images_dir) for k, name in enumerate(names)]
    return {"id": example.get("id", where), "conversations": turns}


def check_text(text, where: str) -> str:
    """Returns a text that can stand in a conversation; raises InputError for anything else."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} is {text!r}, must be a text that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where} is {text!r}, which is no valid Unicode: half of a surrogate pair stands alone")
    if found := _RESERVED.search(text):
        raise InputError(
            f"{where} holds {found[0]!r}, which the chat format reserves: take it out (images are listed in images, "
            "and their tags are put before the text)"
        )
    return text


def _image_path(name: str, field: str, images_dir: Path) -> Path:
    path = images_dir / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{field} is {name!r}, must be a path inside {images_dir}")
    if not path.is_file():
        raise InputError(f"{field} is {name!r}, but {path} does not exist")
    return path


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
        with _opened(image) as opened:
            try:
                h, w = image_processor.crop_grid(*opened.size)
            except ValueError as e:
                raise InputError(f"{_name(image)}: {e}") from None
            crops.append(image_processor.crops(opened))
        image_sizes.append((h * size, w * size))
        num_img_tokens.append((h * w + 1) * g * g + 1 + (h + 1) * g)
    ids, _ = processor.tokenize(text, num_img_tokens)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(_labels(ids, tokenizer)),
        "pixel_values": torch.cat(crops) if crops else torch.zeros(0, 3, size, size),
        "image_sizes": torch.tensor(image_sizes, dtype=torch.long).view(-1, 2),
    }


def _opened(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.copy()
    name = _name(image)
    if isinstance(image, dict):  # {"bytes", "path"}, as `datasets` has them, with either
        image = io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]
    try:
        opened = Image.open(image)
        opened.load()
    except IMAGE_ERRORS as e:
        raise InputError(f"{name} can't be read as an image ({e}): replace it or take its example out") from None
    return opened


def _name(image) -> str:
    """How messages call an image."""
    if isinstance(image, dict):
        return image["path"] or "an image of the table"
    return "an image" if isinstance(image, Image.Image) else str(image)


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
