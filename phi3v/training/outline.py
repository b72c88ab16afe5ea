"""What training needs, estimated from a model without weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..data.sizes import Size
from ..errors import blaming
from ..model.configuration_phi3v import Phi3VConfig
from ..model.loading import not_quantized
from ..model.modeling_phi3v import Phi3VForCausalLM
from .estimate import Estimate
from .hardware import compute_dtype, weights_dtype


def estimate_run(
    args, training_args: TrainingArguments, sizes: list[Size], choose_trained: Callable, folder: Path | None = None
) -> Estimate:
    """What training on examples of these sizes needs, computed from a model without weights.

    folder: where config.json lies; by default as --model_name_or_path says.
    """
    with blaming("model_name_or_path", args.model_name_or_path), torch.device("meta"):
        config = Phi3VConfig.from_pretrained(folder or args.model_name_or_path, revision=args.model_revision)
        config._attn_implementation = args.attn_implementation
        outline = Phi3VForCausalLM(config).to(weights_dtype(training_args, args.use_lora))
        outline = choose_trained(outline, args)
    return Estimate(
        outline,
        sizes,
        args.estimate_gpus or training_args.world_size,
        compute_dtype(training_args).itemsize,
        training_args.deepspeed,
        not_quantized(args.quantize_vision) if args.use_qlora else None,
        on_gpu=args.estimate or torch.accelerator.is_available(),
    )
