"""What the result of a run depends on, and whether a checkpoint belongs to the same run.

The names and meaning of what `settings_of` returns must stay as they are: checkpoints hold them, and a flag that an old
checkpoint lacks means the default that it had then.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from accelerate.utils import gather_object

from ..deepspeed_config import BATCHES
from ..errors import InputError
from ..hub_names import data_commits
from ..secrets import without_secrets_in

# Flags that may differ between the processes of one run.
MAY_DIFFER_BETWEEN_RANKS = {
    "local_rank",
    "data_dir",
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "log_level",
    "log_level_replica",
    "no_tqdm",
    "disable_tqdm",
    "run_name",
    "cache_vision_features",
}

# Settings that do not change what is trained. All other settings must be the same when a run resumes.
NEUTRAL = {
    "output_dir",
    "data_dir",  # the content of the data is compared, not where it lies
    "estimate",
    "estimate_gpus",
    "check_data",
    "resume_anyway",
    "model_revision",  # the commit that it stands for is compared, as "model"
    "data_revision",  # likewise, as "data_commits"
    "resume_from_checkpoint",
    "no_tqdm",
    "no_eval_before",
    "max_eval_samples",
    "max_new_tokens",
    "eval_split",
    "max_tokens_per_gpu",  # the number that was chosen is compared
    "on_bad_example",
    "follow_links",  # the content of the data is compared
    "literal_tags",
    "cache_vision_features",  # whether features were cached is compared, not where
    "cache_vision_gib",
    "keep_best",
    "preset",  # what it sets is compared
    "dry_run",
    "evaluate_only",
    "per_device_eval_batch_size",
    "logging_steps",
    "logging_first_step",
    "logging_strategy",
    "eval_steps",
    "eval_strategy",
    "do_eval",  # follows from eval_strategy
    "eval_delay",
    "early_stopping_patience",
    "early_stopping_on",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "run_name",
    "project",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_pin_memory",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "ddp_timeout",
    "activation_checkpointing",  # computes the same numbers a second time
    "activation_checkpointing_kwargs",
    "local_rank",
    "use_cpu",
    "explicit",
    "adapter_folder",  # the adapter's name and its weights are compared
}

# Settings that decide the shape or the content of the optimizer's state. A checkpoint can't be resumed with other
# values of these, not even with --resume_anyway. Each text says what to do.
STRUCTURAL = {
    "world_size": "start as many processes as before",
    "deepspeed": "give the same --deepspeed as before",
    "model_name_or_path": "give the same model as before",
    "adapter": "give the same --adapter as before",
    "bf16": "use the same precision as before",
    "fp16": "use the same precision as before",
    "optim": "give the same --optim as before",
    **dict.fromkeys(
        (
            "freeze_vision_model",
            "train_projector",
            "train_separators",
            "use_lora",
            "use_qlora",
            "quantize_vision",
            "vision_training",
        ),
        "train the same part of the model",
    ),
    **dict.fromkeys(("lora_rank", "use_dora"), "train the same adapters"),
    # The optimizer's state holds these values, and new ones would be ignored.
    **dict.fromkeys(
        (
            "learning_rate",
            "vision_lr",
            "projector_lr",
            "wd",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
        ),
        "use the same optimizer settings as before",
    ),
}


def settings_of(args, training_args, **more) -> dict:
    """All settings that the result of a run depends on, as JSON would hold them.

    args: a script's flags; training_args: a TrainingArguments; more: what else the result depends on.
    """
    return _as_json(training_args.to_dict() | vars(args) | {"world_size": training_args.world_size} | more)


def settings_of_run(args, training_args, tokens: int | None, data: str, stored: dict) -> dict:
    """`settings_of` with what a run finds out: the tokens that fill a micro-batch, a fingerprint of the data, and those
    of what it starts from. stored: the settings in the checkpoint that it resumes from."""
    more = fingerprints(args) | {"tokens": tokens, "data": data}
    if data_commits:
        more["data_commits"] = dict(sorted(data_commits.items()))
    # A resumed run keeps what it began with: cached features differ from computed ones by rounding.
    more["cached"] = stored.get("cached", False) if args.cache_vision_features else False
    return settings_of(args, training_args, **more)


def with_defaults(stored: dict, now: dict, args, training_args) -> dict:
    """Stored settings, with the default of every flag that did not exist yet when they were stored.

    now: this run's settings, which have all flags; args, training_args: as for `settings_of`.
    """
    fields = [field for source in (training_args, args) for field in dataclasses.fields(source)]
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    defaults |= {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {name: value for name, value in _as_json(defaults).items() if name in now} | stored


def _as_json(values: dict) -> dict:
    values = {name: value for name, value in values.items() if name not in NEUTRAL and "token" not in name.split("_")}
    return without_secrets_in(json.loads(json.dumps(values, default=str, sort_keys=True)))


def model_fingerprint(name: str) -> str | None:
    """A hash of the weights in a folder, of their sizes and samples of their bytes; None for a model of the Hub."""
    files = sorted(Path(name).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16] if files else None


def fingerprints(args) -> dict[str, str | None]:
    """What stands for the content of the model, and of the adapter of --adapter, among the settings of a run."""
    found = {"model": args.model_revision or model_fingerprint(args.model_name_or_path)}
    return found | ({"adapter_weights": model_fingerprint(args.adapter_folder)} if args.adapter else {})


def problem_of_settings(stored) -> str | None:
    """What is wrong with settings that a checkpoint or a finished run has stored; None if nothing is."""
    if not isinstance(stored, dict):
        return "does not hold settings"
    commits = stored.get("data_commits")
    fits = {
        "model": isinstance(stored.get("model"), str | None),
        "adapter_weights": isinstance(stored.get("adapter_weights"), str | None),
        "cached": isinstance(stored.get("cached"), bool | None),
        "tokens": stored.get("tokens") is None or type(stored["tokens"]) is int and stored["tokens"] > 0,
        "data_commits": commits is None or isinstance(commits, dict) and all(map(_is_text, commits.values())),
    }
    return next((f"holds settings whose {name} is {short_json(stored[name])}" for name in fits if not fits[name]), None)


def _is_text(value) -> bool:
    return isinstance(value, str)


def check_settings(stored: dict, now: dict, source: Path, anyway: bool):
    """Raises InputError with everything that differs; with `anyway`, only if something in STRUCTURAL differs.

    stored: the settings in `source`, a checkpoint or a finished run; now: those of this run.
    """
    stored = without_secrets_in(stored)  # versions that wrote secrets into checkpoints are still resumed from
    # Earlier versions recorded no commits, and a local copy of the data has none; "data" compares its content.
    if stored.get("model") is None:
        now = now | {"model": stored.get("model")}
    if not (stored.get("data_commits") and now.get("data_commits")):
        stored, now = ({k: v for k, v in s.items() if k != "data_commits"} for s in (stored, now))
    names = [name for name in sorted(stored.keys() | now.keys()) if stored.get(name) != now.get(name)]
    structural = [name for name in names if name in STRUCTURAL]
    if not names or anyway and not structural:
        return
    lines = [f"{source} was written with other settings:"]
    lines += [f"  {name}: {short_json(stored.get(name))} then, {short_json(now.get(name))} now" for name in names]
    if re.fullmatch("[0-9a-f]{40}", str(stored.get("model"))) and "model" in names:
        lines.append(f"  --model_revision {stored['model']} trains from the former commit of the model")
    if "data_commits" in names:
        former = ",".join(f"{repo}@{commit}" for repo, commit in stored["data_commits"].items())
        lines.append(f"  --data_revision {former} trains on the former commit of the data")
    if structural:
        ways = "; ".join(dict.fromkeys(STRUCTURAL[name] for name in structural))
        lines.append(f"  to resume from it, {ways}; or train anew from its weights, in another --output_dir")
    else:
        lines.append("  give the same settings as before, or resume with the new ones by --resume_anyway")
    raise InputError("\n".join(lines))


def check_flags_equal_on_all_ranks(args, training_args):
    """Raises InputError if processes were started with different flags: they would wait for one another for ever."""
    flags = without_secrets_in(json.loads(json.dumps(training_args.to_dict() | vars(args), default=str)))
    first, *others = gather_object([{k: v for k, v in flags.items() if k not in MAY_DIFFER_BETWEEN_RANKS}])
    for rank, other in enumerate(others, 1):
        if names := [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]:
            differences = "; ".join(
                f"{name}: {short_json(first.get(name))}, {short_json(other.get(name))}" for name in names
            )
            raise InputError(f"processes 0 and {rank} were started with different flags: {differences}")


def check_commits_equal_on_all_ranks(commits: dict[str, str]):
    """Raises InputError if the nodes' caches hold different commits of a repository. commits: by repository."""
    first, *others = gather_object([commits])
    for rank, other in enumerate(others, 1):
        if different := [name for name in first if other.get(name) != first[name]]:
            found = "; ".join(f"{name}: {first[name]}, {other.get(name)}" for name in different)
            raise InputError(
                f"processes 0 and {rank} read different commits from the caches of their nodes: {found}; give "
                "--model_revision or --data_revision"
            )


def fills_by_default(args, given: set[str], deepspeed: dict | None, checkpoint: Path | None, stored: dict) -> bool:
    """Whether micro-batches are filled by tokens on an accelerator although --max_tokens_per_gpu is not given. They
    have a number of examples if anything asks for one, and in a run that resumes and had one.

    args: a script's flags; given: those on the command line and in the preset; deepspeed: the content of its json.
    checkpoint, stored: as in `micro_batch_tokens`.
    """
    asked = "batch_size_per_gpu" in given or args.batch_size_per_gpu != 1
    asked |= any((deepspeed or {}).get(name, "auto") != "auto" for name in BATCHES)
    return not asked and (checkpoint is None or bool(stored.get("tokens")))


def micro_batch_tokens(asked: int | str | None, checkpoint: Path | None, stored: dict) -> int | str | None:
    """--max_tokens_per_gpu; if it is "auto" and the run resumes, the number that was chosen when the run began.

    Raises InputError if the resumed run did not fill micro-batches by tokens.
    """
    if asked != "auto" or checkpoint is None:
        return asked
    if not stored.get("tokens"):
        raise InputError(f"--max_tokens_per_gpu auto: {checkpoint} was trained without it; leave it out here too")
    return stored["tokens"]


def short_json(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
