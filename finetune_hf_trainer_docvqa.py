"""Fine-tune Phi-3.5-vision to answer questions about documents.

    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py                  # 1,000 questions
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --full_train     # several questions a page

    # Ampere or newer: bf16 and flash attention are the best settings
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16 --use_flash_attention --batch_size 64 \\
        --output_dir OUT --learning_rate 5e-6 --num_train_epochs 2
    # the settings of a published result: full, frozen, lora, qlora
    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --preset full --bf16 --output_dir OUT
    # V100: fp16, the default on a GPU
    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --batch_size 64
    # several nodes: the same on each, with --nnodes, --node_rank, --master_addr and --master_port
    # no data-centre GPU: adapters; on one gaming card, on a base in 4 bits
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --batch_size 64 --use_lora --use_qlora
    # a CPU, the small checkpoint of the demo, and its data
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --data_dir output/demo/data/docvqa \\
        --model_name_or_path demo/base_checkpoint --num_crops 3 --learning_rate 2e-3 --batch_size_per_gpu 8

The data are the Hub's nielsr/docvqa_1200_examples: a page, a question, and the answers that count as right. With
--full_train, training is on the configuration docvqa of HuggingFaceM4/the_cauldron, several questions a page. The
metric is ANLS: how near, by edit distance, an answer comes to the nearest right one.
"""

import math
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import deepspeed
import torch
from datasets import Image
from peft import LoraConfig
from rapidfuzz.distance import Levenshtein
from transformers import BitsAndBytesConfig, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.command_line import (
    check_flags,
    parse_flags,
    quiet_console,
    read_deepspeed_config,
    workers_per_process,
)
from phi3v.data.annotations import check_text
from phi3v.data.check import check_data
from phi3v.data.collate import PackingCollator
from phi3v.data.conversations import ConversationDataset
from phi3v.data.preview import render_example
from phi3v.data.sampler import sampler_for
from phi3v.data.sizes import Size, all_sizes, fingerprint
from phi3v.data.tables import ROW, TEXTS_ABOUT_IMAGES, Conversations, load_table, question_keys, without_seen_images
from phi3v.errors import InputError, blaming, exit_on_input_error
from phi3v.files import write_json
from phi3v.model.adapters import add_adapter, load_adapter
from phi3v.model.loading import base_and_adapter
from phi3v.ranks import join_after_restart
from phi3v.report.card import write_model_card
from phi3v.report.page import write_page
from phi3v.report.summary import describe_run, describe_sizes, questionable_settings
from phi3v.training.checkpoints import (
    FINISHED,
    Interrupted,
    Preemption,
    find_checkpoint,
    model_fingerprint,
    naming_full_disk,
    open_checkpoint,
    prepare_output,
    settings_of,
    tokens_to_fill,
)
from phi3v.training.evaluation import Evaluation
from phi3v.training.feature_cache import cache_features
from phi3v.training.hardware import DTYPES, choose_attention, choose_precision, precision_of
from phi3v.training.measuring import Estimate, Meter, device_memory, peak_flops
from phi3v.training.trainer import RecipeTrainer, finish_dry_run

METRIC = "anls"
# Settings of the published results, by --preset; precision and attention are the machine's, so flags of their own.
PUBLISHED = {"full_train": True, "batch_size": 64, "num_train_epochs": 2}
PRESETS = {
    "full": PUBLISHED | {"learning_rate": 5e-6},
    "frozen": PUBLISHED | {"learning_rate": 1e-4, "freeze_vision_model": True},
    "lora": PUBLISHED | {"learning_rate": 2e-4, "use_lora": True, "lora_rank": 32, "lora_alpha_ratio": 0.5},
    "qlora": PUBLISHED | {"learning_rate": 2e-4, "use_qlora": True, "lora_rank": 32, "lora_alpha_ratio": 0.5},
}


# ---------------------------------------------------------------------------------------------------------------
# Arguments: the recipe's here, the Trainer's own (--seed, --max_steps, --logging_steps, --report_to, …) beside them.


@dataclass
class RecipeArguments:
    # data
    data_dir: str | None = HfArg(
        default=None, help="folder with copies of docvqa_1200_examples and the_cauldron; default: the Hub"
    )
    full_train: bool = HfArg(default=False, help="train on all of the_cauldron's DocVQA, instead of 1,000 questions")
    eval_split: str = HfArg(default="test", help="split of docvqa_1200_examples to evaluate on")
    num_crops: int = HfArg(default=16, help="at most this many crops an image, 1 to 16: detail, and time")
    # shared: flags
    max_train_samples: int | None = HfArg(default=None, help="train on the first N examples only")
    max_eval_samples: int | None = HfArg(default=None, help="evaluate on the first N examples only")
    max_length: int | None = HfArg(
        default=None, help="refuse training examples of more tokens; default: the model's own limit"
    )
    truncate: bool = HfArg(
        default=False, help="cut off the end of too long ones, if all images and some of the answer stay"
    )
    on_bad_example: str = HfArg(
        default="error", help="error, or skip: train on no example whose images can't be read, and list them at the end"
    )
    check_data: bool = HfArg(
        default=False, help="decode every image, print a summary of the data, and end without training"
    )
    # model
    model_name_or_path: str = HfArg(
        default="microsoft/Phi-3.5-vision-instruct", help="a folder, or a repository on the Hub"
    )
    attn_implementation: str | None = HfArg(
        default=None, help="flash_attention_2, sdpa or eager; default: the best that is installed and the GPU can run"
    )
    use_flash_attention: bool = HfArg(default=False, help="short for --attn_implementation flash_attention_2")
    fp32: bool = HfArg(default=False, help="full precision; default: fp16 on a GPU, fp32 on a CPU")
    # what is trained
    freeze_vision_model: bool = HfArg(
        default=False, help="keep tower, projector and separators; the text embedding still trains"
    )
    train_projector: bool = HfArg(default=False, help="with --freeze_vision_model: train the projector all the same")
    use_lora: bool = HfArg(default=False, help="train adapters alone; needs no DeepSpeed")
    use_qlora: bool = HfArg(default=False, help="LoRA on a base in 4 bits (NF4): a third of the memory, slower")
    quantize_vision: bool = HfArg(
        default=False, help="with QLoRA: 4 bits for tower and projector too; saves 0.5 GB, costs accuracy"
    )
    lora_rank: int = HfArg(default=64, help="rank of the adapters")
    lora_alpha_ratio: float = HfArg(default=2.0, help="alpha as a multiple of the rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    use_dora: bool = HfArg(default=False, help="with LoRA: DoRA, often a bit better and slower")
    train_separators: bool = HfArg(
        default=False, help="with LoRA: train the separators between rows of crops and images too"
    )
    # optimisation
    batch_size: int = HfArg(default=16, help="examples an optimizer step, over all processes")
    batch_size_per_gpu: int = HfArg(
        default=1, help="micro-batch: examples a process handles at once; the rest is accumulated"
    )
    max_tokens_per_gpu: str | None = HfArg(
        default=None,
        help="in place of --batch_size_per_gpu: fill micro-batches with examples of up to so many tokens; auto: "
        "as many as are expected to fit",
    )
    share_images: bool = HfArg(
        default=True,
        help="questions about one image stand in one step, and read it once (default); drawn independently of "
        "one another, they may train a bit better, and slower",
    )
    cache_vision_features: str | None = HfArg(
        default=None,
        help="with --freeze_vision_model: folder in which to keep what the vision model gives for each image, "
        "for later epochs and runs. Only where reading it is measured to be faster than computing: 0.9 MB a crop",
    )
    cache_vision_gib: float = HfArg(default=100.0, help="the most that this folder may hold, in GiB")
    wd: float = HfArg(default=0.01, help="weight decay")
    vision_lr: float | None = HfArg(default=None, help="the tower's; default: --learning_rate")
    projector_lr: float | None = HfArg(
        default=None, help="the projector's and the separators'; default: --learning_rate"
    )
    # evaluation
    no_eval_before: bool = HfArg(default=False, help="skip the evaluation before training")
    max_new_tokens: int = HfArg(default=64, help="longest answer in tokens")
    evaluate_only: bool = HfArg(
        default=False, help="evaluate --model_name_or_path, which may be a run's output with an adapter, and end"
    )
    keep_best: bool = HfArg(
        default=False, help="with --eval_steps: keep the model that has evaluated best, in OUTPUT_DIR/best"
    )
    # the run
    preset: str | None = HfArg(
        default=None, help="settings of a published result, full, frozen, lora or qlora; flags given beside it win"
    )
    dry_run: bool = HfArg(
        default=False, help="try everything in OUTPUT_DIR/dry_run: two steps, four evaluations, saving, loading again"
    )
    estimate: bool = HfArg(
        default=False, help="print FLOPs, memory and time that a run takes, and end without loading weights"
    )
    estimate_gpus: int | None = HfArg(
        default=None, help="with --estimate: for so many GPUs; default: as many as there are processes"
    )
    resume_anyway: bool = HfArg(
        default=False, help="with --resume_from_checkpoint: go on although settings or data have changed"
    )
    no_tqdm: bool = HfArg(default=False, help="no progress bars")
    _groups = {  # the first flag of each part of --help
        "data_dir": "data",
        "model_name_or_path": "model",
        "freeze_vision_model": "what is trained",
        "batch_size": "optimisation",
        "no_eval_before": "evaluation",
        "preset": "the run",
    }
    # end shared


# shared: arguments
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
    "dataloader_num_workers": workers_per_process(),
    "dataloader_prefetch_factor": 4,  # micro-batches a worker: uint8 crops are small, and images differ much in size
    "per_device_eval_batch_size": 8,
    "activation_checkpointing": None,  # as memory needs it
    "ddp_timeout": 7200,  # seconds: the other processes wait while the first one downloads data and looks through it
    "logging_nan_inf_filter": False,  # it waits for the device at every micro-batch, and hides what went wrong
    "ddp_find_unused_parameters": False,  # none is unused: see Phi3VModel._needs_vision_graph
}


def parse_arguments(argv: list[str] | None = None) -> tuple[RecipeArguments, TrainingArguments]:
    """Reads and checks all flags; raises InputError before anything is loaded."""
    args, trainer, given = parse_flags(RecipeArguments, TRAINER_DEFAULTS, PRESETS, __doc__.splitlines()[0], argv)
    args.use_lora |= args.use_qlora
    if "deepspeed" not in given and not args.use_lora and not args.evaluate_only:
        trainer["deepspeed"] = Path(__file__).resolve().parent / "ds_config" / "zero2.json"
    trainer["deepspeed"] = read_deepspeed_config(trainer["deepspeed"])
    restarted = join_after_restart(trainer["ddp_timeout"]) and not (args.evaluate_only or args.dry_run)
    if restarted and find_checkpoint("auto", Path(trainer["output_dir"]))[0]:
        trainer["resume_from_checkpoint"] = "auto"  # and not the one that the first attempt may have started from
    accumulation = check_flags(args, trainer, given)
    elsewhere = args.estimate and not torch.accelerator.is_available()  # for a GPU, wherever it is
    precision = choose_precision(trainer["bf16"], trainer["fp16"], args.fp32, elsewhere)
    args.attn_implementation = choose_attention(
        args.attn_implementation, args.use_flash_attention, precision, elsewhere
    )
    trainer.update(
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=accumulation,
        weight_decay=args.wd,
        disable_tqdm=args.no_tqdm,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps" if "save_steps" in given else "no",
        eval_strategy="steps" if "eval_steps" in given else "no",
    )
    if not trainer["dataloader_num_workers"]:
        trainer["dataloader_prefetch_factor"] = None
    try:
        return args, TrainingArguments(**trainer)
    except (ValueError, TypeError) as e:
        raise InputError(" ".join(str(e).split())) from None


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Data


def load_data(args: RecipeArguments) -> tuple[Conversations, Conversations]:
    """Training and evaluation conversations: one for each question about a page."""
    mini, columns = "nielsr/docvqa_1200_examples", {"image": Image, "query": {"en": str}, "answers": [str], "id": str}
    evaluation = load_table(mini, None, args.eval_split, args.data_dir, columns)
    if args.full_train:
        train = load_table("HuggingFaceM4/the_cauldron", "docvqa", "train", args.data_dir, TEXTS_ABOUT_IMAGES)
        return cauldron_questions(without_seen_images(train, evaluation)), questions(evaluation)
    train = load_table(mini, None, "train", args.data_dir, columns)
    return questions(without_seen_images(train, evaluation)), questions(evaluation)


def prompt(question: str) -> str:
    return f"{question}\nAnswer briefly."


def questions(table) -> Conversations:
    """Of docvqa_1200_examples: trained on is the first of the answers, evaluation takes all of them."""
    for row, query, answers in zip(table[ROW], table["query"], table["answers"], strict=True):
        check_text(query and query["en"], f"docvqa_1200_examples row {row}: query.en")
        if not answers:
            raise InputError(f"docvqa_1200_examples row {row}: answers is empty")
        for item, answer in enumerate(answers):
            check_text(answer, f"docvqa_1200_examples row {row}: answers[{item}]")

    def build(content, item):
        answers = content["answers"]
        turn = {"images": [content["image"]], "user": prompt(content["query"]["en"]), "assistant": answers[0]}
        return {"id": content["id"], "conversations": [turn], "answers": answers}

    return Conversations(table, [(i, 0) for i in range(len(table))], build)


def cauldron_questions(table) -> Conversations:
    """Of the_cauldron: its questions end with a line of their own on how to answer, in place of which evaluation's
    stands here, so that training and evaluation ask alike."""

    def build(content, item):
        text = content["texts"][item]
        question = text["user"].strip().splitlines()[0]
        turn = {"images": content["images"], "user": prompt(question), "assistant": text["assistant"]}
        return {"id": f"{content[ROW]}-{item}", "conversations": [turn]}

    return Conversations(table, question_keys(table, "the_cauldron (docvqa)"), build)


# ---------------------------------------------------------------------------------------------------------------
# Model and what of it trains


# shared: model
def load_model(args: RecipeArguments, training_args: TrainingArguments, without_weights: bool = False):
    """The model with just those parameters trainable that the flags say, on the meta device if `without_weights`; with
    --evaluate_only a tuned one as it was saved."""
    # DeepSpeed keeps an fp32 copy of half-precision weights in its optimizer, and adapters are fp32 on a frozen base.
    # Elsewhere the weights that the optimizer updates are fp32, and autocast computes in half precision.
    in_half = training_args.deepspeed or args.use_lora or args.evaluate_only
    dtype = compute_dtype(training_args) if in_half else torch.float32
    name, adapter = base_and_adapter(args.model_name_or_path) if args.evaluate_only else (args.model_name_or_path, None)
    if without_weights:
        config = Phi3VConfig.from_pretrained(args.model_name_or_path)
        config._attn_implementation = args.attn_implementation
        with torch.device("meta"):
            return choose_trained(Phi3VForCausalLM(config).to(dtype), args)
    if is_deepspeed_zero3_enabled():
        deepspeed.init_distributed()  # parameters are split while they load, before the Trainer has DeepSpeed start
    quantization = None
    if args.use_qlora:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=not_quantized(args),
        )
    model, info = Phi3VForCausalLM.from_pretrained(
        name,
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        quantization_config=quantization,
        device_map={"": training_args.device} if args.use_qlora else None,
    )
    if info["missing_keys"]:
        raise InputError(f"--model_name_or_path {name} lacks {', '.join(info['missing_keys'])[:200]}")
    if args.evaluate_only:
        return load_adapter(model, adapter) if adapter else model
    return choose_trained(model, args)


def not_quantized(args: RecipeArguments) -> list[str]:
    return ["lm_head"] + ([] if args.quantize_vision else [".*vision_embed_tokens"])


def choose_trained(model: Phi3VForCausalLM, args: RecipeArguments):
    vision = model.model.vision_embed_tokens
    if args.use_lora:
        targets = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        if not args.freeze_vision_model:
            used = "|".join(map(str, range(len(vision.img_processor.vision_model.encoder.layers) - 1)))
            tower = (
                rf"img_processor\.vision_model\.encoder\.layers\.({used})\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
            )
            targets += rf"|model\.vision_embed_tokens\.({tower}|img_projection\.[02])"
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha_ratio * args.lora_rank,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
        return add_adapter(model, config, args.train_separators)
    if args.freeze_vision_model:
        vision.requires_grad_(False)
        vision.img_projection.requires_grad_(args.train_projector)
    return model


def compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    return DTYPES[precision_of(training_args)]


# end shared


# ---------------------------------------------------------------------------------------------------------------
# Metric


ANLS_THRESHOLD = 0.5


def normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def score(prediction: str, answers: list[str]) -> float:
    """ANLS of one question: 1 - d for the nearest answer, where d is the edit distance divided by the length of the
    longer text, and 0 where d is not below the threshold (Biten et al., Scene Text Visual Question Answering, 2019)."""
    distances = [Levenshtein.normalized_distance(normalise(prediction), normalise(answer)) for answer in answers]
    return 1 - min(distances) if min(distances) < ANLS_THRESHOLD else 0.0


# ---------------------------------------------------------------------------------------------------------------
# Training


# shared: training
def estimate_run(args: RecipeArguments, training_args: TrainingArguments, sizes: list[Size]) -> Estimate:
    """What training takes, computed from a model without weights."""
    with blaming("model_name_or_path", args.model_name_or_path):
        outline = load_model(args, training_args, without_weights=True)
    return Estimate(
        outline,
        sizes,
        args.estimate_gpus or training_args.world_size,
        compute_dtype(training_args).itemsize,
        training_args.deepspeed,
        not_quantized(args) if args.use_qlora else None,
        on_gpu=args.estimate or torch.accelerator.is_available(),
    )


def main(argv: list[str] | None = None) -> RecipeTrainer | None:
    args, training_args = parse_arguments(argv)
    quiet_console(args.no_tqdm)
    preemption = Preemption()
    output_dir, is_first = Path(training_args.output_dir), training_args.process_index == 0
    resume, stored = open_checkpoint(args, training_args)
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="data"):  # one process fills caches, the others read them
        train, evaluation = load_data(args)
    train, evaluation = train[: args.max_train_samples], evaluation[: args.max_eval_samples]
    with blaming("model_name_or_path", args.model_name_or_path):
        processor = Phi3VProcessor.from_pretrained(args.model_name_or_path, num_crops=args.num_crops)
        base = base_and_adapter(args.model_name_or_path)[0] if args.evaluate_only else args.model_name_or_path
        longest = Phi3VConfig.from_pretrained(base).max_position_embeddings
    limit, skip_bad, no_bars = args.max_length or longest, args.on_bad_example == "skip", training_args.disable_tqdm
    if args.check_data:
        if is_first:
            check_data(train, evaluation, processor, limit, training_args.dataloader_num_workers, no_bars)
        return None
    eval_dataset = ConversationDataset(
        evaluation, processor, for_generation=True, max_length=longest, skip_bad=skip_bad
    )
    evaluate = Evaluation(
        processor, eval_dataset, evaluation, METRIC, score, args.max_new_tokens, compute_dtype(training_args)
    )
    if args.evaluate_only:
        with blaming("model_name_or_path", args.model_name_or_path):
            model = load_model(args, training_args)
        report = evaluate.write(model, training_args, preemption.check)
        if is_first:
            about = {"model": args.model_name_or_path}
            write_page(training_args, None, report, about, evaluate.example, name="evaluation.html")
        return None
    train_dataset = ConversationDataset(train, processor, max_length=limit, truncate=args.truncate, skip_bad=skip_bad)
    sizes = all_sizes(train_dataset, "measuring examples", no_bars)
    all_sizes(eval_dataset, "measuring evaluation examples", no_bars)  # fails now, or never
    if args.dry_run:  # with what takes most memory
        train_dataset.keep_largest(2 * args.batch_size)
        sizes = train_dataset.sizes

    estimate = estimate_run(args, training_args, sizes)
    plan = estimate.plan(
        args.batch_size,
        args.batch_size_per_gpu,
        tokens_to_fill(args.max_tokens_per_gpu, resume, stored),
        {None: None, True: "all", False: "none"}[training_args.activation_checkpointing],
        device_memory(),
    )
    if args.estimate:
        if is_first:
            print(estimate.describe(plan.load, training_args.num_train_epochs))
        return None
    # To rounding, features depend on what they are computed with, so a run goes on with them as it began.
    cached = stored.get("cached", False) if args.cache_vision_features else False
    settings = settings_of(
        args,
        training_args,
        tokens=plan.tokens,
        data=fingerprint(sizes),
        model=model_fingerprint(args.model_name_or_path),
        cached=cached,
    )
    if not prepare_output(training_args, settings, resume, args.resume_anyway, *estimate.saved_bytes(args.use_lora)):
        return None
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(training_args.num_train_epochs * math.ceil(len(sizes) / args.batch_size))
    sampler = sampler_for(
        train_dataset,
        sizes,
        args.batch_size,
        examples_per_gpu=args.batch_size_per_gpu,
        max_tokens=plan.tokens,
        share_images=args.share_images,
        seed=training_args.seed,
        epochs=math.ceil(steps / math.ceil(len(sizes) / args.batch_size)),
        rank=training_args.process_index,
        world_size=training_args.world_size,
    )
    training_args = replace(
        training_args,
        gradient_accumulation_steps=sampler.accumulation,
        activation_checkpointing=plan.checkpointing != "none",
    )
    with blaming("model_name_or_path", args.model_name_or_path):
        model = load_model(args, training_args)
    next(m for m in model.modules() if isinstance(m, Phi3VForCausalLM)).checkpoint_tower = plan.checkpointing == "all"
    peak, source = peak_flops(compute_dtype(training_args))
    with blaming("report_to", training_args.report_to):
        trainer = RecipeTrainer(
            model=model,
            args=training_args,
            evaluation=evaluate,
            sampler=sampler,
            preemption=preemption,
            settings=settings,
            meter=Meter(estimate.costs[plan.checkpointing], peak),
            vision_lr=args.vision_lr,
            projector_lr=args.projector_lr,
            separators=args.train_separators,
            keep_best=args.keep_best,
            data_collator=PackingCollator(
                processor,
                model.config.original_max_position_embeddings,
                args.share_images and args.attn_implementation != "flash_attention_2",
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
        )
    about = {"memory": str(plan), "data": describe_sizes(sizes, len(evaluation))}
    if is_first:
        print(render_example(train_dataset))
        told = {"precision": precision_of(training_args), "max_tokens": plan.tokens}
        told |= {"steps": steps, "n_parameters": estimate.parameters}
        print(describe_run(model, args, training_args, about, **told))
        print(f"MFU        of {peak / 1e12:.3g} TFLOP/s, {source}")
        for warning in questionable_settings(args, training_args, estimate.parameters, sizes, steps):
            print(warning, flush=True)
    if args.cache_vision_features:
        message = cache_features(
            model,
            train_dataset,
            args.cache_vision_features,
            args.cache_vision_gib * 2**30,
            training_args.device,
            compute_dtype(training_args),
            training_args.dataloader_num_workers,
            no_bars,
            decided=stored.get("cached"),
            is_stopped=preemption.has_signal,
        )
        settings["cached"] = train_dataset.features is not None
        if is_first:
            print(message, flush=True)

    before = None if args.no_eval_before else trainer.report("eval_before.json")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        if is_first:
            write_page(training_args, before, None, about, evaluate.example, trainer.state)
    if preemption.stopped:
        if is_first:
            print(f"stopped by a signal at step {trainer.state.global_step}, with a checkpoint", flush=True)
        raise Interrupted
    if not args.use_lora:
        model.to(compute_dtype(training_args))  # what is evaluated is what is saved
    with naming_full_disk(output_dir):
        trainer.save_model()
    after = trainer.report("eval_after.json", before)
    trainer.trackers.close()
    skipped = trainer.health.skipped()
    if is_first:
        if trainer.state.global_step >= trainer.state.max_steps:
            write_json(output_dir / FINISHED, settings)
        if skipped:
            print(f"{len(skipped)} examples were left out, as --on_bad_example skip says:", *skipped, sep="\n  ")
        write_page(training_args, before, after, about, evaluate.example, trainer.state)
        about |= {"steps": trainer.state.global_step, "epochs": f"{trainer.state.epoch:.3g}"}
        write_model_card(args, training_args, about, before, after, precision_of(training_args))
        change = " -> ".join(f"{report[METRIC]:.4f}" for report in (before, after) if report)
        where = "" if args.dry_run else f"; the model, its processor and report.html are in {output_dir}"
        print(f"{METRIC} {change}{where}", flush=True)
    if args.dry_run:
        saved = replace(args, evaluate_only=True, model_name_or_path=str(output_dir))
        del model  # that of the trainer is let go there
        finish_dry_run(trainer, after, lambda: load_model(saved, replace(training_args, deepspeed=None)))
    return trainer


# end shared


if __name__ == "__main__":
    exit_on_input_error(main)
