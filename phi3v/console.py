"""What a run prints: rank 0 speaks for all ranks."""

import logging as python_logging
import warnings

from transformers.utils import logging

from .ranks import is_first
from .secrets import without_secrets


def say(*lines: str):
    """Prints on rank 0 alone, with tokens and passwords masked."""
    if is_first():
        for line in lines:
            print(without_secrets(line), flush=True)


def quiet_console(no_bars: bool):
    """Leaves progress bars and warnings to rank 0, and silences two warnings that mean nothing here."""
    # Libraries call functions of one another under names that have since changed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # DeepSpeed's config takes the number of accumulated micro-batches from the Trainer, so the two can't differ.
    accelerate = python_logging.getLogger("accelerate.accelerator")
    accelerate.addFilter(lambda record: "Gradient accumulation steps mismatch" not in record.getMessage())
    if no_bars:
        logging.disable_progress_bar()
    if not is_first():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
