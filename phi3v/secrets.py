"""Masks what looks like a secret: in messages, logs and reports, and in the settings that checkpoints hold."""

import base64
import binascii
import functools
import logging
import netrc
import os
import re
import shlex
import stat
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator

from tqdm.std import tqdm

from .text import COLOURS, printable

# Names of secrets. Short words count only where they stand alone: --pw, DB_PASS.
SECRET = re.compile(
    r"token(?!s_|iz)|key|passw|passphrase|pwd|secret|credential|cookie|bearer|auth(?!or(?!i))|"
    r"(?<![a-z])(?:pw|pass|pat)(?![a-z])",
    re.IGNORECASE,
)
# Below, + after a quantifier means that what is matched is not given up again, and {1,200} that a search ends: without
# them, the time for a hostile text would grow with the square of its length.
_NAME = re.compile(r"[\w-]++")
# What may stand between a name and its value: --name=value, NAME: value, "name": "value", 'Authorization': 'Bearer v'.
_SCHEME = r"(?:[\"']?(?:Bearer|Basic|Digest|Token)\s+)?"
_EQUALS = re.compile(rf"\\*[\"']?\s*+[:=]\s*+{_SCHEME}", re.IGNORECASE)
_SPACE = re.compile(r"\\*[\"']?,?\s++(?![\"']?-)")  # after a flag
_VALUE = re.compile(r"""(?:'[^']*+'?|"[^"]*+"?|[^\s'"])++""")
_NUMBER = re.compile(r"[\d.,_e+-]++", re.IGNORECASE)

# Values that are secret whatever their name.
SECRET_VALUE = re.compile(
    # User and password in an address; a password may hold a slash or an @.
    r"(?<=://)(?:[^/\s'\"]+|[^/\s:'\"]{1,200}+:(?!\d*/)[^\s'\"]{1,200})(?=@)|"
    r"(?<![\w./:@-])(?P<user>[\w.-]{1,64}+:)[^\s/@'\":]{3,200}+(?=@[\w.-])|"
    r"(?<=Bearer )[^\s'\"]+|(?<=bearer )(?=[^\s'\"\d]*+\d)[^\s'\"]+|"
    # Tokens of well-known services: Hugging Face (a folder may be named hf_datasets), …
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}+[\w.-]*+|"
    r"\b(?:api_org_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|xapp-|AKIA|AIza|pypi-AgE|[srp]k_(?:live|test)_|whsec_|"
    r"wandb_v\d_|nvapi-|dop_v1_|ya29\.|lin_api_)[\w.-]{8,}+|"
    r"\bASIA[A-Z0-9]{12,}+|\b(?:npm_|gsk_|r8_)[A-Za-z0-9]{20,}+|\bSG\.[\w-]{16,}+[\w.-]*+|"
    r"\beyJ[\w-]{10,}+[\w.=-]*+|"  # a JSON Web Token
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----|\Z)|"
    # 40 hexadecimal digits are a key of W&B where its name is near, elsewhere the name of a commit.
    r"(?P<near>(?i:wandb|api.?key|login)[^\n]{0,40}?)(?<![\w])[0-9a-f]{40}(?![\w])|"
    # Addresses that open without a password.
    r"(?<=[?&]sig=)[^&\s]+|(?<=[Ss]ignature=)[^&\s]+|(?<=AccountKey=)[^;\s]+|(?<=hooks\.slack\.com/services/)[\w/]+",
    re.DOTALL,
)
_BASIC = re.compile(r"(?<=Basic )[A-Za-z0-9+/]{4,}+=*")
SECRET_VARIABLE = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|PASSWORD|PASSWD|SECRET)$", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; masking shorter values would make messages unreadable
MASK = "•••"


def known_secrets() -> Iterator[str]:
    """The values of environment variables such as HF_TOKEN, the token that `hf auth login` has stored, and the
    passwords in the file .netrc, where W&B stores its key."""
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name):
            yield value.strip()
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    yield from _secrets_of_file(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token")), _whole_file)
    yield from _secrets_of_file(os.environ.get("NETRC", os.path.expanduser("~/.netrc")), _netrc_passwords)


def _secrets_of_file(path: str, read) -> tuple[str, ...]:
    """What `read` finds in a file, which is read again only when it has changed; nothing if it can't be read."""
    try:
        state = os.stat(path)
        regular = stat.S_ISREG(state.st_mode) and state.st_size < 2**20
        return read(path, state.st_mtime_ns, state.st_size) if regular else ()
    except (OSError, ValueError, netrc.NetrcParseError):
        return ()


@functools.lru_cache
def _whole_file(path: str, *state) -> tuple[str, ...]:
    with open(path, encoding="utf-8") as file:
        return (file.read().strip(),)


@functools.lru_cache
def _netrc_passwords(path: str, *state) -> tuple[str, ...]:
    return tuple(password for _, _, password in netrc.netrc(path).hosts.values() if password)


def without_secrets(text: str) -> str:
    """The text with a mask in place of each value that looks like a token or a password."""
    for value in known_secrets():
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, MASK)
    return _BASIC.sub(_basic, SECRET_VALUE.sub(_masked_value, text))


def _masked_value(match: re.Match) -> str:
    return f"{match['user'] or match['near'] or ''}{MASK}"


def _basic(match: re.Match) -> str:
    """Masks a user and a password in base64, and leaves a word like "Basic settings"."""
    try:
        return MASK if b":" in base64.b64decode(match[0], validate=True) else match[0]
    except (binascii.Error, ValueError):
        return match[0]


def without_secrets_in(settings, secret: bool = False):
    """Settings as JSON holds them, with each secret masked: what looks like one, and what has a name like api_key.

    secret: masks every text.
    """
    if isinstance(settings, dict):
        return {
            key: without_secrets_in(value, secret or bool(SECRET.search(str(key)))) for key, value in settings.items()
        }
    if isinstance(settings, list):
        return [without_secrets_in(value, secret) for value in settings]
    if isinstance(settings, str):
        return MASK if secret else without_secrets(settings)
    return settings


def safe_to_print(text: str, keep: str = "") -> str:
    """The text with secrets masked and with what a terminal obeys escaped, as `printable` does it."""
    return printable(without_secrets(text), keep)


def guard_output_of_libraries():
    """From now on, what libraries log, warn of and show beside progress bars, and the traceback that ends the process,
    holds no secret and nothing that a terminal obeys."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    print_status = tqdm.status_printer

    def record(*args, **kwargs):
        made = make_record(*args, **kwargs)
        try:
            text = made.getMessage()
        except Exception:  # the message does not fit its arguments: logging itself reports that
            return made
        safe = safe_to_print(COLOURS.sub("", text), keep="\n\t")
        if safe != text:
            made.msg, made.args = safe, ()
        if made.exc_info and made.exc_info[0]:
            made.exc_text = safe_to_print("".join(traceback.format_exception(*made.exc_info)).strip(), keep="\n")
        return made

    def print_traceback(kind, error, trace):
        text = "".join(traceback.format_exception(kind, error, trace))
        print(safe_to_print(text, keep="\n"), end="", file=sys.stderr)

    def status_printer(file):
        show = print_status(file)
        return lambda text: show(safe_to_print(COLOURS.sub("", text)))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: safe_to_print(format_warning(*args, **kwargs), keep="\n")
    sys.excepthook = print_traceback
    threading.excepthook = lambda args: print_traceback(args.exc_type, args.exc_value, args.exc_traceback)
    tqdm.status_printer = staticmethod(status_printer)


def masked_rows(values: dict, prefix: str = "", secret: bool = False):
    """(name, value) pairs as texts, with secrets masked. The keys of a dict in a dict are joined by dots.

    secret: masks all values.
    """
    for key, value in values.items():
        name, hidden = f"{prefix}{key}", secret or bool(SECRET.search(str(key)))
        several = isinstance(value, list | tuple)
        if isinstance(value, dict) or several and any(isinstance(item, dict | list | tuple) for item in value):
            yield from masked_rows(dict(enumerate(value)) if several else value, f"{name}.", hidden)
        elif hidden and value is not None and not ("tokens" in name.lower() and isinstance(value, int | float)):
            yield name, MASK
        else:
            yield name, _masked(", ".join(map(str, value)) if several else str(value))


def _masked(text: str) -> str:
    """The text with a mask for each value that has a secret's name: --name value, NAME=value, "name": "value"."""
    parts, end = [], 0
    while name := _NAME.search(text, end):
        parts.append(text[end : name.end()])
        start = end = name.end()
        if not SECRET.search(name[0]):
            continue
        between = _EQUALS.match(text, end) or (_SPACE.match(text, end) if name[0].startswith("-") else None)
        if not between:
            continue
        quote = text[name.start() - 1 : name.start()]
        if quote in ("'", '"') and text.startswith("=", start):  # '--name=value with spaces'
            closing = text.find(quote, start)
            end = len(text) if closing < 0 else closing
            parts.append(f"={MASK}")
        elif value := _VALUE.match(text, between.end()):
            is_count = "tokens" in name[0].lower() and _NUMBER.fullmatch(value[0])
            parts += [between[0], value[0] if is_count else MASK]
            end = value.end()
    return without_secrets("".join(parts) + text[end:])


def masked_command(command: str | list | None) -> str | None:
    """A command line, given as a text or a list of arguments, with secrets masked."""
    if command is None:
        return None
    return _masked(command if isinstance(command, str) else shlex.join(map(str, command)))
