"""Fine-tune Phi-3.5-vision to name what happens in a video, or on any conversations with images.

    python convert_ucf101.py --out_dir DATA
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA

    # Ampere or newer: bf16 and flash attention are the best settings
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir DATA --bf16 --use_flash_attention
    # the language model alone learns: less memory, faster
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir DATA --freeze_vision_model
    # no data-centre GPU: adapters; on one gaming card, adapters on a base in 4 bits
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py --data_dir DATA --use_lora --learning_rate 2e-4
    torchrun --nproc_per_node=1 finetune_hf_trainer_ucf101.py --data_dir DATA --use_qlora --learning_rate 2e-4
    # a CPU: the demo's small checkpoint and its data (`make demo` makes them)
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py --data_dir output/demo/data/ucf101 \\
        --model_name_or_path demo/base_checkpoint --num_crops 1 --learning_rate 2e-3 --batch_size_per_gpu 8

On several nodes, start the same command on each, with --nnodes, --node_rank, --master_addr and --master_port.

Data: DATA holds `ucf101_train.jsonl`, `ucf101_val.jsonl` and `images/`. A line of jsonl is one conversation:
    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/BabyCrawling/v_BabyCrawling_g21_c04.0.jpg", …], "user": "Classify the video …",
         "assistant": "BabyCrawling"}]}
A conversation has one turn or several, each with images or none, and may have a "system" text. `<image>` in a user's
text is the place of an image inside of it. Training learns all answers of a conversation, except those of turns with
"train": false, or with --loss_on last the last one; evaluation asks for the last one. Metric: accuracy, the share of
exact matches.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

# shared: ctrl-c. A block between "shared" and "end shared" is the same in every script that has it: edit it in
# finetune_hf_trainer_docvqa.py and run `make shared`. To let one script differ, delete its two marker lines.
if __name__ == "__main__":  # While the libraries load, a signal ends the process with one line, and as a stopped run.

    def leave(number, _):
        if os.environ.get("RANK", "0") == "0":
            name = "\n" * os.isatty(2) + signal.Signals(number).name  # a terminal has shown ^C
            os.write(2, f"{name}: leaving at once, because there is nothing to save yet\n".encode())
        os._exit(75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, leave)
# end shared

# First, because they say in one line if an installed package is too old for the others, and load those quickly.
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.run import Run

# isort: split
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from phi3v.arguments import RunArguments, parse_arguments
from phi3v.data.annotations import StoredConversations, store_conversations
from phi3v.data.collate import PackingCollator
from phi3v.data.once_per_node import load_once_per_node
from phi3v.data.split import warn_of_shared_images
from phi3v.errors import BadExamples, InputError, blaming, exit_on_input_error
from phi3v.model.adapters import add_adapter, continue_adapter
from phi3v.model.loading import check_complete, nf4_config
from phi3v.model.vision_parts import train_vision_alone
from phi3v.training.evaluation import Evaluation
from phi3v.training.hardware import compute_dtype, weights_dtype
from phi3v.training.trainer import RecipeTrainer

METRIC = "accuracy"
PRESETS = {}  # no result of this task has been published


# ---- Flags ----------------------------------------------------------------------------------------------------
# RunArguments adds flags of the library (--check_data, --estimate, …), the Trainer its own (--seed, --max_steps, …).


@dataclass
class RecipeArguments(RunArguments):
    data_dir: str = HfArg(help="folder with ucf101_train.jsonl, ucf101_val.jsonl and images/")
    eval_split: str = HfArg(default="val", help="evaluate on DATA_DIR/ucf101_SPLIT.jsonl")
    follow_links: bool = HfArg(default=False, help="use images behind links that lead out of DATA_DIR/images")
    literal_tags: bool = HfArg(default=False, help="allow tags such as <video> and <image> in texts, as plain text")
    num_crops: int = HfArg(default=4, help="at most this many crops per image, 1 to 16; video frames need few")
    # shared: flags
    max_train_samples: int | None = HfArg(default=None, help="train on the first N examples only")
    max_eval_samples: int | None = HfArg(default=None, help="evaluate on the first N examples only")
    model_name_or_path: str = HfArg(default="microsoft/Phi-3.5-vision-instruct", help="a folder, or a name on the Hub")
    freeze_vision_model: bool = HfArg(default=False, help="freeze tower, projector and separators")
    train_projector: bool = HfArg(default=False, help="with --freeze_vision_model: train the projector nevertheless")
    use_lora: bool = HfArg(default=False, help="train adapters; needs no DeepSpeed")
    use_qlora: bool = HfArg(default=False, help="--use_lora on a base in 4 bits (NF4): a third of the memory, slower")
    quantize_vision: bool = HfArg(default=False, help="with QLoRA: vision model in 4 bits too; less accurate")
    lora_rank: int = HfArg(default=64, help="rank of the adapters")
    lora_alpha_ratio: float = HfArg(default=2.0, help="alpha as a multiple of the rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    use_dora: bool = HfArg(default=False, help="with LoRA: DoRA, often a bit better, and slower")
    train_separators: bool = HfArg(default=False, help="with LoRA: train the separators of crop rows and images too")
    vision_training: str = HfArg(
        default="default",
        help="all, tower or projector: train that part of the vision model fully; the language model has adapters with "
        "--use_lora and is frozen without; default: as the other flags say",
    )
    batch_size: int = HfArg(default=16, help="examples per optimizer step, over all processes")
    batch_size_per_gpu: int = HfArg(default=1, help="examples in a micro-batch; default: 1; on a GPU as many as fit")
    wd: float = HfArg(default=0.01, help="weight decay")
    vision_lr: float | None = HfArg(default=None, help="learning rate of the tower; default: --learning_rate")
    projector_lr: float | None = HfArg(default=None, help="for projector and separators; default: --learning_rate")
    no_eval_before: bool = HfArg(default=False, help="skip the evaluation before training")
    max_new_tokens: int = HfArg(default=64, help="longest answer in tokens")
    _groups = {  # the first flag under each title of --help
        "data_dir": "data",
        "model_name_or_path": "model",
        "freeze_vision_model": "what is trained",
        "batch_size": "optimisation",
        "no_eval_before": "evaluation",
    }


TRAINING = {  # the recipe's settings where they differ from the Trainer's own
    "output_dir": "./output/",
    "num_train_epochs": 1,
    "learning_rate": 4e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,  # below 1, a share of all steps; the published 50 steps are too many for short runs
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "deepspeed": str(Path(__file__).resolve().parent / "ds_config" / "zero2.json"),  # adapters train without DeepSpeed
}
# end shared


# ---- Data -----------------------------------------------------------------------------------------------------


def load_data(args: RecipeArguments, bad: BadExamples | None = None) -> tuple[StoredConversations, StoredConversations]:
    """Conversations to train on and to evaluate on. The test split is meant for a last --evaluate_only."""
    folder = Path(args.data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder} is not a folder: give one that a converter has made")

    splits = sorted(path.stem.removeprefix("ucf101_") for path in folder.glob("ucf101_*.jsonl"))
    if "train" in splits and args.eval_split not in splits:
        raise InputError(f"--eval_split {args.eval_split}: {folder} has only the splits {', '.join(splits)}")

    def load(split: str, loss_on: str | None = None) -> StoredConversations:
        path, images = folder / f"ucf101_{split}.jsonl", folder / "images"
        return store_conversations(path, images, bad, args.follow_links, args.literal_tags, loss_on)

    train, held_out = load("train", args.loss_on), load(args.eval_split)
    warn_of_shared_images(train, held_out)
    return train, held_out


# ---- Model, and which parts of it train -----------------------------------------------------------------------


# shared: model
def load_model(args: RecipeArguments, training_args: TrainingArguments):
    """The model to train, on the CPU; with QLoRA on the device, in 4 bits."""
    dtype = weights_dtype(training_args, args.use_lora)
    quantization = nf4_config(dtype, args.quantize_vision) if args.use_qlora else None
    with blaming("model_name_or_path", args.model_name_or_path):
        model, loading_info = Phi3VForCausalLM.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            quantization_config=quantization,
            device_map={"": training_args.device} if quantization else None,
            use_safetensors=True,  # never unpickles
            output_loading_info=True,
        )
        check_complete(loading_info, f"--model_name_or_path {args.model_name_or_path}")
        return choose_trained(model, args)


def choose_trained(model: Phi3VForCausalLM, args: RecipeArguments):
    """Freezes the parts of the model that the flags leave out, or freezes all of it and adds adapters."""
    vision = model.model.vision_embed_tokens
    if args.adapter_folder:  # of --adapter, which says what trains
        return continue_adapter(model, args.adapter_folder, args.model_revision)
    if args.use_lora:
        targets = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        if not args.freeze_vision_model and args.vision_training == "default":
            # The tower's last layer is never run: features come from the one before.
            used = "|".join(str(i) for i in range(len(vision.img_processor.vision_model.encoder.layers) - 1))
            layers = rf"img_processor\.vision_model\.encoder\.layers\.({used})"
            tower = rf"{layers}\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
            targets += rf"|model\.vision_embed_tokens\.({tower}|img_projection\.[02])"
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha_ratio * args.lora_rank,
            lora_dropout=args.lora_dropout,
            revision=args.model_revision,  # of the base
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
        return add_adapter(model, config, args.train_separators, args.vision_training)
    if args.vision_training != "default":
        return train_vision_alone(model, args.vision_training)
    if args.freeze_vision_model:
        vision.requires_grad_(False)
        vision.img_projection.requires_grad_(args.train_projector)
    return model


# end shared


# ---- Metric ---------------------------------------------------------------------------------------------------


# shared: score. The scripts with exact match have it.
def normalise(text: str) -> str:
    return text.strip().rstrip(".").lower()


def score(prediction: str, answers: list[str]) -> float:
    """1 for an answer that is right except for case, surrounding blanks and a final full stop, else 0."""
    return float(normalise(prediction) in map(normalise, answers))


# end shared


# ---- Training -------------------------------------------------------------------------------------------------


# shared: training
def main(argv: list[str] | None = None) -> RecipeTrainer | None:
    args, training_args = parse_arguments(RecipeArguments, TRAINING, PRESETS, __doc__, argv)
    run = Run(args, training_args, choose_trained)  # output folder, model, checkpoint to resume from, signals, seed

    train, held_out = load_once_per_node(load_data, args, run.bad_examples)  # one process of each node reads first
    train, held_out = train[: args.max_train_samples], held_out[: args.max_eval_samples]
    with blaming("model_name_or_path", args.model_name_or_path):
        processor = Phi3VProcessor.from_pretrained(run.saved.folder, args.num_crops, args.exif_rotate)
    if args.check_data:
        return run.check_data(train, held_out, processor)
    eval_dataset = run.dataset(held_out, processor, for_generation=True)
    evaluation = Evaluation(eval_dataset, METRIC, score, args.max_new_tokens, compute_dtype(training_args))
    if args.evaluate_only:
        return run.evaluate_only(evaluation)

    train_dataset = run.dataset(train, processor)
    training_args = run.prepare(train_dataset, eval_dataset)  # with accumulation planned
    if training_args is None:  # after --estimate, or if the run is finished already
        return None
    trainer = RecipeTrainer(
        model=load_model(args, training_args),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PackingCollator(processor, run.config.original_max_position_embeddings, run.shares_images),
        processing_class=processor,
        evaluation=evaluation,
        vision_lr=args.vision_lr,
        projector_lr=args.projector_lr,
        keep_best=args.keep_best,
        run=run,
    )
    run.begin(trainer)  # prints the plan and one example

    before = None if args.no_eval_before else trainer.evaluate_and_save("eval_before.json")
    with run.recorded(trainer, before):  # writes report.html, however training ends
        trainer.train(resume_from_checkpoint=run.checkpoint)
    run.save(trainer)
    after = trainer.evaluate_and_save("eval_after.json", before)
    run.finish(trainer, before, after)
    return trainer


# end shared


if __name__ == "__main__":
    exit_on_input_error(main)
