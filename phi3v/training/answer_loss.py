"""The validation loss: how likely the model finds the right answers of the evaluation set."""

import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from .. import ranks
from ..data.collate import PackingCollator
from ..data.conversations import ConversationDataset
from ..data.loading import batches_of, largest_batch, make_loader
from ..data.sampler import sampler_for
from ..data.sizes import all_sizes
from ..errors import lowering
from ..model.adapters import inner_model
from ..model.packing import IGNORE_INDEX
from .inference import evaluating


class LastAnswers(ConversationDataset):
    """An evaluation set whose items have targets: the tokens of the answer that evaluation asks for, which is the last
    one of each conversation, with its end tokens. Earlier answers are part of the question and have none.

    An answer that is empty has no targets, nor has an example whose images can't be read. An answer may be longer than
    the model's limit allows, as generated answers may.

    questions: the evaluation set, made with for_generation=True.
    """

    def __init__(self, questions: ConversationDataset):
        super().__init__(questions.conversations, questions.processor, skip_bad=questions.skip_bad)
        self.questions = questions

    def __getitems__(self, indices: list[int]) -> list[dict]:
        examples = super().__getitems__(indices)
        for i, example in zip(indices, examples, strict=True):
            ids = example["input_ids"]
            example["labels"] = torch.full_like(ids, IGNORE_INDEX)
            if i >= 0 and "problem" not in example and self.has_answer(i):
                question = self.questions.encode_text(i, self.questions.chat(i)[0], example["grids"])["input_ids"]
                example["labels"][len(question) :] = ids[len(question) :]
        return examples

    def has_answer(self, i: int) -> bool:
        return bool(self.conversations[i]["conversations"][-1]["assistant"].strip())


def answer_loss(
    model,
    answers: LastAnswers,
    batch_size: int,
    most_tokens: float = math.inf,
    device: torch.device | None = None,
    compute_dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    disable_tqdm: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[float | None, int]:
    """The mean cross-entropy over the targets of all examples, and how many targets there are; None without targets.
    Every rank calls it, computes a share of the examples, and gets the mean over all of them.

    Examples are packed as in training, but neither the random generators nor the model change.

    model, device, compute_dtype, on_batch: as `generate_answers` takes them.
    batch_size, most_tokens: a micro-batch has at most `most_tokens` tokens, and at most those of `batch_size` of the
        longest examples, which generation has in one batch. The longest example alone may have more.
    """
    sizes = all_sizes(answers, "measuring answers", disable_tqdm)
    longest = max(size.tokens for size in sizes)
    limit = int(max(longest, min(batch_size * longest, most_tokens)))
    original_length = inner_model(model).config.original_max_position_embeddings
    # One step with all examples: every rank gets the same number of micro-batches, those with most tokens first.
    sampler = sampler_for(
        answers,
        sizes,
        len(answers),
        max_tokens=limit,
        original_length=original_length,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )
    loader = make_loader(
        answers,
        batch_sampler=sampler,
        collate_fn=PackingCollator(answers.processor, original_length, share_images=True),
        num_workers=num_workers,
        batches=len(sampler),
        batch_bytes=largest_batch(sizes, batch_size, limit, answers.bytes_of_crops),
        generator=torch.Generator(),  # a DataLoader draws a seed for its workers, by default from the training's own
    )
    device = device or model.device
    sums, tokens = [], 0
    lower = f"--per_device_eval_batch_size, which is {batch_size}" if batch_size > 1 else "--num_crops"
    too_much = lowering(f"the loss of the answers was computed: lower {lower}")
    with too_much, evaluating(model, device, compute_dtype):
        no_bar = disable_tqdm or not ranks.is_first()
        for batch in tqdm(batches_of(loader), desc="validation loss", total=len(loader), disable=no_bar):
            on_batch()
            batch.pop("problems")
            tokens += len(batch["shift_labels"])
            batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            sums.append(model(**batch, num_items_in_batch=1).loss.float())
    gathered = gather_object([(torch.stack(sums).tolist(), tokens)])
    tokens = sum(own for _, own in gathered)
    return (math.fsum(x for own, _ in gathered for x in own) / tokens if tokens else None), tokens
