"""Turns one prompt or many, with images, into the token ids and crops that the official processor makes."""

import inspect
import itertools
import re
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import to_py_obj

from ..files import read_json, write_json
from .chat import flatten
from .configuration_phi3v import auto_map
from .folder import check_files
from .image_processing_phi3v import Phi3VImageProcessor, as_list
from .tokenizer import (
    END_TOKENS,
    check_special_tokens,
    tokenizer_errors,
    use_known_chat_template,
    write_merges_as_texts,
)

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


def image_tag(number: int) -> str:
    """The tag that stands for an image in a text; images are counted from 1."""
    return f"<|image_{number}|>"


def changed_settings(folder: str | Path, num_crops: int | None, exif_rotate: bool | None) -> list[str]:
    """A warning if a model is asked with other settings of its processor than it was saved with; else an empty list.

    folder: of the model; num_crops, exif_rotate: as `Phi3VProcessor.from_pretrained` takes them."""
    saved = Phi3VImageProcessor.from_pretrained(folder)
    given = {"num_crops": num_crops, "exif_rotate": exif_rotate}
    changed = {name: value for name, value in given.items() if value is not None and value != getattr(saved, name)}
    if not changed:
        return []
    now = " ".join(f"--{name} {value}" for name, value in changed.items())
    then = " ".join(f"--{name} {getattr(saved, name)}" for name in changed)
    return [f"warning: {folder} was saved with {then} and is asked with {now}, which can cost accuracy"]


class Phi3VProcessor(ProcessorMixin):
    """The image processor and the tokenizer. The tag `<|image_k|>` in a prompt stands for its image k, counted from 1.

    Tags may repeat and come in any order. The model fills image tokens in the order of `pixel_values`, so
    `pixel_values` has the images in the order of their tags, and an image that appears twice is there twice.

    Several prompts are padded on the left, which generation needs, although the Hub's tokenizer_config.json says
    "right": without the left side, all prompts but the longest would get other answers. `padding_side`, here or in a
    call, and `tokenizer.padding_side` set afterwards change that.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None, padding_side: str = "left"):
        self._saved_padding_side = tokenizer.init_kwargs.get("padding_side", tokenizer.padding_side)
        tokenizer.padding_side = padding_side
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, num_crops: int | None = None, exif_rotate: bool | None = None, **kwargs
    ):
        """Loads from a folder or the Hub.

        num_crops, exif_rotate: replace what is saved, the maximum of sub-crops per image and whether images are turned
            upright as their EXIF data say.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir():
            check_files(source / (kwargs.get("subfolder") or ""))
        image_processor = Phi3VImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        given = {"num_crops": num_crops, "exif_rotate": exif_rotate}
        if given := {name: value for name, value in given.items() if value is not None}:
            image_processor = Phi3VImageProcessor(**{**image_processor.to_dict(), **given})
        # In transformers 5, the tokenizer class that the Hub's files name drops the space token after special tokens.
        # The plain fast tokenizer follows tokenizer.json, and gives the ids with which the model was trained.
        with tokenizer_errors(pretrained_model_name_or_path):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
            check_special_tokens(tokenizer)
        if "chat_template" not in kwargs:
            use_known_chat_template(tokenizer, pretrained_model_name_or_path)
        return cls(image_processor, tokenizer, padding_side=kwargs.get("padding_side", "left"))

    @property
    def stop_ids(self) -> list[int]:
        """The tokens at which an answer ends."""
        return self.tokenizer.convert_tokens_to_ids(list(END_TOKENS))

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the same files as the Hub's repository, so that other readers of the format find what they need."""
        folder = Path(save_directory)
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)
        write_merges_as_texts(folder / "tokenizer.json")
        common = {"auto_map": auto_map("AutoProcessor"), "processor_class": type(self).__name__}
        write_json(folder / "processor_config.json", common, sort_keys=True)
        tokenizer_config = folder / "tokenizer_config.json"
        saved = read_json(tokenizer_config)
        # The names are those that transformers 4 knows. The removed keys describe this load, not the tokenizer.
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens", [])
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        saved["padding_side"] = self._saved_padding_side  # other readers of the file find what the Hub's has
        saved["chat_template"] = self.chat_template
        for key in ("backend", "is_local", "local_files_only"):
            saved.pop(key, None)
        write_json(tokenizer_config, saved | common, sort_keys=True)
        return [str(path) for path in folder.iterdir()]

    def tokenize(self, text: str, num_img_tokens: list[int]) -> tuple[list[int], list[int]]:
        """The ids of one prompt, and the numbers of the images, from 0, in the order of their tags.

        Each piece of text between tags is tokenized by itself and begins with its own `<s>`, as in the official
        processor and in model servers. The `num_img_tokens[k - 1]` tokens of image k have the id `-k`.
        Raises ValueError if tags and images do not match.
        """
        ((chunks, tags),) = self.chunks_of([text])
        self.check_tags(tags, len(num_img_tokens))
        ids = list(chunks[0])
        for tag, chunk in zip(tags, chunks[1:], strict=True):
            ids += [-tag] * num_img_tokens[tag - 1] + chunk
        return ids, [tag - 1 for tag in tags]

    def chunks_of(self, texts: list[str]) -> list[tuple[list[list[int]], list[int]]]:
        """For each prompt the ids of the pieces of text between its tags, and the numbers in the tags. The tokenizer is
        called once, for each different piece."""
        split = [IMAGE_TAG.split(text) for text in texts]
        pieces = list(dict.fromkeys(piece for own in split for piece in own[0::2]))
        ids = dict(zip(pieces, self.tokenizer(pieces).input_ids, strict=True))
        return [([ids[piece] for piece in own[0::2]], [int(tag) for tag in own[1::2]]) for own in split]

    @staticmethod
    def check_tags(tags: list[int], n_images: int):
        """Raises ValueError unless the numbers in a prompt's tags are those of its images."""
        if set(tags) != set(range(1, n_images + 1)):
            found = ", ".join(map(image_tag, sorted(set(tags)))) or "none"
            wanted = f"{image_tag(1)} to {image_tag(n_images)}" if n_images else "no tags"
            raise ValueError(f"image tags do not match the {n_images} images given: found {found}, expected {wanted}")

    def __call__(
        self,
        text: str | list[str],
        images=None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        padding_side: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        videos=None,
        audio=None,
    ) -> BatchFeature:
        """One prompt or a list, with its images.

        images: PIL or numpy. For one prompt, an image or a list. For a list of prompts, a list that has for each prompt
            a list of images or None, or a flat list that is divided in the order of the prompts.
        padding_side: "left" or "right"; the default is the tokenizer's.
        truncation: cuts off the end of prompts that have more than `max_length` ids.
        videos, audio: None, which transformers passes. The model has no such input.

        Returns `input_ids` and `attention_mask` (n_prompts, length) and, if there are images, `pixel_values` and
        `image_sizes` of all prompts one after another. Raises ValueError if tags and images do not match, or if
        truncation would cut an image.
        """
        if videos is not None or audio is not None:
            raise ValueError("the model takes no video and no audio: give frames of a video as images")
        prompts = [text] if isinstance(text, str) else list(text)
        if truncation and max_length is None:
            raise ValueError("truncation needs max_length")
        sequences, ordered = [], []
        for prompt, own in zip(prompts, self._deal(prompts, images, isinstance(text, str)), strict=True):
            ids, order = self.tokenize(prompt, self.image_processor.calc_num_image_tokens(own))
            if truncation and len(ids) > max_length:
                if any(i < 0 for i in ids[max_length:]):
                    raise ValueError(
                        f"a prompt of {len(ids)} ids can't be cut to max_length {max_length}: that would cut into its "
                        "images; use fewer crops (num_crops) or a larger max_length"
                    )
                ids = ids[:max_length]
            sequences.append(ids)
            ordered += [own[i] for i in order]
        data = self.pad(sequences, padding_side) if padding else {"input_ids": sequences}
        if not padding:
            data["attention_mask"] = [[1] * len(ids) for ids in sequences]
        if ordered:
            pixels = self.image_processor(ordered, return_tensors=return_tensors)
            data["pixel_values"], data["image_sizes"] = pixels["pixel_values"], pixels["image_sizes"]
        return BatchFeature(data, tensor_type=return_tensors)

    def pad(self, sequences: list[list[int]], padding_side: str | None = None) -> dict[str, torch.Tensor]:
        """Lists of ids → `input_ids` and `attention_mask`, int64 (n_sequences, length of the longest).

        padding_side: "left" or "right"; the default is the tokenizer's. Raises ValueError for any other side.
        """
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}, must be 'left' or 'right'")
        length = max(map(len, sequences), default=0)
        ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            span = slice(length - len(sequence), length) if side == "left" else slice(len(sequence))
            ids[row, span] = torch.tensor(sequence)
            mask[row, span] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """The prompt of one conversation or a list; with `tokenize` what `__call__` makes of it, its ids alone without
        `return_dict`.

        conversation: messages, whose contents are texts, or lists of texts and images as in `chat.flatten`.
        processor_kwargs: for `__call__`. Its `images` are all images, if the messages only have places for them.
        kwargs: for `__call__` if it has an argument of that name; else for the tokenizer's `apply_chat_template`.
        """
        is_one = isinstance(conversation[0], dict)
        flat, images = zip(*(flatten(c, image_tag) for c in ([conversation] if is_one else conversation)), strict=True)
        of_call = {name: kwargs.pop(name) for name in inspect.signature(self.__call__).parameters if name in kwargs}
        template = chat_template or self.chat_template
        prompts = self.tokenizer.apply_chat_template(list(flat), chat_template=template, tokenize=False, **kwargs)
        prompts = prompts[0] if is_one else prompts
        if not tokenize:
            return prompts
        of_call = {"images": images[0] if is_one else list(images), **of_call, **(processor_kwargs or {})}
        batch = self(prompts, return_tensors=return_tensors, **of_call)
        return batch if return_dict else batch["input_ids"]

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """The text of ids, or the texts of several lists of ids, which may be whole outputs of `generate`.

        The tokens of an image become its tag, which is left out with `skip_special_tokens`. kwargs: the tokenizer's.
        """
        ids = to_py_obj(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and not isinstance(ids[0], int):
            return [self.decode(own, skip_special_tokens, **kwargs) for own in ids]
        if skip_special_tokens:
            ids = [token for token in ids if token >= 0]
        texts = []
        for image, own in itertools.groupby(ids, key=lambda token: min(token, 0)):
            texts.append(
                image_tag(-image) if image else self.tokenizer.decode(list(own), skip_special_tokens, **kwargs)
            )
        return "".join(texts)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """The texts of several lists of ids, as `decode` makes them."""
        texts = self.decode(sequences, skip_special_tokens, **kwargs) if len(sequences) else []
        return [texts] if isinstance(texts, str) else texts

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
        """As `decode`. transformers' pipeline calls it."""
        return self.decode(generated_outputs, skip_special_tokens, **kwargs)

    @staticmethod
    def _deal(prompts, images, single) -> list[list]:
        """Divides `images`, as `__call__` takes them, into a list for each prompt."""
        if images is None:
            return [[] for _ in prompts]
        images = as_list(images)
        if single:
            return [images[0] if len(images) == 1 and isinstance(images[0], (list, tuple)) else images]
        if any(own is None or isinstance(own, (list, tuple)) for own in images):
            if len(images) != len(prompts):
                raise ValueError(f"{len(images)} lists of images for {len(prompts)} prompts")
            return [[] if own is None else as_list(own) for own in images]
        wanted = [len(set(IMAGE_TAG.findall(prompt))) for prompt in prompts]
        if sum(wanted) != len(images):
            raise ValueError(f"the prompts' image tags ask for {sum(wanted)} images, but {len(images)} were given")
        flat = iter(images)
        return [[next(flat) for _ in range(n)] for n in wanted]
