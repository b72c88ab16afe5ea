"""The contents of a micro-batch, in the quantities with which its FLOPs and its memory grow."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..model.packing import Group, Packing


@dataclass(frozen=True)
class Workload:
    """What one micro-batch contains.

    crops: sub-crops and global crops of all images.
    tokens: of all examples, without padding.
    kept_tokens: tokens that are still needed after the last layer's attention, because the loss is computed from them.
    targets: supervised tokens.
    pairs: (query, key) pairs of tokens that attend, in each decoder layer but the last.
    last_layer_pairs: the same in the last layer, where only the kept tokens are queries.
    groups: how many groups of tokens attend separately.
    """

    crops: int
    tokens: int
    kept_tokens: int
    targets: int
    pairs: int
    last_layer_pairs: int
    groups: int = 1

    def __add__(self, other: "Workload") -> "Workload":
        return Workload(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def workload_of_groups(groups: Iterable[Group], crops: int, targets: int, causal: bool = True) -> Workload:
    """The workload of a packed micro-batch.

    causal: count a query only with the keys that it may attend to. False counts every query with every key of its
        group, which is what a kernel computes that applies the mask afterwards.
    """
    groups = tuple(groups)
    pairs = last_layer_pairs = 0
    for group in groups:
        n = sum(group.branches)
        in_branches = sum(b * (b + 1) // 2 for b in group.branches) + n * group.length if causal else n * group.size
        in_common = group.length * (group.length + 1) // 2 if causal else group.length**2
        pairs += in_common + in_branches
        if causal and group.tail:
            before_tail = (group.length - group.tail) * (group.length - group.tail + 1) // 2
            last_layer_pairs += in_branches + in_common - before_tail
        else:
            last_layer_pairs += in_branches + group.tail * group.length
    tokens = sum(group.size for group in groups)
    kept_tokens = sum(group.tail + sum(group.branches) for group in groups)
    return Workload(crops, tokens, kept_tokens, targets, pairs, last_layer_pairs, len(groups))


def workload_of_packing(packing: Packing, causal: bool = True) -> Workload:
    """The workload of a micro-batch that is about to be computed; `causal` as in `workload_of_groups`."""
    crops = 0 if packing.encoded else sum(h * w + 1 for h, w in packing.grids)
    return workload_of_groups(packing.groups, crops, len(packing.label_rows), causal)


def workload_of_example(tokens: int, crops: int, targets: int) -> Workload:
    """The workload of one example, if all its supervised tokens stand at its end."""
    return workload_of_groups([Group(tokens, tail=min(targets + 1, tokens))], crops, targets)
