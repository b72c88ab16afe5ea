"""Output folders and checkpoints that hold what no run has written, and DeepSpeed configurations that can't work."""

import json
import os
import shutil
from pathlib import Path

import torch
from helpers import CHECKPOINT

OWN = "written by the user"


def put(path: Path, text: str = OWN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def link(path: Path) -> Path:
    """A link to a file of the user's beside the output folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(put(path.parent.parent / f"of the user {path.name}"))
    return path


def link_to_folder(path: Path):
    target = put(path.parent.parent / "folder of the user" / "thesis.txt").parent
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def pipe(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def model_of_the_hub(out: Path):
    shutil.copytree(CHECKPOINT, out, dirs_exist_ok=True)


def model_with_an_own_evaluation(out: Path):
    """What --evaluate_only leaves in a folder does not make its model one of a run."""
    model_of_the_hub(out)
    report = {"metric": "accuracy", "accuracy": 0.5, "num_examples": 2, "predictions": []}
    put(out / "evaluation-val.json", json.dumps(report, indent=2))


# name: (makes the folder, more flags, what the message names). A run that would overwrite it is refused.
IN_THE_WAY = {
    **{
        name: (lambda out, name=name: put(out / name), "", name)
        for name in (
            "README.md", "report.html", "eval_before.json", "eval_after.json", "finished.json", "config.json",
            "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
            "processor_config.json", "model.safetensors", "model-00001-of-00002.safetensors", "training_args.bin",
            "unfinished", "checkpoint-7/thesis.txt", "unfinished/checkpoint-7/thesis.txt", "unfinished/best/thesis.txt",
            "unfinished/checkpoint-7/model.safetensors",
        )
    },
    "adapter": (lambda out: put(out / "adapter_model.safetensors"), "--use_lora", "adapter_model.safetensors"),
    "best": (lambda out: put(out / "best/thesis.txt"), "--keep_best --eval_steps 1", "best"),
    "best with an own evaluation": (
        lambda out: put(out / "best/evaluation.json", '{"accuracy": 0.9}'),
        "--keep_best --eval_steps 1",
        "best",
    ),
    "runs is a file": (lambda out: put(out / "runs"), "--report_to tensorboard", "runs"),
    "report is a link": (lambda out: link(out / "report.html"), "", "report.html"),
    "weights are a link": (lambda out: link(out / "model.safetensors"), "", "model.safetensors"),
    "unfinished is a link": (lambda out: link_to_folder(out / "unfinished"), "", "unfinished"),
    "checkpoint is a link": (lambda out: link_to_folder(out / "checkpoint-7"), "", "checkpoint-7"),
    "dry_run": (lambda out: put(out / "dry_run/thesis.txt"), "--dry_run", "dry_run/thesis.txt"),
    "dry_run holds a model": (lambda out: model_of_the_hub(out / "dry_run"), "--dry_run", "dry_run"),
    "dry_run is a link": (lambda out: link_to_folder(out / "dry_run"), "--dry_run", "dry_run"),
    "another model": (model_of_the_hub, "", "config.json"),
    "another model, evaluated": (model_with_an_own_evaluation, "", "config.json"),
    "finished.json is a list": (lambda out: put(out / "finished.json", "[1]"), "", "finished.json"),
    "finished.json is empty": (lambda out: put(out / "finished.json", ""), "", "finished.json"),
    "finished.json is deep": (lambda out: put(out / "finished.json", "[" * 200_000), "", "finished.json"),
    "finished.json is a pipe": (lambda out: pipe(out / "finished.json"), "", "finished.json"),
    "complete.json is a pipe": (lambda out: pipe(out / "checkpoint-7/complete.json"), "", "checkpoint-7"),
}  # fmt: skip

# Files that a run must leave alone, whatever their names are like.
BESIDE_A_RUN = (
    "unfinished/thesis.txt", "unfinished/checkpoint-2-notes/thesis.txt", "abandoned-checkpoint-2/thesis.txt",
    "earlier-1/thesis.txt", "best/photo.txt", "demo/README.md", "checkpoint-notes/thesis.txt", "runs/thesis.txt",
    "my.safetensors", "report.html.partial", "eval_after.json.partial", "README.md.partial", "adapter_config.json",
    "dry_run/thesis.txt", "evaluation.json", "evaluation-val.json",
)  # fmt: skip


# ---- Checkpoints

CONTROL = {"args": {"should_save": True}, "attributes": {}}
# name: (what is changed in trainer_state.json, what is said about it)
STATES = {
    "no callbacks": ({"stateful_callbacks": {}}, "holds stateful_callbacks"),
    "callbacks are a list": ({"stateful_callbacks": [1]}, "holds stateful_callbacks"),
    "control is a number": ({"stateful_callbacks": {"TrainerControl": 3}}, "holds stateful_callbacks"),
    "control without attributes": (
        {"stateful_callbacks": {"TrainerControl": {"args": {}}}},
        "holds stateful_callbacks",
    ),
    "control is text": (
        {"stateful_callbacks": {"TrainerControl": CONTROL | {"args": {"should_save": "x"}}}},
        "not true or false",
    ),
    "control with attributes": (
        {"stateful_callbacks": {"TrainerControl": CONTROL | {"attributes": {"state": 1}}}},
        "holds stateful_callbacks",
    ),
    "history is text": ({"log_history": "x"}, "holds a log_history"),
    "history of numbers": ({"log_history": [1]}, "holds a log_history"),
    "history without steps": ({"log_history": [{"loss": 1.0}]}, "holds a log_history"),
    "loss is text": ({"log_history": [{"loss": "x", "step": 1}]}, "holds a log_history"),
    "loss is huge": ({"log_history": [{"loss": 10**400, "step": 1}]}, "holds a log_history"),
    "unknown field": ({"more": 1}, "holds more, which the Trainer does not know"),
    "epoch is text": ({"epoch": "x"}, "holds a epoch that is no number"),
    "FLOPs are text": ({"total_flos": "x"}, "holds a total_flos"),
    "max_steps is text": ({"max_steps": "x"}, "holds a max_steps"),
    "step is text": ({"global_step": "12"}, "can't be read"),
    "step is true": ({"global_step": True}, "can't be read"),
    "step is a fraction": ({"global_step": 12.5}, "can't be read"),
}
# file of a checkpoint: wrong contents
CONTENTS = {
    "optimizer.pt": [{}, 3, {"state": 1, "param_groups": []}, {"state": {}, "param_groups": [1]}],
    "scheduler.pt": [{}, [], 3],
    "rng_state.pth": [{}, {"python": 1, "numpy": 2, "cpu": 3}, [torch.zeros(1)]],
}
SETTINGS = {
    "a list": ([["model", 1]], "can't be read"),
    "model": ({"model": 3}, "holds settings whose model is 3"),
    "commits": ({"data_commits": "x"}, 'holds settings whose data_commits is "x"'),
    "commits of numbers": ({"data_commits": {"a": 1}}, "holds settings whose data_commits"),
    "tokens": ({"tokens": "7"}, "holds settings whose tokens"),
    "cached": ({"cached": [1]}, "holds settings whose cached"),
}


def change_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def update_manifest(checkpoint: Path):
    """Makes the manifest agree with the files, as a stranger would."""
    from phi3v.training.checkpoints import file_sizes

    change_json(checkpoint / "complete.json", files=file_sizes(checkpoint))


# ---- DeepSpeed configurations: (content, what the message holds)

DEEPSPEED = {
    "deep list": ("[" * 200_000, "nested too deeply"),
    "deep object": ('{"a":' * 200_000, "nested too deeply"),
    "stage is text": ({"zero_optimization": {"stage": "x"}}, "stage Input should be 0, 1, 2, 3"),
    "stage 9": ({"zero_optimization": {"stage": 9}}, "stage Input should be"),
    "stage is null": ({"zero_optimization": {"stage": None}}, "stage Input should be"),
    "no sections": ({"zero_optimization": None}, "must hold a JSON object"),
    "bucket is text": ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size"),
    "bucket below 0": ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size"),
    "unknown key": ({"zero_optimization": {"foo": 1}}, "foo"),
    "optimizer is a list": ({"optimizer": [1]}, "optimizer is [1], must be an object"),
    "unknown optimizer": ({"optimizer": {"type": "Nope"}}, "optimizer type 'Nope' must be one of"),
    "optimizer of a number": ({"optimizer": {"type": 3}}, "optimizer type 3 must be one of"),
    "unknown scheduler": ({"scheduler": {"type": "Nope"}}, "scheduler type 'Nope' must be one of"),
    "batch is text": ({"train_batch_size": "x"}, "train_batch_size is 'x', must be auto or a whole number above 0"),
    "batch below 0": ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1"),
    "clipping is NaN": ('{"gradient_clipping": NaN}', "gradient_clipping is nan, must be a finite number"),
    "rate is infinite": ('{"optimizer": {"params": {"lr": Infinity}}}', "lr is inf, must be a finite number"),
    "fp16 is a number": ({"fp16": 3}, "fp16 is 3, must be an object"),
    "offload is a number": ({"zero_optimization": {"stage": 2, "offload_optimizer": 3}}, "offload_optimizer"),
    "tensorboard": ({"tensorboard": {"enabled": "x"}}, "tensorboard.enabled"),
    "text for true": ({"wall_clock_breakdown": "x"}, "holds what DeepSpeed refuses"),
}
