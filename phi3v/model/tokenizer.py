"""The tokens of the chat format, and what a folder's tokenizer must have to be used and to be read by others."""

import contextlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ..console import say
from ..errors import InputError
from ..files import read_json, write_text
from .chat import CHAT_TEMPLATE, END_OF_CONVERSATION, END_TOKENS, ROLE_TOKENS, SAME_CHAT_TEMPLATE


@contextlib.contextmanager
def tokenizer_errors(source):
    """Turns what the library raises for a tokenizer that it can't read into an InputError."""
    try:
        yield
    except (InputError, OSError):
        raise
    except BaseException as e:
        # The library raises plain Exception, and where its Rust code gives up PanicException, which is no Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise InputError(f"{source}: its tokenizer can't be read ({' '.join(str(e).split()):.200})") from None


def check_special_tokens(tokenizer: PreTrainedTokenizerFast):
    """Raises ValueError unless every token of the chat format is a token of its own. Without one for padding,
    `<|endoftext|>` is it, as in the Hub's files."""
    wanted = [*ROLE_TOKENS, *END_TOKENS]
    ids = tokenizer.convert_tokens_to_ids(wanted)
    probe = "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|system|>\n<|endoftext|>"
    found = tokenizer(probe).input_ids
    for token, own in zip(wanted, ids, strict=True):
        times = probe.count(token)
        if own is None or own == tokenizer.unk_token_id or ids.count(own) > 1 or found.count(own) != times:
            raise ValueError(f"{token} is not one token of its own: is it the tokenizer of Phi-3.5-vision?")
    if len(found) > 100:
        raise ValueError(f"it makes {len(found):,} tokens of {probe!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END_OF_CONVERSATION


def use_known_chat_template(tokenizer: PreTrainedTokenizerFast, source):
    """Replaces a template that is not known to render the format in which the scripts train, and says so on rank 0."""
    template = tokenizer.chat_template
    if isinstance(template, str) and template.strip() in (CHAT_TEMPLATE, SAME_CHAT_TEMPLATE):
        return
    tokenizer.chat_template = CHAT_TEMPLATE
    if template is not None:
        say(
            f"{source}: its chat template is not that of Phi-3.5-vision, and not used: texts have the form "
            "<|user|> … <|end|> <|assistant|> … <|end|>",
            to_stderr=True,
        )


def write_merges_as_texts(path: Path):
    """Writes the merges of a tokenizer.json as "a b", like the Hub's file, and not as ["a", "b"], which tokenizers
    before 0.20 can't read. Merges of tokens with spaces in them can't be written so, and stay as they are."""
    content = read_json(path)
    merges = content["model"].get("merges", [])
    if not merges or isinstance(merges[0], str) or any(" " in token for pair in merges for token in pair):
        return
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))
