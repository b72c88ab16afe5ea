"""What an accelerator is asked before a run trusts its kernels."""

import copy

import torch
import torch.distributed as dist

from ..console import say
from ..errors import InputError
from ..model import fused
from ..model.attention import difference_from_sdpa
from ..ranks import world_size
from .hardware import describe_attention


def check_kernels(config, args, device: torch.device, dtype: torch.dtype):
    """Fuses functions and compares them, and the attention kernel, with plain ones. Every rank calls it; on a CPU it
    does nothing.

    Raises InputError if attention differs on any rank.
    """
    fused.turn_off()  # of an earlier run in this process
    if device.type == "cpu":
        return
    if not args.no_fuse:
        say(*fused.turn_on(device, dtype))
    check_attention(config, args.attn_implementation, device, dtype)


def check_attention(config, kind: str, device: torch.device, dtype: torch.dtype):
    """Raises InputError on all ranks if this kind of attention and SDPA attention differ on any of them."""
    if kind == "sdpa" or config.attention_dropout:  # with dropout SDPA attention runs in any case
        return
    config = copy.copy(config)
    config._attn_implementation = kind
    try:
        difference = difference_from_sdpa(config, device, dtype)
        # In half precision, results differ by about one rounding of the largest number; in fp32 by less than 0.002,
        # even if products are computed in TF32. A wrong kernel is wrong by much more.
        is_right = difference <= max(4 * torch.finfo(dtype).eps, 2e-3)
        problem = None if is_right else f"differs by {difference:.1e} from SDPA attention"
    except (RuntimeError, ValueError, ImportError) as e:
        problem = f"fails ({' '.join(str(e).split())[:150]})"
    problems = [problem] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    if any(problems):
        rank, problem = next((rank, found) for rank, found in enumerate(problems) if found)
        name = describe_attention(kind, config.attention_dropout)
        raise InputError(f"{name} {problem} on rank {rank}: use --attn_implementation sdpa")
