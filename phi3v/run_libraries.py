"""Loads the libraries that every run needs, all in one block of `quick_imports`, before a module of a run asks for one
of them. Each is also imported where it is used."""

from .libraries import quick_imports

with quick_imports(for_good=True):
    import datasets  # noqa: F401
    import deepspeed
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

__all__ = ["deepspeed"]
