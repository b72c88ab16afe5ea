"""Masks what looks like a secret: in messages, logs and reports, and in the settings that checkpoints hold."""

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator

SECRET = re.compile(r"token(?!s_|iz)|key|passw|secret|credential|auth", re.IGNORECASE)
# A name that looks secret and its value: --name=value, --name value, NAME=value, "name": "value".
_NAME, _VALUE = rf"[\w-]*(?:{SECRET.pattern})[\w-]*", r"""(?:'[^']*'|"[^"]*"|[^\s'"])+"""
SECRET_IN_TEXT = re.compile(
    rf"""(?P<quote>['"])(?P<a>{_NAME}=)(?:(?!(?P=quote)).)*|"""
    rf"""(?P<b>{_NAME}["']?\s*[:=]\s*|(?<!\S)-{_NAME}\s+(?!-))(?P<value>{_VALUE})""",
    re.IGNORECASE | re.DOTALL,
)
# Values that are secret whatever their name: user and password in a URL, tokens of well-known services.
SECRET_VALUE = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|(?<=Bearer )[^\s'\"]+|"
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*|"  # a folder may be named hf_datasets
    r"\b(?:api_org_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}|"
    r"(?<=[?&]sig=)[^&\s]+|(?<=[Ss]ignature=)[^&\s]+"  # signed links, which open without a password
)
SECRET_VARIABLE = re.compile(r"(TOKEN|API_?KEY|ACCESS_?KEY|PASSWORD|PASSWD|SECRET)$", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; masking shorter values would make messages unreadable
MASK = "•••"


def known_secrets() -> Iterator[str]:
    """The values of environment variables such as HF_TOKEN, and the token that `hf auth login` has stored."""
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name):
            yield value.strip()
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    try:
        with open(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token")), encoding="utf-8") as file:
            yield file.read().strip()
    except (OSError, ValueError):
        pass


def without_secrets(text: str) -> str:
    """The text with a mask in place of each value that looks like a token or a password."""
    for value in known_secrets():
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, MASK)
    return SECRET_VALUE.sub(MASK, text)


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


def mask_logs_and_tracebacks():
    """From now on, this process masks secrets in what libraries log, in warnings, and in the traceback that ends it."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def masked_record(*args, **kwargs):
        record = make_record(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # the message does not fit its arguments: logging itself reports that
            return record
        if (masked := without_secrets(text)) != text:
            record.msg, record.args = masked, ()
        return record

    def masked_traceback(kind, error, trace):
        print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    logging.setLogRecordFactory(masked_record)
    warnings.formatwarning = lambda *args, **kwargs: without_secrets(format_warning(*args, **kwargs))
    sys.excepthook = masked_traceback


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
    def mask(match):
        if match["a"]:
            return f"{match['quote']}{match['a']}{MASK}"
        count = "tokens" in match["b"].lower() and match["value"].isdigit()
        return match[0] if count else f"{match['b']}{MASK}"

    return without_secrets(SECRET_IN_TEXT.sub(mask, text))


def masked_command(command: str | list | None) -> str | None:
    """A command line, given as a text or a list of arguments, with secrets masked."""
    if command is None:
        return None
    return _masked(command if isinstance(command, str) else shlex.join(map(str, command)))
