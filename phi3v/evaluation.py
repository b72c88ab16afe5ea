"""Batched greedy generation over all ranks."""

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .conversations import END_TOKENS, Collator
from .modeling_phi3v import Phi3VForCausalLM
from .processing_phi3v import Phi3VProcessor


@torch.no_grad()
def generate_answers(
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    dataset: Dataset,
    batch_size: int,
    max_new_tokens: int = 64,
    num_workers: int = 0,
    compute_dtype: torch.dtype = torch.float32,
    disable_tqdm: bool = False,
) -> list[str]:
    """The model's greedy answer to each example, in the order of `dataset`, on every rank.

    dataset: examples of `encode_conversation(…, for_generation=True)`. Each rank answers its share, `batch_size`
        examples at a time, padded left; a batch ends when all of its answers have.
    compute_dtype: half precision here makes autocast compute in it, whatever the weights are kept in.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = list(range(rank, len(dataset), world_size))
    loader = DataLoader(
        Subset(dataset, own), batch_size, num_workers=num_workers, collate_fn=Collator(processor, "left")
    )
    stop_ids = processor.tokenizer.convert_tokens_to_ids(list(END_TOKENS))
    device = model.device
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    was_training = model.training
    model.eval()
    answers = []
    for batch in tqdm(loader, desc="generating", disable=disable_tqdm or rank != 0):
        batch.pop("labels")
        batch = {key: value.to(device) for key, value in batch.items()}
        with autocast:
            ids = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        new_ids = ids[:, batch["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    model.train(was_training)
    gathered = dict(gather_object(list(zip(own, answers, strict=True))))
    return [gathered[i] for i in range(len(dataset))]
