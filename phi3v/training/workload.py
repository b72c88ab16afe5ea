"""What a micro-batch holds."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..model.packing import Group, Packing


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds.

    crops: of all its images, global ones too; tokens: of all its rows; kept: those needed after the last layer's
    attention; targets: supervised tokens; pairs: (query, key) pairs that attend, and last_pairs those of the last
    layer; rows: groups that attend on their own.
    """

    crops: int
    tokens: int
    kept: int
    targets: int
    pairs: int
    last_pairs: int
    groups: int = 1

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def load_of(groups: Iterable[Group], crops: int, targets: int, causal: bool = True) -> Load:
    """What a packed micro-batch holds. Not `causal`: pairs as a kernel computes them that masks them afterwards."""
    groups = tuple(groups)
    pairs = last = 0
    for group in groups:
        n = sum(group.branches)
        own = sum(b * (b + 1) // 2 for b in group.branches) + n * group.length if causal else n * group.size
        hidden = (group.length - group.tail) * (group.length - group.tail + 1) // 2 if group.tail else 0
        common = group.length * (group.length + 1) // 2 if causal else group.length**2
        pairs += common + own
        last += own + (common - hidden if causal and group.tail else group.tail * group.length)
    tokens = sum(group.size for group in groups)
    kept = sum(group.tail + sum(group.branches) for group in groups)
    return Load(crops, tokens, kept, targets, pairs, last, len(groups))


def load_of_packing(packing: Packing, causal: bool = True) -> Load:
    crops = 0 if packing.encoded else sum(h * w + 1 for h, w in packing.grids)
    return load_of(packing.groups, crops, len(packing.label_rows), causal)


def load_of_example(tokens: int, crops: int, targets: int) -> Load:
    return load_of([Group(tokens, tail=min(targets + 1, tokens))], crops, targets)
