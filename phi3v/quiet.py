"""Leaves progress bars and warnings to rank 0."""

import warnings

import datasets
from transformers.utils import logging

from .ranks import is_first


def quiet_libraries(no_bars: bool):
    """Lets libraries show progress bars and warnings on rank 0 alone, and with `no_bars` no bars."""
    if not is_first():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
    if no_bars or not is_first():  # a bar would share its line with what rank 0 says
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
