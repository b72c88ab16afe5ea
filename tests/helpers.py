"""What several test files use: paths, flags of small trainings, data to train on, and starting processes."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import load_file
from two_ranks import LAUNCH_TWO_RANKS

from phi3v.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "demo" / "base_checkpoint"
GOLDEN = ROOT / "tests" / "golden"

# ---- Flags of small trainings

BASE = ["--model_name_or_path", str(CHECKPOINT), "--no-tqdm", "--dataloader_num_workers", "0"]
COMMON = [*BASE, "--num_crops", "4", "--max_new_tokens", "8", "--report_to", "none", "--logging_steps", "1"]
SIX_STEPS = "--optim sgd --learning_rate 0.05 --lr_scheduler_type constant --warmup_steps 0 --wd 0".split()
SIX_STEPS += "--max_grad_norm 0 --max_steps 6 --batch_size 4 --no_eval_before".split()
SHORT = "--max_steps 2 --batch_size 4 --learning_rate 1e-3 --deepspeed none".split()
# Enough steps at a high rate, so that the answers are no longer those of the base.
FAR = "--max_steps 12 --batch_size 4 --learning_rate 5e-3 --warmup_steps 0 --deepspeed none".split()
SAVED_MODES = {
    "full": [],
    "lora": ["--use_lora"],
    "separators": ["--use_lora", "--train_separators"],
    "qlora": ["--use_qlora"],
    "whole vision": ["--use_lora", "--vision_training", "all", "--vision_lr", "2e-3", "--projector_lr", "2e-3"],
}

# A training of 12 steps with a checkpoint every 2 steps. The 24 examples make 6 steps an epoch, so checkpoint-8 is in
# the middle of the second epoch.
RESUMABLE = [*BASE, "--num_crops", "2", "--max_new_tokens", "2", "--max_eval_samples", "2", "--no_eval_before"]
RESUMABLE += "--batch_size 4 --learning_rate 1e-3 --num_train_epochs 2 --save_steps 2 --logging_steps 1".split()
RESUMABLE_MODES = {
    "full": ["--deepspeed", "none", "--batch_size_per_gpu", "2"],
    "full, by tokens": ["--deepspeed", "none", "--max_tokens_per_gpu", "700"],
    "frozen, no sharing": ["--deepspeed", "none", "--freeze_vision_model", "--no_share_images"],
    "lora": ["--use_lora", "--lora_rank", "4", "--lora_dropout", "0.1", "--train_separators"],
    "qlora": ["--use_lora", "--use_qlora", "--lora_rank", "4", "--batch_size_per_gpu", "4"],
    "lora, whole vision": ["--use_lora", "--vision_training", "all", "--batch_size_per_gpu", "4"],
}

# The modes of training, each with all of its parameters looked at.
MODES = {
    "full": "",
    "frozen": "--freeze_vision_model",
    "frozen, projector trains": "--freeze_vision_model --train_projector",
    "lora": "--use_lora --lora_rank 4",
    "lora, frozen": "--use_lora --lora_rank 4 --freeze_vision_model",
    "dora": "--use_lora --lora_rank 4 --use_dora --train_separators",
    "qlora": "--use_qlora --lora_rank 4",
    "qlora, all in 4 bits": "--use_qlora --lora_rank 4 --quantize_vision",
    "vision alone": "--vision_training all",
    "tower alone": "--vision_training tower",
    "projector alone": "--vision_training projector",
    "lora, whole vision": "--use_lora --lora_rank 4 --vision_training all",
    "lora, whole projector": "--use_lora --lora_rank 4 --vision_training projector --train_separators",
    "qlora, whole tower": "--use_qlora --lora_rank 4 --vision_training tower",
}
MODES_COMMON = [*BASE, "--num_crops", "4", "--deepspeed", "none", "--max_new_tokens", "4", "--max_eval_samples", "2"]


def answers_of(path: Path) -> dict:
    """A report of an evaluation, without the loss, which only evaluations of some runs have."""
    return {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("loss")}


def parse_command(script, argv: list[str]):
    """The flags of a script and its TrainingArguments, as its `main` gets them."""
    return parse_arguments(script.RecipeArguments, script.TRAINING, script.PRESETS, script.__doc__, argv)


def arguments(data, out, *flags, common=COMMON) -> list[str]:
    """The command line of a small training on `data` with its output in `out`."""
    return ["--data_dir", str(data), "--output_dir", str(out), *common, *map(str, flags)]


def arguments_of_mode(mode, data, out) -> list[str]:
    return arguments(data, out, *MODES[mode].split(), common=MODES_COMMON)


def train(data, out, *flags, common=COMMON):
    """Trains in this process and returns the trainer."""
    import finetune_hf_trainer_ucf101 as script

    return script.main(arguments(data, out, *flags, common=common))


def train_resumable(data, out, *flags):
    return train(data, out, *flags, common=RESUMABLE)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_losses(data, out, *flags) -> list[float]:
    """Trains in this process and returns the loss of every step."""
    return losses_of(train(data, out, *flags))


def copy_up_to_checkpoint(source: Path, target: Path, step: int):
    """Copies the output folder of a finished run, and makes it what it was when checkpoint-`step` was the newest."""
    shutil.copytree(source, target)
    (target / "finished.json").unlink()
    for path in target.glob("*.safetensors"):
        path.unlink()
    for path in target.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


def digest_of_weights(out: Path) -> str:
    """Equal for output folders with the same weights, to the bit."""
    files = sorted(out.glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def assert_same_run(losses, out: Path, one_process):
    """Compares the losses and the saved weights of a training with those of the fixture `one_process`."""
    expected_losses, expected = one_process
    assert len(losses) == 6 and losses == pytest.approx(expected_losses, rel=1e-5)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


# ---- Processes


def environment(**more) -> dict[str, str]:
    """The environment of a process that a test starts, without the variables that trainings in this process set."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("ACCELERATE_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(program, *flags) -> subprocess.CompletedProcess:
    """Runs a program on two ranks and waits for its end."""
    command = [sys.executable, *LAUNCH_TWO_RANKS, str(program), *map(str, flags)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)


def start_training(program, *flags, group=None, **variables) -> subprocess.Popen:
    """program: arguments of Python before the script's name. group: of processes, 0 for one of its own.
    variables: added to the environment."""
    command = [sys.executable, *program, ROOT / "finetune_hf_trainer_ucf101.py", *RESUMABLE, *flags]
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=group,
    )


def wait_for_checkpoint(process: subprocess.Popen, out: Path):
    end = time.monotonic() + 900
    while not any(out.glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.005)


# ---- Data


def write_toy_data(folder: Path, n_train: int = 24, n_val: int = 6):
    """A small data set in the conversation format, the same on every call. Its conversations have one to three turns,
    and turns have none, one or two images of different sizes."""
    rng = random.Random(0)
    for split, n in (("train", n_train), ("val", n_val)):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(n):
            turns = []
            for turn in range(1 + i % 3):
                names = []
                for k in range((i + turn) % 3):  # none, one or two
                    names.append(f"{split}/{i}.{turn}.{k}.png")
                    size, grey = (rng.randint(20, 200), rng.randint(20, 200)), rng.randint(0, 255)
                    Image.new("RGB", size, (grey, 40, 200)).save(folder / "images" / names[-1])
                answer = " ".join(rng.choice(("yes", "no", "True", "SlideUp")) for _ in range(rng.randint(1, 7)))
                turns.append({"images": names, "user": "Where is it? " * rng.randint(1, 9), "assistant": answer})
            lines.append(json.dumps({"id": f"{split}-{i}", "source": "toy", "conversations": turns}))
        (folder / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# Conversations in the format of jsonl, and the prompts that they are, written by hand. A prompt is cut into pieces:
# (text, number of the answer that it is if that can be learned, or None).
WRITTEN = [
    (
        {"system": "Be brief.", "conversations": [
            {"images": ["a.png", "b.png"], "user": "1: <image> 2: <image> Which?", "assistant": "2", "train": False},
            {"images": [], "user": "Why?", "assistant": "no"}]},
        [("<|system|>\nBe brief.<|end|>\n<|user|>\n1: <|image_1|> 2: <|image_2|> Which?<|end|>\n<|assistant|>\n", None),
         ("2<|end|>\n", None), ("<|user|>\nWhy?<|end|>\n<|assistant|>\n", None), ("no<|end|>\n<|endoftext|>", 2)],
    ),
    (
        {"conversations": [
            {"images": ["a.png"], "user": "<image>\nWhere?", "assistant": "yes"},
            {"images": ["b.png"], "user": "Is <image> red?", "assistant": "True no"}]},
        [("<|user|>\n<|image_1|>\nWhere?<|end|>\n<|assistant|>\n", None), ("yes<|end|>\n", 1),
         ("<|user|>\nIs <|image_2|> red?<|end|>\n<|assistant|>\n", None), ("True no<|end|>\n<|endoftext|>", 2)],
    ),
    (
        {"conversations": [{"images": ["a.png"], "user": "Is it <image>?", "assistant": "SlideUp"}]},
        [("<|user|>\nIs it <|image_1|>?<|end|>\n<|assistant|>\n", None), ("SlideUp<|end|>\n<|endoftext|>", 1)],
    ),
    (
        {"conversations": [{"images": ["a.png"], "user": "Is it?", "assistant": "no no"}]},
        [("<|user|>\n<|image_1|>\nIs it?<|end|>\n<|assistant|>\n", None), ("no no<|end|>\n<|endoftext|>", 1)],
    ),
]  # fmt: skip


def write_written_data(folder: Path):
    """Data of WRITTEN for the training, and the last of them for the evaluation."""
    (folder / "images").mkdir(parents=True)
    for seed, (name, size) in enumerate({"a.png": (60, 40), "b.png": (50, 90)}.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    lines = [json.dumps(example) for example, _ in WRITTEN]
    for split, own in (("train", lines), ("val", lines[-1:])):
        (folder / f"ucf101_{split}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")


def loss_by_hand(folder: Path, loss_on: str = "all", num_crops: int = 4) -> float:
    """The mean cross entropy of the base model over the answers of WRITTEN that are learned, computed with the public
    processor and model, one prompt after another."""
    from phi3v import Phi3VForCausalLM, Phi3VProcessor

    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=num_crops)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example, pieces in WRITTEN:
        names = [name for turn in example["conversations"] for name in turn["images"]]
        images = [Image.open(folder / "images" / name) for name in names]
        batch = processor("".join(text for text, _ in pieces), images)
        ids, text, n, start = batch["input_ids"][0], "", len(example["conversations"]), 0
        with torch.no_grad():
            logits = model(**batch).logits[0].double()
        for piece, answer in pieces:
            text += piece
            own = images[: text.count("<|image_")]
            end = processor(text, own)["input_ids"].shape[1]
            assert torch.equal(processor(text, own)["input_ids"][0], ids[:end])
            if answer == n or answer and loss_on == "all":
                losses = torch.nn.functional.cross_entropy(logits[start - 1 : end - 1], ids[start:end], reduction="sum")
                total, count = total + losses.item(), count + end - start
            start = end
        assert end == len(ids)
    return total / count


def png_cell(seed: int) -> dict:
    """An image as a table of the Hub stores it; every seed gives another picture."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def texts_cell(user: str, assistant: str) -> dict:
    return {"user": user, "assistant": assistant, "source": "toy"}


def cauldron_features():
    """The columns of The Cauldron's tables."""
    import datasets

    return datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({role: datasets.Value("string") for role in ("user", "assistant", "source")}),
        }
    )


def write_toy_tables(folder: Path):
    """Folders laid out like the repositories on the Hub. There are 503 pairs and memes; the last but one shares an
    image with the first, which is among those that are evaluated on."""
    import datasets

    rows = {"hateful_memes": [], "nlvr2": [], "docvqa": []}
    for i in range(503):
        seed, answer = 0 if i == 501 else i, "yes" if i % 2 else "no"
        rows["hateful_memes"].append({"images": [png_cell(seed)], "texts": [texts_cell(f"Meme {i}?", answer)]})
        statements = [texts_cell(f"Statement {i}.{k}", "True" if k else "False") for k in range(1 + i % 2)]
        rows["nlvr2"].append({"images": [png_cell(i + 1000), png_cell(seed)], "texts": statements})
    for i in range(4):
        texts = [texts_cell(f"Question {i}.{k}?\nGive a very brief answer.", f"answer {k}") for k in range(3)]
        rows["docvqa"].append({"images": [png_cell(i)], "texts": texts})
    for config, own in rows.items():
        path = folder / "the_cauldron" / config / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_list(own, features=cauldron_features()).to_parquet(path)
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n" for config in rows
    )
    (folder / "the_cauldron" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for split, seeds in (("train", (10, 2, 12)), ("test", (1, 2))):
        own = [
            {
                "id": f"{split}_{seed}",
                "image": png_cell(seed),
                "query": {"en": f"Question {seed}?", "de": "Frage?"},
                "answers": [f"Answer {seed}", str(seed)],
            }
            for seed in seeds
        ]
        path = folder / "docvqa_1200_examples" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(own)
        table.cast_column("image", datasets.Image()).to_parquet(path)


def fuzz(examples: int):
    """Settings of a test with random inputs: the same inputs on every run, FUZZ_EXAMPLES of them if that is set."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", examples)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- Models

TINY_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "pad_token_id": 0,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}
DECODER_LAYERS = r"lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
VISION_LAYERS = (
    r"model\.vision_embed_tokens\.(img_projection\.[02]|"
    r"img_processor\.vision_model\.encoder\.layers\.(\d|1\d|2[012])\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2))"
)


def real_size_model(mode: str, dtype: torch.dtype, checkpointing="none", attention="sdpa", **sizes):
    """A model of the real size on the meta device, where it takes no memory; the parameters of `mode` train.

    sizes: fields of Phi3VConfig that differ, such as the number of layers.
    """
    from peft import LoraConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from phi3v import Phi3VConfig, Phi3VForCausalLM
    from phi3v.model.adapters import add_adapter
    from phi3v.model.loading import nf4_config, not_quantized
    from phi3v.model.vision_parts import train_vision_alone

    config = Phi3VConfig(**sizes)
    config._attn_implementation = attention
    with torch.device("meta"):
        base = model = Phi3VForCausalLM(config).to(dtype).train()
        part = mode.rpartition("_")[2]  # of "lora+whole_tower" and "alone_tower"
        if mode.startswith("alone"):
            train_vision_alone(base, part)
        if mode.startswith("frozen"):
            base.model.vision_embed_tokens.requires_grad_(False)
            base.model.vision_embed_tokens.img_projection.requires_grad_("projector" in mode)
        if mode.startswith("qlora"):
            replace_with_bnb_linear(base, not_quantized(quantize_vision=False), nf4_config(dtype))
            base.is_loaded_in_4bit = True
        if "lora" in mode:
            without = "frozen" in mode or "whole" in mode
            targets = DECODER_LAYERS if without else f"{DECODER_LAYERS}|{VISION_LAYERS}"
            config = LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=targets)
            model = add_adapter(base, config, vision_training=part if "whole" in mode else "default")
    if checkpointing != "none":
        base.checkpoint_tower = checkpointing == "all"
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def packed_row(examples) -> dict:
    """A packed row of examples, each given as (grids, text tokens, supervised tokens, a key of its images or None)."""
    from phi3v.model.packing import pack

    encoded = []
    for grids, text, supervised, images in examples:
        n = sum((h * w + 1) * 144 + 1 + (h + 1) * 12 for h, w in grids)
        ids = torch.cat([torch.full((n,), -1), torch.arange(text) + 3 + len(encoded)])
        labels = torch.full_like(ids, -100)
        labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
        tiles = torch.zeros(sum(h * w for h, w in grids), 336, 336, 3, dtype=torch.uint8)
        encoded.append({"input_ids": ids, "labels": labels, "tiles": tiles, "grids": list(grids), "images_key": images})
    row = pack(encoded, 4096, True, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    grids = row["packing"].grids
    row["image_sizes"] = torch.tensor(grids).view(-1, 2) * 336
    return row
