"""Batched greedy generation over all ranks, and the report of what it gave."""

import contextlib
import importlib.metadata
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .annotations import END_TOKENS
from .checkpoints import ignore_signals, write_json
from .conversations import Collator, ConversationDataset, all_sizes
from .image_processing_phi3v import crops_of_tiles
from .modeling_phi3v import Phi3VForCausalLM
from .processing_phi3v import Phi3VProcessor
from .report import write_html_report


@torch.no_grad()
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
) -> list[str]:
    """The model's greedy answer to each example, in the order of `dataset`, on every rank.

    model: a Phi3VForCausalLM, or a PeftModel around one.
    dataset: made with for_generation=True. Each rank answers its share, `batch_size` examples of nearly equal length
        at a time, padded left; a batch ends when all of its answers have.
    device: where to, if the model is elsewhere.
    compute_dtype: half precision here makes autocast compute in it, whatever the weights are kept in.
    on_batch: called before each batch, on every rank equally often; may raise.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = all_sizes(dataset, "measuring examples", disable_tqdm)
    order = sorted(range(len(dataset)), key=lambda i: (-sizes[i].tokens, i))  # what needs most memory comes first
    # Every rank gets as many, the last ones some twice: under ZeRO-3 no rank can go on without the others.
    own = [order[i % len(order)] for i in range(rank, -(-len(order) // world_size) * world_size, world_size)]
    device = device or model.device
    split = [p for p in model.parameters() if hasattr(p, "ds_id")]  # by ZeRO-3, which has them on their device
    if not split:
        model.to(device)
    loader = DataLoader(
        Subset(dataset, own),
        batch_size,
        num_workers=num_workers,
        collate_fn=Collator(processor, "left", normalise=False),
        worker_init_fn=ignore_signals,
    )
    stop_ids = processor.tokenizer.convert_tokens_to_ids(list(END_TOKENS))
    statistics = processor.image_processor.image_mean, processor.image_processor.image_std
    was_training = model.training
    model.eval()
    answers = []
    with _whole(model, split), torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        for batch in tqdm(loader, desc="generating", disable=disable_tqdm or rank != 0):
            on_batch()
            batch.pop("labels")
            grids = batch.pop("grids")
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            batch["pixel_values"] = crops_of_tiles(batch["pixel_values"], grids, *statistics)
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


def _whole(model, split: list):
    """A context in which split parameters are whole, where no DeepSpeed engine sees to that layer by layer."""
    if not split or any(module._forward_pre_hooks for module in model.modules()):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split)


def write_report(trainer, name: str) -> dict:
    """Writes `trainer.report()` to a file of the output folder, whole or not at all, and returns it."""
    report = trainer.report()
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / name
        write_json(path, report)
        value = report[report["metric"]]
        print(f"{path}: {report['metric']} {value:.4f} over {report['num_examples']} examples", flush=True)
    return report


def write_page(trainer, before: dict | None, after: dict | None, about: dict):
    """Writes the run as a page to look at, `report.html` in the output folder; rank 0 calls it.

    before, after: what `write_report` returned, None where there has been no such evaluation yet.
    about: what else to tell of the run, as `write_html_report` takes it.
    """
    conversations = trainer.eval_conversations

    def example(i: int) -> dict:
        turns = conversations[i]["conversations"]
        return {"images": [image for turn in turns for image in turn["images"]], "question": turns[-1]["user"]}

    args = trainer.args
    packages = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")
    summary = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "steps": f"{trainer.state.global_step} of {trainer.state.max_steps}",
        "processes": args.world_size,
        "seed": args.seed,
        **about,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    title = Path(sys.argv[0]).stem.replace("_", " ")
    write_html_report(
        args.output_dir,
        title=title,
        summary=summary,
        history=trainer.state.log_history,
        before=before,
        after=after,
        examples=example,
    )
