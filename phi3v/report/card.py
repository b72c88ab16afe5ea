"""The model card of a run: README.md in its output folder."""

import os
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..files import write_text
from ..launch import command
from ..secrets import without_secrets
from ..text import printable
from .statistics import result_of
from .summary import describe_mode, versions
from .templates import environment


def write_model_card(args, training_args, about: dict, before: dict | None, after: dict, precision: str):
    """Writes `README.md` beside the model: base model, data, settings, metric, and how to load the model.

    args: the recipe's flags; training_args: the run's TrainingArguments.
    about: "data" as `describe_sizes` returns it, "epochs" and "steps" as they were trained; "commits", if there are
        any, of the model and the data on the Hub, by repository.
    before, after: contents of `eval_before.json`, None if there is none, and of `eval_after.json`.
    precision: "bf16", "fp16" or "fp32".
    """
    folder, script = Path(training_args.output_dir), Path(sys.argv[0]).name
    task = Path(sys.argv[0]).stem.removeprefix("finetune_hf_trainer_")
    name, commits = args.model_name_or_path, about.get("commits", {})
    start = (args.adapter or "").partition("@")[0]  # a repository whose adapter is trained further is no data set
    metadata = ModelCardData(
        base_model=printable(name) if not Path(name).exists() else None,
        datasets=[printable(repository) for repository in commits if repository not in (name, start)] or None,
        library_name="peft" if args.use_lora else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", "lora" if args.use_lora else "full-fine-tuning"],
        model_name=printable(folder.resolve().name),
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=printable(task),
                dataset_name=printable(task),
                metric_type=after["metric"],
                metric_value=round(after[after["metric"]], 4),
            )
        ],
    )
    facts = {
        **{f"commit of {repository}": commit for repository, commit in commits.items()},
        **about["data"],
        "epochs": about["epochs"],
        "steps": about["steps"],
        **({"evaluations": about["better model"]} if "better model" in about else {}),
        "examples per step": args.batch_size,
        "learning rate": f"{training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}",
        "weight decay": args.wd,
        "precision": precision,
        "crops per image, at most": args.num_crops,
        **(
            {"adapter": f"rank {args.lora_rank}, alpha {args.lora_alpha_ratio * args.lora_rank:g}"}
            if args.use_lora
            else {}
        ),
        **({"an adapter that was trained further": args.adapter} if args.adapter else {}),
        "seed": training_args.seed,
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }
    reports = {"before training": before, "after training": after}
    text = environment.get_template("card.md.jinja").render(
        metadata=metadata.to_yaml(),
        title=f"Phi-3.5-vision, {task}",
        base=os.path.abspath(name) if Path(name).is_dir() else name,
        revision=commits.get(name),
        mode=describe_mode(args),
        script=script,
        metric=after["metric"],
        results={name: result_of(report) for name, report in reports.items() if report},
        data=about["data"],
        facts=facts,
        command=command(),
        folder=str(folder),
        num_crops=args.num_crops,
        adapter=args.use_lora,
        quantized=args.use_qlora,
        has_before=before is not None,
        beside="vision weights"
        if args.vision_training != "default"
        else "separators"
        if args.train_separators
        else None,
        start=args.adapter,
    )
    write_text(folder / "README.md", without_secrets(text))
