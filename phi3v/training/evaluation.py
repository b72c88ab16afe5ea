"""Evaluation by generated answers: all ranks generate in batches, and every answer gets a score."""

import contextlib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import TrainingArguments

from .. import ranks
from ..console import say
from ..data.collate import Collator
from ..data.conversations import ConversationDataset
from ..data.images import as_seen
from ..data.loading import batches_of, largest_batch, make_loader
from ..data.sizes import all_sizes
from ..errors import InputError, lowering
from ..files import write_json
from ..model.generation import use_own_settings
from ..model.modeling_phi3v import Phi3VForCausalLM
from ..model.processing_phi3v import Phi3VProcessor
from .answer_loss import LastAnswers, answer_loss
from .inference import evaluating
from .own_files import is_best, is_checkpoint


def generate_answers(
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: ConversationDataset,
    batch_size: int,
    max_new_tokens: int = 64,
    device: torch.device | None = None,
    compute_dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    disable_tqdm: bool = False,
    on_batch=lambda: None,
    left_out: dict[int, str] | None = None,
) -> list[str]:
    """The model's greedy answer to each example. Every rank gets all answers, in the order of `dataset`.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    dataset: made with for_generation=True. Each rank answers a share of it, in batches of `batch_size` examples of
        similar length that are padded on the left.
    device: where the model is moved to; by default it stays where it is.
    compute_dtype: if this is half precision, autocast computes in it, whatever the dtype of the weights is.
    on_batch: called before each batch, equally often on every rank; may raise.
    left_out: gets what is wrong with each example whose images can't be read. Its answer is to be left out.
    """
    rank, world_size = ranks.rank(), ranks.world_size()
    sizes = all_sizes(dataset, "measuring examples", disable_tqdm)
    # The longest examples come first, so that a lack of memory shows at once.
    order = sorted(range(len(dataset)), key=lambda i: (-sizes[i].tokens, i))
    # Under ZeRO-3 all ranks must call the model equally often, so every rank gets the same number of examples, and some
    # examples are answered twice.
    own = [order[i % len(order)] for i in range(rank, -(-len(order) // world_size) * world_size, world_size)]
    device = device or model.device
    loader = make_loader(
        Subset(dataset, own),
        batch_size=batch_size,
        num_workers=num_workers,
        batches=math.ceil(len(own) / batch_size),
        batch_bytes=largest_batch(sizes, batch_size, None, dataset.bytes_of_crops),
        collate_fn=Collator(processor, "left", normalise=False),
    )
    use_own_settings(model, processor)
    answers, problems = [], []
    lower = (
        f"--per_device_eval_batch_size, which is {batch_size}" if batch_size > 1 else "--num_crops or --max_new_tokens"
    )
    too_much = lowering(f"answers were generated: lower {lower}")
    with too_much, evaluating(model, device, compute_dtype):
        batches = batches_of(loader)
        for batch in tqdm(batches, desc="generating", total=len(loader), disable=disable_tqdm or rank != 0):
            on_batch()
            batch.pop("labels")
            grids = batch.pop("grids")
            problems += batch.pop("problems", [None] * len(batch["input_ids"]))
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            batch["pixel_values"] = processor.image_processor.crops_of_tiles(batch.pop("tiles"), grids)
            ids = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
            new_ids = ids[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    gathered = {i: found for i, *found in gather_object(list(zip(own, answers, problems, strict=True)))}
    if left_out is not None:
        left_out.update((i, problem) for i, (_, problem) in sorted(gathered.items()) if problem)
    return [gathered[i][0] for i in range(len(dataset))]


@dataclass
class Evaluation:
    """What a model is asked, and how its answers are scored.

    dataset: made with for_generation=True. A conversation may list all right answers under "answers"; without that, the
        answer of its last turn is the right one.
    metric: the name of the metric, which is the mean score.
    score: takes a prediction and the right answers, and returns the score.
    max_new_tokens: the most tokens that an answer can have.
    compute_dtype: as `generate_answers` takes it.
    left_out: after `report`, what is wrong with each example that the metric leaves out, by its index.
    """

    dataset: ConversationDataset
    metric: str
    score: Callable[[str, list[str]], float]
    max_new_tokens: int
    compute_dtype: torch.dtype
    left_out: dict[int, str] = field(default_factory=dict)

    def report(
        self, model, args: TrainingArguments, on_batch=lambda: None, with_loss: bool = False, most_tokens=math.inf
    ) -> dict:
        """The metric over the evaluation set and all predictions. Every rank must call it, and gets the same report.

        with_loss: the report also has `loss`, the mean over all tokens of the right answers, `loss_tokens`, their
            number, and `loss_examples`, how many examples have an answer; nothing of this if none has.
        most_tokens: as `answer_loss` takes it.
        """
        predictions = generate_answers(
            model,
            self.dataset.processor,
            self.dataset,
            args.per_device_eval_batch_size,
            self.max_new_tokens,
            device=args.device,
            compute_dtype=self.compute_dtype,
            num_workers=args.dataloader_num_workers,
            disable_tqdm=args.disable_tqdm,
            on_batch=on_batch,
            left_out=self.left_out,
        )
        rows = []
        for i, (example, prediction) in enumerate(zip(self.dataset.conversations, predictions, strict=True)):
            if i in self.left_out:
                continue
            answers = example.get("answers") or [example["conversations"][-1]["assistant"]]
            rows.append({"id": example["id"], "prediction": prediction, "answers": answers})
            rows[-1]["score"] = self.score(prediction, answers)
        if not rows:
            raise InputError(f"no example of the evaluation can be read: {self.left_out[0]}")
        mean = sum(row["score"] for row in rows) / len(rows)
        loss = self._loss(model, args, on_batch, most_tokens) if with_loss else {}
        # The loss comes last, because files are recognised as a run's by what they begin with.
        return {"metric": self.metric, self.metric: mean, "num_examples": len(rows), "predictions": rows, **loss}

    def _loss(self, model, args: TrainingArguments, on_batch, most_tokens: float) -> dict:
        loss, tokens = answer_loss(
            model,
            self.answers,
            args.per_device_eval_batch_size,
            most_tokens,
            device=args.device,
            compute_dtype=self.compute_dtype,
            num_workers=args.dataloader_num_workers,
            disable_tqdm=args.disable_tqdm,
            on_batch=on_batch,
        )
        if loss is None:
            return {}
        count = sum(i not in self.left_out and self.answers.has_answer(i) for i in range(len(self.answers)))
        return {"loss": loss, "loss_tokens": tokens, "loss_examples": count}

    @functools.cached_property
    def answers(self) -> LastAnswers:
        return LastAnswers(self.dataset)

    def example(self, i: int) -> dict:
        """The images and the question of prediction i of a report, as `write_html_report` takes them."""
        for index in sorted(self.left_out):
            i += index <= i
        turns = self.dataset.conversations[i]["conversations"]
        exif_rotate = self.dataset.processor.image_processor.exif_rotate
        images = [as_seen(image, exif_rotate) for turn in turns for image in turn["images"]]
        return {"images": images, "question": turns[-1]["user"]}


def new_evaluation(output_dir: Path, model: str, split: str | None) -> Path:
    """A new, empty file evaluation-SPLIT.json, with a number if there is one of that name or its page.

    split: as --eval_split names it; a script without it holds examples out itself. For a checkpoint or a best model in
    the output folder, its name stands before that of the split."""
    folder = Path(model)
    inside = folder.is_dir() and folder.resolve().parent == output_dir.resolve()
    prefix = f"{folder.resolve().name}-" if inside and (is_checkpoint(folder) or is_best(folder)) else ""
    name = f"evaluation-{prefix}{re.sub(r'[^A-Za-z0-9_.-]+', '-', split or 'held-out').strip('-.')[:100]}"
    for number in itertools.count(1):
        path = output_dir / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        with contextlib.suppress(FileExistsError):
            if not os.path.lexists(path.with_suffix(".html")):
                path.touch(exist_ok=False)
                return path


def write_evaluation(path: Path, report: dict):
    """Writes a report as json, whole or not at all, and prints its metric and its loss."""
    write_json(path, report)
    value = report[report["metric"]]
    text = f"{path}: {report['metric']} {value:.4f} over {report['num_examples']} examples"
    if "loss" in report:
        text += (
            f", loss {report['loss']:.4f} over {report['loss_tokens']:,} tokens of {report['loss_examples']} answers"
        )
    say(text)


def numbers_of(report: dict) -> dict[str, float]:
    """What is logged of a report, under the names that the Trainer gives to numbers of an evaluation."""
    return {f"eval_{name}": report[name] for name in (report["metric"], "loss") if name in report}
