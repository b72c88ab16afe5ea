"""Micro-batches without padding: examples stand one after another in one row, and attention stays within each of them.

This is ours, not the official model's, which pads examples to one length. The structure of a row is a `Packing`, made
in a DataLoader's worker. With it attention computes nothing between different examples, on any device; examples with
the same images share them; and the last layer and the loss compute only what supervised tokens need. Because the
structure is known to the host, none of this makes the host wait for the device.
"""

from dataclasses import dataclass, field, replace

import torch

IGNORE_INDEX = -100  # the label of tokens that are not supervised


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens that attend to one another: one example, or several examples that begin alike.

    length: the number of tokens of the example, or of the common beginning of the examples.
    branches: for several examples, the number of tokens that each has after the common beginning. A branch attends to
        the common beginning and to itself. Empty for one example.
    tail: how many of the last of these `length` tokens are needed after the last layer's attention, because the loss
        depends on them. All tokens of branches are needed.
    is_long: whether the examples are longer than the original length, and take the long rotary factors.
    """

    length: int
    branches: tuple[int, ...] = ()
    tail: int = 0
    is_long: bool = False

    @property
    def size(self) -> int:
        return self.length + sum(self.branches)


@dataclass(frozen=True)
class Packing:
    """The structure of a packed row. It stays on the host, so that a training step never waits for the device.

    groups: in the order in which they stand in the row.
    kept_rows: int64 (n_kept,), the positions of the tokens that are needed after the last layer's attention.
    label_rows: int64 (n_targets,), for each target the position, among the kept tokens, of the token that predicts it.
    grids: for each image the number of its sub-crops (down, across). An image is there once, however often it appears.
    mean, std: the image processor's, for each channel, with which tiles are normalised.
    encoded: whether the batch has the images' features in place of their tiles, so that the tower computes nothing.
    """

    groups: tuple[Group, ...]
    kept_rows: torch.Tensor
    label_rows: torch.Tensor
    grids: tuple[tuple[int, int], ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    encoded: bool = False
    _on_device: dict = field(default_factory=dict, repr=False, compare=False)

    def pin_memory(self) -> "Packing":
        """Called by a DataLoader. The host need not wait for copies of pinned memory to a GPU."""
        rows = {"kept_rows": self.kept_rows.pin_memory(), "label_rows": self.label_rows.pin_memory()}
        return replace(self, **rows, _on_device={})

    def cached(self, key, make):
        """The result of `make()`, which is called once for all layers."""
        if key not in self._on_device:
            self._on_device[key] = make()
        return self._on_device[key]

    def is_long(self) -> torch.Tensor | None:
        """bool (length,): which tokens take the long rotary factors; None if none does."""
        if not any(group.is_long for group in self.groups):
            return None
        sizes = torch.tensor([group.size for group in self.groups])
        return torch.tensor([group.is_long for group in self.groups]).repeat_interleave(sizes)


def pack(
    examples: list[dict],
    original_length: int,
    share_images: bool,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> dict:
    """Encoded conversations → one row without padding.

    examples: each with
        `input_ids` and `labels`, int64 (length,);
        `tiles`, uint8 (n_tiles, S, S, 3), or in place of these `features` (n_crops * g * g, hidden);
        `grids`, for each image the number of its sub-crops (down, across);
        `images_key`, which is equal for examples with the same images, or None if that is unknown.
    original_length: examples with more tokens take the long rotary factors.
    share_images: neighbours with the same images become one group, with one copy of their common beginning, if all
        images are in it. Without this each is a group of its own; their images still go through the tower only once.
    mean, std: as in `Packing`.

    Returns `input_ids` and `position_ids` (1, length); `labels` and `shift_labels`, which are both the targets
    (n_targets,); `tiles` or `features`; `image_index` (n_appearances,), which image appears where; and `packing`.
    """
    ids, positions, targets, kept_rows, label_rows, groups = [], [], [], [], [], []
    form = "features" if "features" in examples[0] else "tiles"  # the form in which images are given
    images, grids, image_index = [], [], []
    n_rows, n_kept = 0, 0
    for same in _runs(examples, key=lambda e: e["images_key"]):
        first = len(grids)
        images.append(same[0][form])
        grids += same[0]["grids"]
        shared = []
        for members in _runs(same, key=lambda e: len(e["input_ids"]) > original_length):
            common = _common_length(members) if share_images and len(members) > 1 else 0
            shared += [(members, common)] if common else [([member], len(member["input_ids"])) for member in members]
        for members, common in shared:
            supervised = [(e["labels"] != IGNORE_INDEX).nonzero()[:, 0] for e in members]
            branches = tuple(len(e["input_ids"]) - common for e in members) if len(members) > 1 else ()
            last = len(members[0]["input_ids"]) - 1
            first_needed = min((own[0].item() - 1 for own in supervised if len(own)), default=last)
            tail = max(common - first_needed, 0)
            if not branches and tail > common / 2:  # computing all rows without a mask is cheaper
                tail = common
            is_long = len(members[0]["input_ids"]) > original_length
            groups.append(Group(common, branches, tail, is_long))
            image_index += range(first, len(grids))
            ids.append(members[0]["input_ids"][:common])
            positions.append(torch.arange(common))
            offset = n_kept - (common - tail)  # add it to a token's position in the common part to get its kept row
            branch_start = offset + common
            for example, own in zip(members, supervised, strict=True):
                targets.append(example["labels"][own])
                label_rows.append(torch.where(own - 1 < common, offset, branch_start - common) + own - 1)
                if branches:
                    ids.append(example["input_ids"][common:])
                    positions.append(torch.arange(common, len(example["input_ids"])))
                    branch_start += len(ids[-1])
            size = groups[-1].size
            kept_rows.append(torch.arange(n_rows + common - tail, n_rows + size))
            n_rows, n_kept = n_rows + size, n_kept + len(kept_rows[-1])
    labels = torch.cat(targets)
    rows = torch.cat(kept_rows), torch.cat(label_rows)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions)[None],
        "labels": labels,
        "shift_labels": labels,  # the Trainer counts supervised tokens in these
        form: torch.cat(images),
        "image_index": torch.tensor(image_index, dtype=torch.long),
        "packing": Packing(tuple(groups), *rows, tuple(grids), mean, std, encoded=form == "features"),
    }


def _runs(examples: list, key) -> list[list]:
    """Divides a list into runs of neighbours with the same key. An example with the key None is a run of its own."""
    runs = []
    for example in examples:
        own = key(example)
        if runs and own is not None and key(runs[-1][0]) == own:
            runs[-1].append(example)
        else:
            runs.append([example])
    return runs


def _common_length(members: list[dict]) -> int:
    """How many tokens the examples have in common at their beginning, without supervised tokens; 0 if an image comes
    after them."""
    shortest = min(len(e["input_ids"]) - 1 for e in members)
    first = members[0]["input_ids"]
    n = shortest
    for example in members:
        same = example["input_ids"][:shortest] == first[:shortest]
        n = min(n, int(same.long().cumprod(0).sum()))
        if len(supervised := (example["labels"] != IGNORE_INDEX).nonzero()):
            n = min(n, supervised[0].item())
    return n if all((e["input_ids"][n:] >= 0).all() for e in members) else 0
