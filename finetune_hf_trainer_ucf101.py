"""Fine-tune Phi-3.5-vision to name what happens in a video, or on any conversations with images.

    python convert_ucf101.py --out_dir DATA
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA

    # Ampere or newer
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir DATA --bf16 --use_flash_attention
    # only the language model learns: less memory, faster
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA --freeze_vision_model
    # several nodes: the same on each, with --nnodes, --node_rank, --master_addr and --master_port
    # a CPU and the embedded checkpoint
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py --data_dir DATA \\
        --model_name_or_path demo/base_checkpoint --num_crops 1 --learning_rate 1e-3

DATA holds `ucf101_train.jsonl`, `ucf101_val.jsonl` and `images/`. A line of jsonl is one conversation:
    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/BabyCrawling/v_BabyCrawling_g21_c04.0.jpg", …], "user": "Classify the video …",
         "assistant": "BabyCrawling"}]}
with one turn or several, each with images of its own or none. All answers of a conversation are trained on; the last
one is what evaluation asks for, and its metric is the share of exact matches.
"""

import dataclasses
import importlib
import json
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_flash_attn_2_available

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.conversations import Collator, InputError, encode_conversation, read_conversations
from phi3v.evaluation import generate_answers

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
    "deepspeed": str(HERE / "ds_config" / "zero2.json"),
}

# shared: arguments
# Flags of the Trainer that the recipe has under a name of its own, or that can't work here.
REFUSED = {
    "gradient_accumulation_steps": "it follows from --batch_size and --batch_size_per_gpu",
    "per_device_train_batch_size": "use --batch_size_per_gpu",
    "train_batch_size": "use --batch_size and --batch_size_per_gpu",
    "weight_decay": "use --wd",
    "disable_tqdm": "use --no-tqdm",
    "auto_find_batch_size": "the effective batch would change; lower --batch_size_per_gpu",
    "remove_unused_columns": "all columns are the model's",
    "fsdp": "sharding is DeepSpeed's here: --deepspeed",
    "fsdp_config": "sharding is DeepSpeed's here: --deepspeed",
    "push_to_hub": "upload the output folder when you have looked at it",
    "use_cpu": "a CPU is used where there is no accelerator",
    "do_train": "training is what the script does",
    "do_eval": "evaluation always runs after training; --no_eval_before skips the one before",
    "do_predict": "evaluation always runs after training",
    "eval_strategy": "use --eval_steps",
    "save_strategy": "use --save_steps",
}


class Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_arguments(argv: list[str] | None = None) -> tuple[RecipeArguments, TrainingArguments]:
    """Reads and checks all flags; raises InputError before anything is loaded."""
    argv = sys.argv[1:] if argv is None else argv
    given = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    for flag in sorted(given & REFUSED.keys()):
        raise InputError(f"--{flag} is not taken here: {REFUSED[flag]}")
    parser = Parser((RecipeArguments, TrainingArguments), description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.set_defaults(**TRAINER_DEFAULTS)
    namespace = vars(parser.parse_args([arg for arg in argv if not arg.startswith("--local_rank")]))
    args = RecipeArguments(**{f.name: namespace.pop(f.name) for f in dataclasses.fields(RecipeArguments)})
    if "RANK" not in os.environ:  # plain `python`: a world of one
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world_size = int(os.environ["WORLD_SIZE"])

    for name, low in (("batch_size", 1), ("batch_size_per_gpu", 1), ("num_crops", 1), ("max_new_tokens", 1)):
        if getattr(args, name) < low:
            raise InputError(f"--{name} is {getattr(args, name)}, must be at least {low}")
    if args.num_crops > 16:
        raise InputError(f"--num_crops is {args.num_crops}, the model was trained with at most 16")
    if args.batch_size % (world_size * args.batch_size_per_gpu):
        raise InputError(
            f"--batch_size {args.batch_size} can't be shared out: {world_size} processes x --batch_size_per_gpu "
            f"{args.batch_size_per_gpu} must divide it"
        )
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, must be at least 1")
    check_model_path(args.model_name_or_path)
    choose_precision_and_attention(args, namespace)
    choose_deepspeed(namespace)
    namespace.update(
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=args.batch_size // (world_size * args.batch_size_per_gpu),
        weight_decay=args.wd,
        disable_tqdm=args.no_tqdm,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if "save_steps" in given else "no",
        eval_strategy="steps" if "eval_steps" in given else "no",
    )
    try:
        return args, TrainingArguments(**namespace)
    except (ValueError, TypeError) as e:
        raise InputError(" ".join(str(e).split())) from None


def check_model_path(name: str):
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name.split("/")[0]).is_dir()
    if not is_hub_name and not (Path(name) / "config.json").is_file():
        raise InputError(f"--model_name_or_path {name}: there is no such folder with a config.json in it")


def choose_precision_and_attention(args: RecipeArguments, namespace: dict):
    """Fills in what the flags leave open and refuses what this machine can't do."""
    has_gpu = torch.accelerator.is_available()
    asked = [name for name in ("bf16", "fp16") if namespace[name]] + ["fp32"] * args.fp32
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} contradict each other: give one")
    precision = asked[0] if asked else ("fp16" if has_gpu else "fp32")
    namespace.update(bf16=precision == "bf16", fp16=precision == "fp16")
    if precision == "fp16" and not has_gpu:
        raise InputError("--fp16 needs a GPU: on a CPU use --bf16, or --fp32, the default there")
    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if precision == "bf16" and torch.cuda.is_available() and not ampere:
        raise InputError("--bf16 needs an Ampere GPU or newer: use --fp16, the default on a GPU")
    flash = is_flash_attn_2_available() and ampere and precision != "fp32"
    if args.use_flash_attention and args.attn_implementation not in (None, "flash_attention_2"):
        raise InputError(f"--use_flash_attention contradicts --attn_implementation {args.attn_implementation}")
    asked_attention = "flash_attention_2" if args.use_flash_attention else args.attn_implementation
    if asked_attention not in (None, "flash_attention_2", "sdpa", "eager"):
        raise InputError(f"--attn_implementation {asked_attention} is unknown: flash_attention_2, sdpa or eager")
    if asked_attention == "flash_attention_2" and not flash:
        reason = "an Ampere GPU or newer" if not ampere else "--bf16 or --fp16" if precision == "fp32" else "flash-attn"
        raise InputError(f"flash attention needs {reason}: use --attn_implementation sdpa, or install what is missing")
    args.attn_implementation = asked_attention or ("flash_attention_2" if flash else "sdpa")


def choose_deepspeed(namespace: dict):
    path = namespace["deepspeed"]
    if path in (None, "none"):
        namespace["deepspeed"] = None
        return
    try:
        namespace["deepspeed"] = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--deepspeed {path} can't be read: give a json file, or none") from None
    except ValueError as e:
        raise InputError(f"--deepspeed {path} is not valid JSON: {e}") from None
    if not torch.accelerator.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes a minute and a C++ compiler.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Data


class ConversationDataset(Dataset):
    """Encodes conversations when they are asked for, so that images are opened one micro-batch at a time."""

    def __init__(self, conversations: list[dict], processor: Phi3VProcessor, for_generation: bool = False):
        self.conversations = conversations
        self.processor = processor
        self.for_generation = for_generation

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, i):
        return encode_conversation(self.processor, self.conversations[i]["conversations"], self.for_generation)


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
    # fp16 keeps fp32 weights, which the optimizer updates, and computes in half precision; bf16 weights are bf16,
    # with their fp32 copy in DeepSpeed's optimizer.
    dtype = torch.bfloat16 if training_args.bf16 else torch.float32
    try:
        model = Phi3VForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=dtype, attn_implementation=args.attn_implementation
        )
    except OSError as e:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: {' '.join(str(e).split())}") from None
    if args.freeze_vision_model:
        model.model.vision_embed_tokens.requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Metric


def normalise(text: str) -> str:
    return text.strip().rstrip(".").lower()


def score(prediction: str, answers: list[str]) -> float:
    return float(normalise(prediction) in map(normalise, answers))


# shared: training
class RecipeTrainer(Trainer):
    """A Trainer that evaluates by generating answers."""

    def __init__(self, *, recipe: RecipeArguments, eval_conversations: list[dict], **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.eval_conversations = eval_conversations

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        report = self.report()
        metrics = {f"{metric_key_prefix}_{METRIC}": report[METRIC]}
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
            autocast_dtype=torch.float16 if self.args.fp16 else None,
            disable_tqdm=self.args.disable_tqdm,
        )
        rows = []
        for example, prediction in zip(self.eval_conversations, predictions, strict=True):
            answers = example.get("answers") or [example["conversations"][-1]["assistant"]]
            rows.append({"id": example["id"], "prediction": prediction, "answers": answers})
            rows[-1]["score"] = score(prediction, answers)
        mean = sum(row["score"] for row in rows) / len(rows)
        return {"metric": METRIC, METRIC: mean, "num_examples": len(rows), "predictions": rows}

    def write_report(self, name: str):
        report = self.report()
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{path}: {METRIC} {report[METRIC]:.4f} over {report['num_examples']} examples", flush=True)


def run(main):
    """Calls `main`; wrong input ends it with one line from rank 0 and status 2."""
    try:
        main()
    except InputError as e:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(20)  # rank 0 meets most errors too and reports them; torchrun then ends this process
        message = str(e).strip().splitlines()[-1].removeprefix("phi3v.conversations.InputError: ")
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Training


def main(argv: list[str] | None = None) -> RecipeTrainer:
    args, training_args = parse_arguments(argv)
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
    if not args.no_eval_before:
        trainer.write_report("eval_before.json")
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if resume == "auto" else resume)
    trainer.save_model()
    trainer.write_report("eval_after.json")
    return trainer


if __name__ == "__main__":
    run(main)
