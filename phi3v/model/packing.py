"""Padding-free micro-batches: how examples stand in one row, and attention that stays within each of them."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IGNORE_INDEX = -100  # a label that is no target


@dataclass(frozen=True)
class Group:
    """Tokens that see one another: an example, or several examples that begin alike.

    length: tokens of the example, or of what the examples have in common.
    branches: tokens of each example after that; a branch sees the common part and itself. Empty for one example.
    tail: how many of the last `length` tokens are still needed after the last layer's attention, where the loss is
        taken. Branches are needed whole.
    is_long: whether the example's own length (that of the longest branch) takes the long rotary factors.
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
    """What the host knows of a micro-batch, so that no step has to ask the device.

    groups: in the order in which they stand in the row.
    kept_rows: (n_kept,) int64, the tokens that are still needed after the last layer's attention.
    label_rows: (n_targets,) int64, the token that predicts each target, counted among the kept ones.
    grids: (down, across) sub-crops of each image. Images are encoded once, however often they are referred to.
    mean, std: of the image processor, by channel, for crops that travel as uint8.
    encoded: whether features of the images travel in place of their crops.
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
        """As a DataLoader calls it, so that the copies to a GPU need not be waited for."""
        rows = {"kept_rows": self.kept_rows.pin_memory(), "label_rows": self.label_rows.pin_memory()}
        return replace(self, **rows, _on_device={})

    def cached(self, key, make):
        """`make()`, once for all layers."""
        if key not in self._on_device:
            self._on_device[key] = make()
        return self._on_device[key]

    def is_long(self) -> torch.Tensor | None:
        """(length,) bool, which tokens take the long rotary factors; None where none does."""
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

    examples: with `input_ids` and `labels` (length,), `tiles` (n_tiles, S, S, 3) uint8, or in place of these `features`
        (n_rows, hidden) of whole images, `grids`, and `images_key`, which is equal for examples of the same images
        (None: unknown). Those that stand next to one another and whose images all come before anything that
        differs are put behind one copy of what they have in common, if `share_images`; otherwise their images are
        encoded once all the same.
    original_length: above it an example takes the long rotary factors.
    mean, std: of the image processor, by channel, which tiles are normalised with.

    Returns `input_ids` and `position_ids` (1, length), `labels` and `shift_labels`, both the targets (n_targets,),
    `tiles` or `features` as the examples have them, `image_index` (n_appearances,) and `packing`.
    """
    ids, positions, targets, kept_rows, label_rows, groups = [], [], [], [], [], []
    form = "features" if "features" in examples[0] else "tiles"  # in which the images are given
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
            asked = min((s[0].item() - 1 for s in supervised if len(s)), default=len(members[0]["input_ids"]) - 1)
            tail = max(common - asked, 0)
            if not branches and tail > common / 2:  # causal attention for all rows costs less than a mask for most
                tail = common
            is_long = len(members[0]["input_ids"]) > original_length
            groups.append(Group(common, branches, tail, is_long))
            image_index += range(first, len(grids))
            ids.append(members[0]["input_ids"][:common])
            positions.append(torch.arange(common))
            offset = n_kept - (common - tail)  # from a token of the common part to its kept row
            branch = offset + common
            for example, own in zip(members, supervised, strict=True):
                targets.append(example["labels"][own])
                label_rows.append(torch.where(own - 1 < common, offset, branch - common) + own - 1)
                if branches:
                    ids.append(example["input_ids"][common:])
                    positions.append(torch.arange(common, len(example["input_ids"])))
                    branch += len(ids[-1])
            size = groups[-1].size
            kept_rows.append(torch.arange(n_rows + common - tail, n_rows + size))
            n_rows, n_kept = n_rows + size, n_kept + len(kept_rows[-1])
    labels = torch.cat(targets)
    rows = torch.cat(kept_rows), torch.cat(label_rows)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions)[None],
        "labels": labels,
        "shift_labels": labels,  # by which the Trainer counts targets
        form: torch.cat(images),
        "image_index": torch.tensor(image_index, dtype=torch.long),
        "packing": Packing(tuple(groups), *rows, tuple(grids), mean, std, encoded=form == "features"),
    }


def _runs(examples: list, key) -> list[list]:
    """Neighbours with the same key together; None is a key that nothing shares."""
    runs = []
    for example in examples:
        own = key(example)
        if runs and own is not None and key(runs[-1][0]) == own:
            runs[-1].append(example)
        else:
            runs.append([example])
    return runs


def _common_length(members: list[dict]) -> int:
    """Tokens that all examples begin with and that train nothing, or 0 where an image comes after them."""
    shortest = min(len(e["input_ids"]) - 1 for e in members)
    first = members[0]["input_ids"]
    n = shortest
    for example in members:
        same = example["input_ids"][:shortest] == first[:shortest]
        n = min(n, int(same.long().cumprod(0).sum()))
        if len(supervised := (example["labels"] != IGNORE_INDEX).nonzero()):
            n = min(n, supervised[0].item())
    return n if all((e["input_ids"][n:] >= 0).all() for e in members) else 0


def _tail_mask(queries: int, keys: int, device) -> torch.Tensor:
    """(queries, keys) bool: the last `queries` of `keys` tokens, each seeing itself and those before it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _branch_mask(common: int, branches: tuple[int, ...], device) -> torch.Tensor:
    """(n, common + n) bool for the n tokens of all branches."""
    own = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool, device=device).tril_() for n in branches))
    return torch.cat([own.new_ones(len(own), common), own], dim=1)


def _eager(query, key, value, mask, is_causal, dropout, scaling, enable_gqa):
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if is_causal:
        mask = _tail_mask(query.shape[2], key.shape[2], query.device)
    scores = (query @ key.transpose(2, 3) * scaling).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(query.dtype), dropout) @ value


def _sdpa(query, key, value, mask, is_causal, dropout, scaling, enable_gqa):
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, scale=scaling, enable_gqa=enable_gqa
    )


def packed_attention(module, query, key, value, packing: Packing, trimmed: bool, dropout: float) -> torch.Tensor:
    """Attention within the groups of a packed row.

    query: (1, heads, n, head_dim) for all tokens, or with `trimmed` for those of `Packing.kept_rows` alone; key and
    value: (1, key heads, length, head_dim). Returns (1, n, heads, head_dim).

    Flash attention takes groups without branches in one call over the whole row. The others go group by group and
    build no mask that spans two of them: causal attention needs none, branches one of their own tokens by the group's.
    """
    kind = module.config._attn_implementation
    if kind == "flash_attention_2":
        return _flash(module, query, key, value, packing, trimmed, dropout)
    attend = _eager if kind == "eager" else _sdpa
    options = {"dropout": dropout, "scaling": module.scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs, q, k = [], 0, 0
    for group in packing.groups:
        keys, values = (x[:, :, k : k + group.size] for x in (key, value))
        rows = group.tail if trimmed else group.length
        if rows:
            # Where most rows are asked for, all of them without a mask cost less.
            mask = None
            if rows < group.length:
                shape = (rows, group.length)
                mask = packing.cached(shape, lambda s=shape: _tail_mask(*s, query.device))
            own = query[:, :, q : q + rows]
            common = (keys[:, :, : group.length], values[:, :, : group.length])
            outputs.append(attend(own, *common, mask, is_causal=mask is None, **options))
        if group.branches:
            n = sum(group.branches)
            shape = (group.length, group.branches)
            mask = packing.cached(shape, lambda s=shape: _branch_mask(*s, query.device))
            own = query[:, :, q + rows : q + rows + n]
            outputs.append(attend(own, keys, values, mask, is_causal=False, **options))
        q += rows + sum(group.branches)
        k += group.size
    output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return output.transpose(1, 2)


def _flash(module, query, key, value, packing: Packing, trimmed: bool, dropout: float) -> torch.Tensor:
    if any(group.branches for group in packing.groups):
        raise ValueError("flash attention can't share an image between branches: pack with share_images=False")

    def bounds(lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return packing.cached(lengths, lambda: ends.to(query.device, torch.int32, non_blocking=True))

    keys = tuple(group.length for group in packing.groups)
    queries = tuple(group.tail for group in packing.groups) if trimmed else keys
    # Queries that are the last of their keys: the kernel aligns its causal mask at the end.
    return ALL_ATTENTION_FUNCTIONS["flash_attention_2"](
        module,
        query,
        key,
        value,
        None,
        dropout=dropout,
        scaling=module.scaling,
        cu_seq_lens_q=bounds(queries),
        cu_seq_lens_k=bounds(keys),
        max_length_q=max(queries),
        max_length_k=max(keys),
    )[0]
