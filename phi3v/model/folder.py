"""The small files of a model's folder, looked at before a library reads them: all of them may be a stranger's."""

import json
from pathlib import Path

from ..errors import InputError
from ..files import LARGEST_JSON, open_regular, read_json
from ..hub import INDEX
from .configuration_phi3v import Phi3VConfig
from .limits import IMAGES, TOKENIZER, check, is_whole

JSON_FILES = ("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json")
JSON_FILES += ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
JSON_FILES += ("added_tokens.json", "chat_template.json", INDEX)
OTHER_FILES = ("chat_template.jinja", "tokenizer.model", "additional_chat_templates/*", "*.safetensors")
RULES = {"tokenizer_config.json": TOKENIZER, "preprocessor_config.json": IMAGES}
# The parts of a tokenizer that take time in proportion to the text, which a regular expression does not.
PARTS = {"Sequence", "Prepend", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip", "TemplateProcessing"}
PARTS |= {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "BPEDecoder", "WhitespaceSplit", "Digits"}


def check_files(folder: Path):
    """Raises InputError for a file in a model's folder that is no regular file, as a pipe, that is not JSON where it
    should be, or that would make the tokenizer read other files or take very long."""
    try:
        _check_files(folder)
    except OSError as e:  # a socket, or a file that may not be read
        raise InputError(f"{folder} can't be read ({e})") from None


def _check_files(folder: Path):
    for name in JSON_FILES:
        path = folder / name
        if path.exists():
            content = read_json(path)
            if not isinstance(content, dict):
                raise InputError(f"{path} is not a JSON object: it holds {type(content).__name__}")
            try:
                json.dumps(content, ensure_ascii=False).encode()  # as it is written when the model is saved
            except UnicodeEncodeError:
                raise InputError(f"{path} holds a text that is not valid Unicode") from None
            if name == "tokenizer.json":
                check_tokenizer(content, path)
            try:
                check(content, RULES.get(name, {}))
            except ValueError as e:
                raise InputError(f"{path}: {e}") from None
        elif path.is_symlink():
            raise InputError(f"{path} is a link to nothing")
    for pattern in OTHER_FILES:
        for path in folder.glob(pattern):
            if path.suffix == ".safetensors":
                open_regular(path).close()
                continue
            with open_regular(path) as file:
                if len(file.read(LARGEST_JSON + 1)) > LARGEST_JSON:
                    raise InputError(f"{path} has more than {LARGEST_JSON >> 20} MiB")


def check_tokenizer(content: dict, path: Path):
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") not in ("BPE", None):
        raise InputError(f"{path}: its model must be an object of type BPE, which is that of Phi-3")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for part in _objects_in(content.get(name)):
            kind = part.get("type")  # in a post_processor, also the name of a token
            if name != "post_processor" and kind is not None and not (isinstance(kind, str) and kind in PARTS):
                raise InputError(f"{path}: its {name} has a part of type {kind!r:.80}, which is not read")
            if "Regex" in part:
                raise InputError(f"{path}: its {name} has a regular expression, which can take very long")


def _objects_in(content):
    """All objects in a JSON value."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value


def check_processor_fits(folder: Path, config: Phi3VConfig):
    """Raises InputError if the folder's tokenizer has ids for which the model has no embedding, or if its image
    processor makes crops that the tower does not take."""
    path = folder / "tokenizer.json"
    if path.exists():
        content = read_json(path)
        vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        ids += (
            [token.get("id") if isinstance(token, dict) else None for token in added]
            if isinstance(added, list)
            else [None]
        )
        if bad := [i for i in ids if not (is_whole(i) and 0 <= i < config.vocab_size)]:
            raise InputError(
                f"{path} has a token with the id {bad[0]!r:.80}, must be a number below the model's vocab_size "
                f"{config.vocab_size}"
            )
    path, vision = folder / "preprocessor_config.json", config.vision_config
    if path.exists():
        content = read_json(path)
        for name, default in (("image_size", 336), ("patch_size", 14)):
            if (found := content.get(name, default)) != getattr(vision, name):
                raise InputError(f"{path}: {name} is {found!r:.80}, but the model's is {getattr(vision, name)}")
