"""Trains the demo's base checkpoint from scratch: a tiny Phi-3.5-vision that reads handwritten digits.

    python demo/make_base.py [--out_dir demo/base_checkpoint]

First the tower learns to see digits. Then the decoder learns to answer questions and to judge statements about digits
in one or several images: which digits they are, where they are, how large and how dark. All digits are from the
training split. The model never sees the demo's tasks: no pages, captions or videos, and its statements about two images
are about size and darkness, never about the numbers. On one machine the result is the same on every run.
"""

import argparse
import json
import random
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import draw, load_digits
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from phi3v.data.collate import Collator
from phi3v.data.conversations import ConversationDataset
from phi3v.model.chat import SAME_CHAT_TEMPLATE
from phi3v.model.generation import use_own_settings
from phi3v.model.packing import IGNORE_INDEX
from phi3v.training.evaluation import generate_answers

HERE = Path(__file__).resolve().parent

# ---- tokenizer

VOCABULARY = 512
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
# The words of the questions here and of the demo's tasks. Each word becomes one or two tokens.
TEXTS = [
    "Describe the image. Describe image 1. Which digits are shown?",
    "Which digit is shown? Which digit is on the left? Which digit is on the right?",
    "Where is the digit? top middle bottom left middle right",
    "How large is the digit? small middling large",
    "How dark is the digit in image 1? faint grey dark",
    "The digit is darker on the left. Both digits are large. yes no",
    "Classify the video into one of the following classes: FadeIn, FadeOut, GrowLarge, ShrinkSmall, SlideDown, "
    "SlideLeft, SlideRight, SlideUp.",
    "What is the number in row B? Answer briefly.",
    "Does the caption match the picture? yes no",
    "The left image shows a larger digit than the right image. At least one image shows a digit. True False",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of at most VOCABULARY tokens with byte fallback, built like the real model's."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Only training cuts the text here, so that no merge joins words, digits or punctuation.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[A-Z]?[a-z]+|."), "isolated")
    learner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL),
            special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
            initial_alphabet=[*string.ascii_letters, *string.digits, "▁"],
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())
    learned["pre_tokenizer"] = None
    # The trainer marks the byte tokens as special, and decoding leaves out special tokens.
    learned["added_tokens"] = learned["added_tokens"][:3]
    bpe = Tokenizer.from_str(json.dumps(learned))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bpe.token_to_id("<s>"))])
    bpe.add_special_tokens([AddedToken(t, rstrip=t == "<|assistant|>", normalized=False) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = SAME_CHAT_TEMPLATE
    return tokenizer


# ---- model

IMAGE_SIZE = 56  # pixels of a crop's side: 4 x 4 patches, 2 x 2 image tokens


def make_model(tokenizer: PreTrainedTokenizerFast) -> Phi3VForCausalLM:
    """A model of 0.65M parameters. As in the real model, the tower's last layer is never run. All widths are multiples
    of 64, the block size of 4-bit quantisation."""
    config = Phi3VConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=0.09,  # 1 / sqrt(hidden_size), as 0.02 is for the real width of 3072
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
    )
    model = Phi3VForCausalLM(config)
    embeddings = model.model.vision_embed_tokens.img_processor.vision_model.embeddings
    with torch.no_grad():
        # Filters that sum to zero respond only to strokes. Otherwise the white paper would hide the patch's position.
        filters = embeddings.patch_embedding.weight.normal_(std=0.1)
        filters -= filters.mean((2, 3), keepdim=True)
        embeddings.position_embedding.weight.normal_(std=0.5)
    return model


# ---- questions

WIDTH, HEIGHT = 160, 120  # half the size of the videos, for speed; crops are even smaller
COLUMNS, ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")
SIDES = {"small": (25, 42), "middling": (52, 72), "large": (82, 108)}  # pixels
INKS = {"faint": (0.15, 0.3), "grey": (0.45, 0.6), "dark": (0.8, 1.0)}
# The possible words at each place of a description: five places for one digit, two for a pair of digits.
FACTS = [list(INKS), list(SIDES), string.digits, ROWS, COLUMNS, string.digits, string.digits]


def one_digit(digits, rng: random.Random) -> tuple[Image.Image, str, dict[str, str]]:
    """An image of one digit, its description, and the answer to each question without its question mark."""
    images, labels = digits
    i, column, row = rng.randrange(len(images)), rng.randrange(3), rng.randrange(3)
    size, ink = rng.choice(list(SIDES)), rng.choice(list(INKS))
    center = 80 + 38 * (column - 1) + rng.uniform(-12, 12), 60 + 25 * (row - 1) + rng.uniform(-8, 8)
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    draw(image, images[i], center, rng.uniform(*SIDES[size]), rng.uniform(*INKS[ink]))
    place = f"{ROWS[row]} {COLUMNS[column]}"
    answers = {
        "Which digit is shown": str(labels[i]),
        "Where is the digit": place,
        "How large is the digit": size,
        "How dark is the digit": ink,
    }
    facts = (ink, size)
    asked = rng.choice(facts if rng.random() < 0.5 else [value for value in (*INKS, *SIDES) if value not in facts])
    answers[f"Is the digit {asked}"] = "yes" if asked in facts else "no"
    return image, f"{ink} {size} {labels[i]} {place}", answers


def two_digits(digits, rng: random.Random) -> tuple[Image.Image, str, dict[str, str]]:
    """The same as `one_digit` for an image of two digits side by side."""
    images, labels = digits
    left, right = rng.randrange(len(images)), rng.randrange(len(images))
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    for i, x in ((left, 42), (right, 118)):
        draw(image, images[i], (x + rng.uniform(-8, 8), 60 + rng.uniform(-20, 20)), rng.uniform(50, 75))
    answers = {
        "Which digit is on the left": str(labels[left]),
        "Which digit is on the right": str(labels[right]),
        "Which digits are shown": f"{labels[left]} {labels[right]}",
    }
    return image, f"{labels[left]} {labels[right]}", answers


def judgements(descriptions, rng: random.Random) -> list[tuple[str, str]]:
    """A statement on how dark and one on how large the digits of two images are; half of all statements are true."""
    inks, sizes = zip(*(description.split()[:2] for description in descriptions), strict=True)
    turns = []
    for values, order in (inks, list(INKS)), (sizes, list(SIDES)):
        truth = rng.random() < 0.5
        side, others = rng.randrange(2), [value for value in order if value not in values]
        kind = rng.randrange(3)
        if kind == 0 and values[0] != values[1]:
            first = int((order.index(values[1]) > order.index(values[0])) == truth)
            comparative = "darker" if values is inks else "bigger"
            sides = ("left", "right")[first], ("left", "right")[1 - first]
            statement = "The {} image shows a {comparative} digit than the {} image.".format(
                *sides, comparative=comparative
            )
        elif kind == 1 and others:
            statement = f"At least one image shows a {rng.choice(values) if truth else rng.choice(others)} digit."
        else:
            value = values[side] if truth else rng.choice([value for value in order if value != values[side]])
            statement = f"The {('left', 'right')[side]} image shows a {value} digit."
        turns.append((statement, str(truth)))
    return turns


def make_conversation(digits, rng: random.Random) -> list[dict]:
    """Three or four turns about one image of two digits, or about one to four images of one digit."""
    if rng.random() < 0.25:
        image, _, answers = two_digits(digits, rng)
        shown, turns = [image], [(f"{question}?", answer) for question, answer in answers.items()]
    else:
        shown, descriptions, answers = zip(
            *(one_digit(digits, rng) for _ in range(rng.choice((1, 1, 2, 2, 2, 3, 4)))), strict=True
        )
        k = rng.randrange(len(shown))
        several = len(shown) > 1
        turns = [
            (f"{question} in image {i}?" if several else f"{question}?", answer)
            for i, own in enumerate(answers, 1)
            for question, answer in own.items()
        ]
        description = f"Describe image {k + 1}." if several else "Describe the image.", descriptions[k]
        turns = [description, *rng.sample(turns, 2)]
        if len(shown) == 2:
            turns = [*turns[:2], *judgements(descriptions, rng)]
    rng.shuffle(turns)
    conversation = [{"images": [], "user": question, "assistant": answer} for question, answer in turns]
    conversation[0]["images"] = list(shown)
    return conversation


class Conversations:
    """`n` conversations about the digits of a split, the same on every run, with at most `turns` turns each."""

    def __init__(self, split: str, n: int, turns: int | None = None):
        self.split, self.n, self.turns, self.digits = split, n, turns, load_digits(split)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        turns = make_conversation(self.digits, random.Random(f"{self.split} {i}"))
        return {"conversations": turns[: self.turns]}


class Crops(Dataset):
    """`n` images of training digits: the crop (3, S, S), and its description as an index into each of FACTS."""

    def __init__(self, processor, n: int):
        self.image_processor, self.n, self.digits = processor.image_processor, n, load_digits("train")

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = random.Random(f"crop {i}")
        pair = rng.random() < 0.3
        image, description, _ = (two_digits if pair else one_digit)(self.digits, rng)
        words = [None] * 5 + description.split() if pair else [*description.split(), None, None]
        facts = [IGNORE_INDEX if word is None else own.index(word) for own, word in zip(FACTS, words, strict=True)]
        return self.image_processor.crops(image)[0], torch.tensor(facts)


# ---- training and evaluation


def fit(parameters, batches: DataLoader, loss_of, learning_rate: float, name: str):
    """Trains with AdamW to reduce `loss_of(batch)`, one step for each batch."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(batches), pct_start=0.1, cycle_momentum=False
    )
    progress = tqdm(batches, desc=name, mininterval=1.0)
    for batch in progress:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train_tower(model, processor, steps: int, batch_size: int, learning_rate: float):
    """Trains the tower and the projector to classify what a crop shows. Their linear head is thrown away afterwards.

    A tower with random weights learns too slowly from answers in words: in a trial, the model still only guessed the
    digits when the time was used up.
    """
    vision = model.model.vision_embed_tokens
    head = torch.nn.Linear(vision.grid**2 * model.config.hidden_size, sum(map(len, FACTS)))
    batches = DataLoader(Crops(processor, steps * batch_size), batch_size, num_workers=1)

    def loss_of(batch):
        crops, facts = batch
        tokens = vision(crops)[:-2].view(len(crops), -1)  # without the two separators
        scores = head(tokens).split([len(values) for values in FACTS], -1)
        return sum(F.cross_entropy(own, facts[:, i]) for i, own in enumerate(scores))

    fit([*vision.parameters(), *head.parameters()], batches, loss_of, learning_rate, "training the tower")


def train_decoder(model, processor, steps: int, batch_size: int, learning_rate: float):
    """Trains the decoder to answer questions about images; the trained vision model stays frozen."""
    model.model.vision_embed_tokens.requires_grad_(False)
    data = ConversationDataset(Conversations("train", steps * batch_size), processor)
    batches = DataLoader(data, batch_size, num_workers=1, collate_fn=Collator(processor, "right"))
    model.train()
    fit(model.parameters(), batches, lambda batch: model(**batch).loss, learning_rate, "training the decoder")


def count_right(model, processor, n: int) -> dict[str, tuple[int, int]]:
    """Asks n questions about held-out digits. Returns (right answers, all answers) for each kind of question."""
    conversations = Conversations("val", n, turns=1)
    data = ConversationDataset(conversations, processor, for_generation=True)
    answers = generate_answers(model, processor, data, 64, max_new_tokens=32, disable_tqdm=True)
    counts = {}
    for i, answer in enumerate(answers):
        turn = conversations[i]["conversations"][0]
        question = " ".join(turn["user"].rstrip(string.digits + "?. ").split()[:5])
        right, asked = counts.get(question, (0, 0))
        counts[question] = (right + (answer == turn["assistant"]), asked + 1)
    return dict(sorted(counts.items()))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out_dir", type=Path, default=HERE / "base_checkpoint")
    parser.add_argument("--tower_steps", type=int, default=3500)
    parser.add_argument("--decoder_steps", type=int, default=4000)
    args = parser.parse_args(argv)
    if min(args.tower_steps, args.decoder_steps) < 1:
        parser.error("--tower_steps and --decoder_steps must be at least 1")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the result depends on the number of threads, because the order of sums does
    tokenizer = make_tokenizer()
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=1, image_size=IMAGE_SIZE), tokenizer)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    train_tower(model, processor, args.tower_steps, batch_size=64, learning_rate=2e-3)
    train_decoder(model, processor, args.decoder_steps, batch_size=32, learning_rate=1e-3)
    model.to(torch.bfloat16)  # as the real checkpoint is
    use_own_settings(model, processor)
    model.save_pretrained(args.out_dir)
    processor.save_pretrained(args.out_dir)
    for question, (right, asked) in count_right(model, processor, 2000).items():
        print(f"{question}: {right} of {asked} held-out answers right ({right / asked:.3f})")


if __name__ == "__main__":
    main()
