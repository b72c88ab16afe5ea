"""What attention within the groups of a packed row computes beside attention, and how padded batches are computed.

test_packing.py and test_varlen.py check its results.
"""

from collections import Counter
from types import SimpleNamespace

import torch
from golden_cases import case_inputs, load
from torch.utils._python_dispatch import TorchDispatchMode

from phi3v.model import attention
from phi3v.model.attention import packed_attention
from phi3v.model.functional import rotate
from phi3v.model.packing import Group, Packing


class Calls(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_more_groups_take_more_attention_and_nothing_else():
    """The gradients of all groups are joined in one step. The gradient of a slice would be as large as the row."""

    def calls(groups):
        length, heads, head_dim = 12 * groups, (2, 2, 2), 8
        packing = Packing((Group(12),) * groups, torch.arange(length), torch.arange(1))
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), scaling=0.3)
        qkv = torch.randn(1, length, 48, requires_grad=True)
        angles = torch.randn(2, 1, length, head_dim)
        with Calls() as counted:
            packed_attention(module, *rotate(qkv * 1.0, *angles, heads, head_dim), packing, False, 0.0).sum().backward()
        return {name: n for name, n in counted.counts.items() if "scaled_dot_product" not in name}

    assert calls(2) == calls(6) and not any("slice_backward" in name for name in calls(6))


def test_padded_batches_with_varlen_are_computed_as_with_sdpa(tmp_path):
    """In the decoder, the tower and generation. The choice is not saved."""
    inputs, _ = case_inputs("batch2_rightpad")
    prompt = case_inputs("img1_c4_1x2")[0]
    found = []
    for kind in ("sdpa", "varlen"):
        model = load(kind).eval()
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {kind}
        with torch.no_grad():
            logits = model(**inputs).logits
        found.append((logits, model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


def test_eager_attention_in_fp16_does_not_overflow():
    """The product of large queries and keys is infinite in fp16 before it is scaled, and fits afterwards."""
    random = torch.Generator().manual_seed(0)
    query, key = (30 * torch.randn(1, 2, 8, 96, generator=random) + 25 for _ in range(2))
    value = torch.randn(1, 2, 8, 96, generator=random)
    assert (query.half() @ key.half().transpose(2, 3)).isinf().any()
    options = {"mask": None, "is_causal": True, "dropout": 0.0, "scaling": 96**-0.5, "enable_gqa": False}
    found = attention._eager(query.half(), key.half(), value.half(), **options)
    exact = attention._eager(*(x.half().double() for x in (query, key, value)), **options)
    assert found.isfinite().all() and (found - exact).abs().max() < 0.01 * exact.abs().max()
