"""The smallest and the largest value of every flag that is a number: one table for all programs.

A flag that is a number and stands neither in `LIMITS` nor in `WITHOUT_LIMITS` fails a test.
"""

import math
from dataclasses import dataclass

from .errors import InputError

LARGEST_COUNT = 2**31 - 1  # of 32-bit integers, in which libraries count


@dataclass(frozen=True)
class Limits:
    """least, most: the bounds, which are allowed themselves unless open_below or open_above is set.

    off: a value outside of the bounds that turns the setting off. too_many: what to say above `most`.
    """

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False
    off: int | None = None
    too_many: str | None = None

    def allow(self, value: float) -> bool:
        if self.off is not None and value == self.off:
            return True
        if value == math.inf or not self.least <= value <= self.most:  # the second also refuses NaN
            return False
        return not (self.open_below and value == self.least or self.open_above and value == self.most)

    def problem(self, value: float) -> str:
        """What is wrong with a value that is not allowed."""
        if self.too_many and value > self.most:
            return self.too_many
        return f"must be {self}"

    def __str__(self):
        parts = [f"{'above' if self.open_below else 'at least'} {self.least}"]
        if math.isinf(self.most):
            parts.append("finite")
        else:
            parts.append(f"{'below' if self.open_above else 'at most'} {self.most}")
        return " and ".join(parts) + ("" if self.off is None else f", or {self.off} to leave it out")


COUNT = Limits(1, LARGEST_COUNT)
AT_MOST_N = Limits(1, math.inf)
AMOUNT = Limits(0, math.inf, open_below=True)
AMOUNT_OR_0 = Limits(0, math.inf)
SHARE = Limits(0, 1, open_above=True)

LIMITS = {
    # the scripts' own flags
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "max_length"), AT_MOST_N),
    **dict.fromkeys(
        ("batch_size", "batch_size_per_gpu", "max_new_tokens", "estimate_gpus", "early_stopping_patience"), COUNT
    ),
    "num_crops": Limits(1, 16, too_many="but the model was trained with at most 16"),
    "lora_rank": Limits(1, 4096),  # no layer of the model has a higher rank than 3072
    "lora_alpha_ratio": Limits(0, 1e6, open_below=True),
    "lora_dropout": SHARE,
    "wd": AMOUNT_OR_0,
    **dict.fromkeys(("learning_rate", "vision_lr", "projector_lr", "cache_vision_gib"), AMOUNT),
    # the Trainer's
    "num_train_epochs": Limits(0, 10**6, open_below=True),
    "max_steps": Limits(1, 10**9, off=-1),
    "warmup_steps": Limits(0, 10**9),
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": AMOUNT_OR_0,
    "max_grad_norm": AMOUNT_OR_0,  # 0: gradients are not clipped
    "neftune_noise_alpha": AMOUNT_OR_0,
    "seed": Limits(0, 2**32 - 1),  # what numpy takes
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), Limits(0, 10**9, open_below=True)),
    "eval_delay": Limits(0, 10**9),
    "save_total_limit": AT_MOST_N,
    "per_device_eval_batch_size": COUNT,
    "dataloader_num_workers": Limits(0, LARGEST_COUNT),  # see also `most_workers`
    "dataloader_prefetch_factor": Limits(1, 1024),  # micro-batches in memory, for each worker
    "torch_empty_cache_steps": COUNT,
    "ddp_bucket_cap_mb": Limits(1, 2**20),
    "ddp_timeout": Limits(1, LARGEST_COUNT),  # seconds
}
WITHOUT_LIMITS = {"local_rank": "the scripts ignore it, because the environment says the same"}


def check_numbers(values: dict):
    """Raises InputError for the first flag whose value is outside of its limits.

    values: of flags, by name; those that are None, or no numbers, are not looked at.
    """
    for name, limits in LIMITS.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and not limits.allow(value):
            raise InputError(f"--{name} is {value}, {limits.problem(value)}")


def most_workers(cores: int) -> int:
    """The most processes that prepare images for one training process, on a machine with this many CPU cores."""
    return max(64, 4 * cores)


def check_finite(value, where: str):
    """Raises InputError if a number anywhere in what JSON or a flag holds is NaN or infinite."""
    rest = [(value, where)]
    while rest:
        value, where = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where} is {value}, must be a finite number")
        if isinstance(value, dict):
            rest += [(inner, f"{where}: {name}") for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            rest += [(inner, where) for inner in value]
