"""What a checkpoint must hold before it is resumed from, and what is said if it can't be loaded.

A checkpoint may come from a stranger, and its manifest only says how large its files are.
"""

import contextlib
import dataclasses
import zipfile
from pathlib import Path

import torch
from transformers import TrainerState, trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_pt_utils import safe_globals

from ..errors import InputError

NUMBERS = {"epoch", "total_flos"}
WHOLE_NUMBERS = {"global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen"}
# What the state of the Trainer's control holds; it is written again into every later checkpoint.
CONTROL = {"args", "attributes"}


def problem_of_state(state, step: int) -> str | None:
    """What is wrong with the content of a trainer_state.json, which is to be of this step; None if nothing is."""
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        return "can't be read"
    if state["global_step"] != step:
        return f"is of step {state['global_step']}"
    if unknown := state.keys() - {field.name for field in dataclasses.fields(TrainerState)}:
        return f"holds {sorted(unknown)[0]}, which the Trainer does not know"
    for name, value in state.items():
        if name in NUMBERS and not _is_number(value) or name in WHOLE_NUMBERS and type(value) is not int:
            return f"holds a {name} that is no number"
    history, callbacks = state.get("log_history"), state.get("stateful_callbacks")
    if not isinstance(history, list) or not all(map(_is_log, history)):
        return "holds a log_history that is no list of steps and numbers"
    control = callbacks.get("TrainerControl") if isinstance(callbacks, dict) else None
    if not isinstance(control, dict) or control.keys() != CONTROL or control["attributes"] != {}:
        return "holds stateful_callbacks without the state of the Trainer's control"
    if not isinstance(control["args"], dict) or not all(isinstance(value, bool) for value in control["args"].values()):
        return "holds stateful_callbacks that are not true or false"
    return None


def _is_number(value) -> bool:
    return isinstance(value, float) or type(value) is int and abs(value) < 2**63


def _is_log(entry) -> bool:
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return False
    return all(value is None or isinstance(value, bool) or _is_number(value) for value in entry.values())


def missing_files(names: set[str]) -> str | None:
    """A file that a checkpoint with these files lacks; None if it has all that training needs to resume exactly."""
    by_deepspeed = any(name.startswith("global_step") for name in names)
    needed = {"trainer_state.json"} if by_deepspeed else {"trainer_state.json", "optimizer.pt", "scheduler.pt"}
    if not any(name.startswith("rng_state") for name in names):
        needed.add("rng_state.pth")
    if not by_deepspeed and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        needed.add("model.safetensors")
    return next(iter(sorted(needed - names)), None)


def _is_optimizer(content) -> bool:
    groups = content["param_groups"]
    return isinstance(content["state"], dict) and isinstance(groups, list) and all(isinstance(g, dict) for g in groups)


def _is_random_state(content) -> bool:
    sizes = {"python": 3, "numpy": 5}
    return torch.is_tensor(content["cpu"]) and all(len(content[name]) == size for name, size in sizes.items())


CONTENTS = {
    "optimizer.pt": _is_optimizer,
    "scheduler.pt": lambda content: isinstance(content, dict) and "last_epoch" in content,
    "scaler.pt": lambda content: isinstance(content, dict) and "scale" in content,
    "rng_state": _is_random_state,
}


def check_states(checkpoint: Path, fp16: bool):
    """Reads what the files of a checkpoint hold, without the numbers of large tensors. `refuse_pickles` comes first.

    fp16: whether this run has --fp16. Raises InputError that names the first file that can't be resumed from.
    """
    latest, step = checkpoint / "latest", checkpoint.name.rpartition("-")[2]
    if latest.is_file() and latest.read_bytes()[:100].strip() != b"global_step" + step.encode():
        raise InputError(f"{latest} must name the folder global_step{step}: give another checkpoint")
    if (checkpoint / "scaler.pt").is_file() and not fp16:
        raise InputError(f"{checkpoint} holds scaler.pt, which only a run with --fp16 has: delete it, or give --fp16")
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("global_step*/*.pt")]):
        check = CONTENTS.get("rng_state" if path.name.startswith("rng_state") else path.name, lambda content: True)
        if not zipfile.is_zipfile(path):  # which torch.save writes
            raise InputError(f"{path} is damaged: give another checkpoint")
        with reading(path), safe_globals():
            if not check(torch.load(path, map_location="cpu", weights_only=True, mmap=True)):
                raise InputError(f"{path} does not hold what its name says: give another checkpoint")


@contextlib.contextmanager
def reading(path: Path):
    """Turns whatever is raised while a checkpoint, or a file of it, is read into an InputError that names it."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # wrong content makes libraries raise errors of every kind
        text = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(
            f"{path} can't be resumed from ({text[:100]}): it is damaged, or of another model; give another checkpoint"
        ) from None


def _load_by_deepspeed(engine, checkpoint, *args, **kwargs):
    with reading(checkpoint):
        return deepspeed_load_checkpoint(engine, checkpoint, *args, **kwargs)


trainer.deepspeed_load_checkpoint = _load_by_deepspeed  # which the Trainer calls by this name
