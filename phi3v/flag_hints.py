"""A parser that answers an unknown flag with the known one that may have been meant.

convert_ucf101.py imports this module too, so it needs nothing but Python.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Container


class HintingParser(argparse.ArgumentParser):
    """Whoever inherits it says in `error` what happens to a message, to which `hint` is an addition that ends in "? ".

    other_names: for names that flags have in other programs, their names here; never_meant: names of flags that exist
    only to be refused."""

    other_names: dict[str, str] = {}
    never_meant: Container[str] = ()

    def error(self, message: str, hint: str = ""):
        raise NotImplementedError

    def parse_args(self, args=None, namespace=None):
        self._check_unknown(self.parse_known_args, args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args=None, namespace=None):
        self._check_unknown(self.parse_known_intermixed_args, args)
        return super().parse_intermixed_args(args, namespace)

    def _check_unknown(self, parse: Callable, args: list[str] | None):
        # A required flag may be missing because it has a typing error, which is the better answer.
        needed = [action for action in self._actions if action.required]
        for action in needed:
            action.required = False
        try:
            unknown = parse(sys.argv[1:] if args is None else args)[1]
        finally:
            for action in needed:
                action.required = True
        meant = [known for word in unknown if word.startswith("-") and (known := self.meant_by(word))]
        if unknown:
            hint = f"did you mean {', '.join(dict.fromkeys(meant))}? " if meant else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}", hint)

    def meant_by(self, flag: str) -> str | None:
        """The known flag that is nearest to an unknown one; None if none is near."""
        name = flag.partition("=")[0].lstrip("-").replace("-", "_").lower()
        names = [known[2:] for known in self._option_string_actions if known.startswith("--")]
        # A flag with an underscore is also known with a hyphen.
        names = [known for known in names if "-" not in known and known not in self.never_meant]
        other = self.other_names.get(name)
        near = [other] if other in names else difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        return f"--{near[0]}" if near else None
