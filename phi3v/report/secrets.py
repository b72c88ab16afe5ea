"""Masks what looks like a secret in settings and command lines."""

import re
import shlex

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
    r"(?<=://)[^/\s@]+(?=@)|\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}|"
    r"(?<=[?&]sig=)[^&\s]+|(?<=[Ss]ignature=)[^&\s]+"  # signed links, which open without a password
)
MASK = "•••"


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

    return SECRET_VALUE.sub(MASK, SECRET_IN_TEXT.sub(mask, text))


def masked_command(command: str | list | None) -> str | None:
    """A command line, given as a text or a list of arguments, with secrets masked."""
    if command is None:
        return None
    return _masked(command if isinstance(command, str) else shlex.join(map(str, command)))
