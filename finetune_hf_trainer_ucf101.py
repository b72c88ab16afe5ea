"""Fine-tune Phi-3.5-vision to name what happens in a video, or on any conversations with images.

    python convert_ucf101.py --out_dir DATA
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA

    # Ampere or newer
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir DATA --bf16 --use_flash_attention
    # only the language model learns: less memory, faster
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA --freeze_vision_model
    # several nodes: the same on each, with --nnodes, --node_rank, --master_addr and --master_port
    # a CPU, the small checkpoint of the demo, and its data
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py --data_dir output/demo/data/ucf101 \\
        --model_name_or_path demo/base_checkpoint --num_crops 1 --learning_rate 2e-3 --batch_size_per_gpu 8

DATA holds `ucf101_train.jsonl`, `ucf101_val.jsonl` and `images/`. A line of jsonl is one conversation:
    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/BabyCrawling/v_BabyCrawling_g21_c04.0.jpg", …], "user": "Classify the video …",
         "assistant": "BabyCrawling"}]}
with one turn or several, each with images of its own or none. All answers of a conversation are trained on; the last
one is what evaluation asks for, and its metric is the share of exact matches.
"""

import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.command_line import parse_flags, quiet_console, world_size
from phi3v.conversations import Collator, ConversationDataset, read_conversations
from phi3v.errors import InputError, exit_on_input_error
from phi3v.evaluation import generate_answers
from phi3v.hardware import DTYPES, check_accelerator, choose_attention, choose_precision

HERE = Path(__file__).resolve().parent
METRIC = "accuracy"


# ---------------------------------------------------------------------------------------------------------------
# Arguments: the recipe's here, the Trainer's own (--seed, --max_steps, --logging_steps, --report_to, …) beside them.


@dataclass
class RecipeArguments:
    _argument_group_name = "recipe"

    # data
    data_dir: str = field(metadata={"help": "folder with ucf101_train.jsonl, ucf101_val.jsonl and images/"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on the first N examples only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first N examples only"})
    num_crops: int = field(
        default=4, metadata={"help": "at most this many crops an image, 1 to 16; eight frames a video need few"}
    )
    # model
    model_name_or_path: str = field(
        default="microsoft/Phi-3.5-vision-instruct", metadata={"help": "a folder, or a repository on the Hub"}
    )
    use_flash_attention: bool = field(
        default=False, metadata={"help": "short for --attn_implementation flash_attention_2"}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "flash_attention_2, sdpa or eager; default: the best that is installed and the GPU can run"},
    )
    fp32: bool = field(default=False, metadata={"help": "full precision; default: fp16 on a GPU, fp32 on a CPU"})
    # what is trained
    freeze_vision_model: bool = field(
        default=False, metadata={"help": "keep tower, projector and separators; the text embedding still trains"}
    )
    # optimisation
    batch_size: int = field(default=16, metadata={"help": "examples an optimizer step, over all processes"})
    batch_size_per_gpu: int = field(
        default=1, metadata={"help": "micro-batch: examples a process handles at once; the rest is accumulated"}
    )
    wd: float = field(default=0.01, metadata={"help": "weight decay"})
    # evaluation
    no_eval_before: bool = field(default=False, metadata={"help": "skip the evaluation before training"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    # the rest
    no_tqdm: bool = field(default=False, metadata={"help": "no progress bars"})


TRAINER_DEFAULTS = {
    "output_dir": "./output/",
    "num_train_epochs": 1,
    "learning_rate": 4e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,  # a share of all steps: a fixed 50 would be longer than many a short run
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "dataloader_num_workers": 4,
    "per_device_eval_batch_size": 8,
    "activation_checkpointing": True,
    "ddp_find_unused_parameters": False,
    "deepspeed": str(HERE / "ds_config" / "zero2.json"),
}


# shared: arguments
def parse_arguments(argv: list[str] | None = None) -> tuple[RecipeArguments, TrainingArguments]:
    """Reads and checks all flags; raises InputError before anything is loaded."""
    args, trainer, given = parse_flags(RecipeArguments, TRAINER_DEFAULTS, __doc__.splitlines()[0], argv)
    for name in ("batch_size", "batch_size_per_gpu", "num_crops", "max_new_tokens", "max_train_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} is {value}, must be at least 1")
    if args.max_eval_samples is not None and args.max_eval_samples < 1:
        raise InputError(f"--max_eval_samples is {args.max_eval_samples}, must be at least 1")
    if args.num_crops > 16:
        raise InputError(f"--num_crops is {args.num_crops}, the model was trained with at most 16")
    step = world_size() * args.batch_size_per_gpu  # examples that all processes handle at once
    if args.batch_size % step:
        raise InputError(
            f"--batch_size {args.batch_size} can't be shared out: {world_size()} processes x --batch_size_per_gpu "
            f"{args.batch_size_per_gpu} must divide it"
        )
    model = Path(args.model_name_or_path)
    is_hub_name = args.model_name_or_path.count("/") == 1 and model.parts[0] not in ("/", ".", "..")
    if not (model / "config.json").is_file() and (not is_hub_name or model.parent.is_dir()):
        raise InputError(f"--model_name_or_path {model}: there is no such folder with a config.json in it")
    check_accelerator()
    precision = choose_precision(trainer["bf16"], trainer["fp16"], args.fp32)
    if args.use_flash_attention and args.attn_implementation not in (None, "flash_attention_2"):
        raise InputError(f"--use_flash_attention contradicts --attn_implementation {args.attn_implementation}")
    asked = "flash_attention_2" if args.use_flash_attention else args.attn_implementation
    args.attn_implementation = choose_attention(asked, precision)
    trainer.update(
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        deepspeed=read_deepspeed_config(trainer["deepspeed"]),
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=args.batch_size // step,
        weight_decay=args.wd,
        disable_tqdm=args.no_tqdm,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if "save_steps" in given else "no",
        eval_strategy="steps" if "eval_steps" in given else "no",
    )
    prepare_output_dir(Path(trainer["output_dir"]), resuming=trainer["resume_from_checkpoint"] is not None)
    try:
        return args, TrainingArguments(**trainer)
    except (ValueError, TypeError) as e:
        raise InputError(" ".join(str(e).split())) from None


def read_deepspeed_config(path: str | None) -> dict | None:
    if path in (None, "none"):
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--deepspeed {path} can't be read: give a json file, or none") from None
    except ValueError as e:
        raise InputError(f"--deepspeed {path} is not valid JSON: {e}") from None
    if not torch.accelerator.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes a minute and a C++ compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return config


def prepare_output_dir(folder: Path, resuming: bool):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output_dir {folder} can't be made: {e.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir {folder} is not writable")
    if not resuming and any(folder.glob("checkpoint-*")):
        raise InputError(
            f"--output_dir {folder} holds checkpoints: resume with --resume_from_checkpoint auto, or "
            "choose another folder"
        )


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Data


def load_data(args: RecipeArguments) -> tuple[list[dict], list[dict]]:
    """Training and evaluation conversations; the test split is left for the user's own last look."""
    folder = Path(args.data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder} is not a folder: python convert_ucf101.py --out_dir {folder} makes it")
    train = read_conversations(folder / "ucf101_train.jsonl", folder / "images")
    evaluation = read_conversations(folder / "ucf101_val.jsonl", folder / "images")
    return train[: args.max_train_samples], evaluation[: args.max_eval_samples]


# ---------------------------------------------------------------------------------------------------------------
# Model


def load_model(args: RecipeArguments, training_args: TrainingArguments) -> Phi3VForCausalLM:
    # DeepSpeed keeps an fp32 copy of half-precision weights in its optimizer. Without it, the weights that the
    # optimizer updates are fp32, and autocast computes in half precision.
    dtype = compute_dtype(training_args) if training_args.deepspeed else torch.float32
    try:
        model = Phi3VForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=dtype, attn_implementation=args.attn_implementation
        )
    except OSError as e:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: {' '.join(str(e).split())}") from None
    if args.freeze_vision_model:
        model.model.vision_embed_tokens.requires_grad_(False)
    return model


def compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    return DTYPES["bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32"]


# ---------------------------------------------------------------------------------------------------------------
# Metric


def normalise(text: str) -> str:
    return text.strip().rstrip(".").lower()


def score(prediction: str, answers: list[str]) -> float:
    """1 for an answer that is right but for case, surrounding blanks and a final full stop, else 0."""
    return float(normalise(prediction) in map(normalise, answers))


# shared: training
class RecipeTrainer(Trainer):
    """A Trainer that evaluates by generating answers."""

    def __init__(self, *, recipe: RecipeArguments, eval_conversations: list[dict], **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.eval_conversations = eval_conversations

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = {f"{metric_key_prefix}_{METRIC}": self.report()[METRIC]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def report(self) -> dict:
        """The metric over the evaluation set, with every prediction."""
        predictions = generate_answers(
            self.accelerator.unwrap_model(self.model).to(self.args.device),
            self.processing_class,
            self.eval_dataset,
            self.args.per_device_eval_batch_size,
            self.recipe.max_new_tokens,
            num_workers=self.args.dataloader_num_workers,
            compute_dtype=compute_dtype(self.args),
            disable_tqdm=self.args.disable_tqdm,
        )
        rows = []
        for example, prediction in zip(self.eval_conversations, predictions, strict=True):
            answers = example.get("answers") or [example["conversations"][-1]["assistant"]]
            rows.append({"id": example["id"], "prediction": prediction, "answers": answers})
            rows[-1]["score"] = score(prediction, answers)
        mean = sum(row["score"] for row in rows) / len(rows)
        return {"metric": METRIC, METRIC: mean, "num_examples": len(rows), "predictions": rows}

    def write_report(self, name: str) -> float:
        """Writes `report` to the output folder and returns the metric."""
        report = self.report()
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / name
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{path}: {METRIC} {report[METRIC]:.4f} over {report['num_examples']} examples", flush=True)
        return report[METRIC]


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Training


def main(argv: list[str] | None = None) -> RecipeTrainer:
    args, training_args = parse_arguments(argv)
    quiet_console()
    set_seed(training_args.seed)
    train, evaluation = load_data(args)
    try:
        processor = Phi3VProcessor.from_pretrained(args.model_name_or_path, num_crops=args.num_crops)
    except OSError as e:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: {' '.join(str(e).split())}") from None
    model = load_model(args, training_args)
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        recipe=args,
        data_collator=Collator(processor, "right"),
        train_dataset=ConversationDataset(train, processor),
        eval_dataset=ConversationDataset(evaluation, processor, for_generation=True),
        eval_conversations=evaluation,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{len(train)} training and {len(evaluation)} evaluation examples; {trained:,} of "
            f"{sum(p.numel() for p in model.parameters()):,} parameters train; {training_args.world_size} processes x "
            f"micro-batch {args.batch_size_per_gpu} x {training_args.gradient_accumulation_steps} accumulated",
            flush=True,
        )
    before = None if args.no_eval_before else trainer.write_report("eval_before.json")
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if resume == "auto" else resume)
    model.to(compute_dtype(training_args))  # what is evaluated is what is saved
    trainer.save_model()
    after = trainer.write_report("eval_after.json")
    if trainer.is_world_process_zero():
        change = f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f}"
        print(f"{METRIC} {change}; model, processor and reports are in {training_args.output_dir}")
    return trainer


if __name__ == "__main__":
    exit_on_input_error(main)
