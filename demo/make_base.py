"""Trains the demo's base checkpoint from scratch: a tiny Phi-3.5-vision that reads handwritten digits.

    python demo/make_base.py [--out_dir demo/base_checkpoint] [--steps 1500]

It learns to name digits, to say where they stand and how large and how dark they are, and which image of several is
meant, all on the training digits alone. The tasks that the demo fine-tunes for are never shown to it.
"""

import argparse
import random
import string
from pathlib import Path

import numpy as np
import torch
from digits import draw, load_digits
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from phi3v.conversations import Collator, encode_conversation
from phi3v.evaluation import generate_answers

WIDTH, HEIGHT = 320, 240
IMAGE_SIZE = 56
VOCABULARY = 512
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
CHAT_TEMPLATE = (
    "{%- for turn in messages -%}{{ '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
# Words of the questions that the demo's tasks ask, so that their texts are few tokens.
TASK_TEXTS = [
    "Classify the video into one of the following classes: FadeIn, FadeOut, GrowLarge, ShrinkSmall, SlideDown, "
    "SlideLeft, SlideRight, SlideUp.",
    "What is the number in row B? Answer briefly.",
    "Does the caption match the picture? yes no",
    "The left image shows a larger digit than the right image. At least one image shows a True False",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of VOCABULARY tokens with the structure of the real one."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    base = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rng = random.Random(0)
    questions = [question for kind in KINDS for _ in range(30) for question in [make_question(kind, "train", rng)[0]]]
    # Digits are single tokens: every text is cut around them before merges are learned.
    texts = [piece for text in TASK_TEXTS * 10 + questions for piece in cut_around_digits(text)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=[c for c in string.printable if c.isprintable() and c != " "] + ["▁"],
        max_token_length=12,
        show_progress=False,
    )
    base.train_from_iterator(texts, trainer)
    base.add_special_tokens(
        [AddedToken(token, rstrip=token == "<|assistant|>", normalized=False, special=True) for token in SPECIAL]
    )
    bos = base.token_to_id("<s>")
    base.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|system|>", "<|end|>", "<|user|>"],
        padding_side="right",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def cut_around_digits(text: str) -> list[str]:
    for digit in string.digits:
        text = text.replace(digit, "\n")
    return [piece for piece in text.split("\n") if piece]


def make_model(tokenizer: PreTrainedTokenizerFast) -> Phi3VForCausalLM:
    config = Phi3VConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 192,
            "projection_dim": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
    )
    model = Phi3VForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# A question draws its own images. Each kind returns question, answer and the digits with their place, size and ink.
KINDS = ("digit", "where", "size", "ink", "left or right", "which image", "both")
COLUMNS, ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")


def make_question(kind: str, split: str, rng: random.Random) -> tuple[str, str, list[list[tuple]]]:
    """Question, answer, and for each image its digits as (index of the digit image, x, y, side, ink)."""
    images, labels = DIGIT_SETS[split]

    def place(x=None, y=None, side=None, ink=None):
        return (
            rng.randrange(len(images)),
            rng.uniform(60, 260) if x is None else x,
            rng.uniform(70, 170) if y is None else y,
            rng.uniform(90, 190) if side is None else side,
            rng.uniform(0.25, 1) if ink is None else ink,
        )

    def label(placed):
        return str(labels[placed[0]])

    if kind == "where":
        column, row = rng.randrange(3), rng.randrange(3)
        x, y = 160 + 80 * (column - 1) + rng.uniform(-25, 25), 120 + 55 * (row - 1) + rng.uniform(-18, 18)
        placed = place(x, y, rng.uniform(60, 150))
        return "Where is the digit?", f"{ROWS[row]} {COLUMNS[column]}", [[placed]]
    if kind == "size":
        name, low, high = rng.choice([("small", 50, 90), ("medium", 105, 145), ("large", 165, 215)])
        return "How large is the digit?", name, [[place(side=rng.uniform(low, high))]]
    if kind == "ink":
        name, low, high = rng.choice([("faint", 0.1, 0.3), ("medium", 0.42, 0.62), ("dark", 0.8, 1)])
        return "How dark is the digit?", name, [[place(ink=rng.uniform(low, high))]]
    if kind in ("left or right", "both"):
        two = [place(x, side=rng.uniform(120, 170), ink=rng.uniform(0.7, 1)) for x in (85, 235)]
        if kind == "both":
            return "Which digits are shown?", f"{label(two[0])} {label(two[1])}", [two]
        side = rng.randrange(2)
        return f"Which digit is on the {('left', 'right')[side]}?", label(two[side]), [two]
    if kind == "which image":
        shown = [[place(160, 120, rng.uniform(150, 200), rng.uniform(0.7, 1))] for _ in range(rng.randint(2, 4))]
        which = rng.randrange(len(shown))
        return f"Which digit is in image {which + 1}?", label(shown[which][0]), shown
    placed = place()
    return "Which digit is shown?", label(placed), [[placed]]


class Questions(Dataset):
    """Question i of a split is the same on every run. `kind` None asks all kinds in turn."""

    def __init__(self, processor, split: str, n: int, kind: str | None = None, for_generation: bool = False):
        self.processor, self.split, self.n = processor, split, n
        self.kind, self.for_generation = kind, for_generation

    def __len__(self):
        return self.n

    def question(self, i):
        rng = random.Random(f"{self.split} {i}")
        return make_question(self.kind or rng.choice(KINDS), self.split, rng)

    def __getitem__(self, i):
        question, answer, shown = self.question(i)
        images = []
        for placed in shown:
            image = Image.new("L", (WIDTH, HEIGHT), 255)
            for digit, x, y, side, ink in placed:
                draw(image, DIGIT_SETS[self.split][0][digit], (x, y), side, ink)
            images.append(image)
        turn = {"images": images, "user": question, "assistant": answer}
        return encode_conversation(self.processor, [turn], self.for_generation)


DIGIT_SETS = {split: load_digits(split) for split in ("train", "val")}


def train(model, processor, steps: int, batch_size: int, learning_rate: float):
    loader = DataLoader(
        Questions(processor, "train", steps * batch_size),
        batch_size,
        num_workers=1,
        collate_fn=Collator(processor, "right"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    progress = tqdm(loader, desc="training the base")
    for batch in progress:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def accuracy(model, processor, kind: str, n: int) -> float:
    data = Questions(processor, "val", n, kind, for_generation=True)
    answers = generate_answers(model, processor, data, 64, max_new_tokens=12, disable_tqdm=True)
    return float(np.mean([answer == data.question(i)[1] for i, answer in enumerate(answers)]))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent / "base_checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the result depends on the number of threads
    tokenizer = make_tokenizer()
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1, image_size=IMAGE_SIZE), tokenizer)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train(model, processor, args.steps, args.batch_size, args.learning_rate)
    model.to(torch.bfloat16).save_pretrained(args.out_dir)
    processor.save_pretrained(args.out_dir)
    model.float()
    for kind in KINDS:
        print(f"{kind}: {accuracy(model, processor, kind, 200):.3f} of 200 held-out questions")


if __name__ == "__main__":
    main()
