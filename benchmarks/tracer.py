"""Counts the kernels that a GPU would run for code that computes on meta tensors.

A `Tracer` sees every operation of the forward pass, the backward pass and recomputation, also those inside of
hand-written gradients. It knows no function of the model by its name, but only what kinds of operations there are:

- A view costs nothing, and neither does an operation on the host's own tensors.
- "matrix": a matrix product or a convolution. Its FLOPs are those of torch's FlopCounterMode.
- "attention": an attention kernel. It computes two matrix products of all pairs of a query and a key in the forward
  pass, and five in the backward pass. A causal kernel computes only the pairs that attend. The lengths of packed
  examples, which meta tensors do not hold, are taken from the host's tensor that they were copied from.
- "memory": everything else, which reads its operands and writes its results, each once. An operand that is broadcast is
  read once. An in-place operation reads and writes its operand; `out=` and `copy_` only write theirs. A gather reads
  as much as it returns. The gradient of a slice writes zeros and then copies. The gradient of a norm reads its
  operands twice, because the gradient of the weight is a kernel of its own.

Every other operation counts as one launch. Operations that are one kernel on a GPU but not on meta tensors are replaced
by what is in `one_kernel`.
"""

import bisect
import contextlib
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

PHASES = ("forward", "backward", "recomputation")
BACKWARD_PRODUCTS = 2.5  # FLOPs of an attention kernel's backward pass, as a multiple of the forward pass
ONLY_WRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
GATHER = {"index", "index_select", "gather", "embedding", "take", "take_along_dim"}
SCATTER = {"scatter_", "scatter_add_", "index_add_", "index_copy_"}
SLICE_GRADIENTS = {"slice_backward", "select_backward"}
NORM_GRADIENTS = {"native_layer_norm_backward", "rms_norm_backward"}
FILL = re.compile(r"(new_)?(zeros|ones|full)(_like)?")  # with nothing from their operands
ALLOCATE = re.compile(r"(new_)?empty(_like|_strided|_permuted)?|_unsafe_view|lift_fresh")
NF4_BYTES = 0.516  # of a weight in 4 bits, with its scales


@dataclass(frozen=True)
class Kernel:
    """One launch.

    part: of the model; phase: one of PHASES; kind: "matrix", "attention" or "memory".
    name: of the operation. moved: the bytes that it reads and writes.
    """

    part: str
    phase: str
    kind: str
    name: str
    flops: float
    moved: float


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements. Elements that are only repeated by `expand` count once."""
    lengths = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return math.prod(lengths) * tensor.element_size()


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Tracer(TorchDispatchMode):
    """A context around everything that is to be counted.

    kernels: in the order in which they were launched.
    operations: how many operations the host has dispatched in each phase, views included.
    """

    active: "Tracer | None" = None

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.operations = dict.fromkeys(PHASES, 0)
        self.quantized: set[int] = set()  # storages of weights in 4 bits: a product that reads one dequantises it first
        self._host_values = WeakIdKeyDictionary()  # of small integer tensors that were copied from the host
        self._parts, self._marks, self._last_part = ["batch"], [(0, "batch")], "batch"
        self._in_backward, self._recomputing, self._merged = False, False, 0

    def __enter__(self):
        Tracer.active = self
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        Tracer.active = None

    # ---- Where an operation belongs ----

    def follow(self, module: torch.nn.Module, part: str):
        """Counts what `module` computes under this part, except for what modules inside of it with another part do."""
        module.register_forward_pre_hook(lambda *_: self._enter(part))
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def following(self, function: Callable, part: str) -> Callable:
        """The same for a function."""

        @functools.wraps(function)
        def follow(*args, **kwargs):
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return follow

    def checkpoint_contexts(self):
        """The `context_fn` for activation checkpointing, with which recomputation is recognised."""
        part = self._parts[-1]

        @contextlib.contextmanager
        def recomputing():
            self._recomputing = True
            self._enter(part)
            try:
                yield
            finally:
                self._leave()
                self._recomputing = False

        return contextlib.nullcontext(), recomputing()

    def _enter(self, part: str):
        self._parts.append(part)
        self._marks.append((torch._C._autograd._get_sequence_nr(), part))

    def _leave(self):
        self._parts.pop()
        self._marks.append((torch._C._autograd._get_sequence_nr(), self._parts[-1]))

    def backward(self, loss: torch.Tensor):
        self._in_backward = True
        try:
            loss.backward()
        finally:
            self._in_backward = False

    def _place(self) -> tuple[str, str]:
        """The part and the phase of the operation at hand. In the backward pass the part follows from the number of
        autograd's node, because nodes are numbered in the order of the forward pass."""
        if self._recomputing:
            return self._parts[-1], "recomputation"
        node = torch._C._current_autograd_node()
        if node is None and not self._in_backward:
            return self._parts[-1], "forward"
        if node is not None and node._sequence_nr() < 2**63:  # a node that fills `.grad` has no number of its own
            at = bisect.bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0])
            self._last_part = self._marks[at - 1][1]
        return self._last_part, "backward"

    # ---- What it costs ----

    @contextlib.contextmanager
    def merged(self):
        """Memory-bound operations within are not counted: the caller counts all of them as one kernel."""
        self._merged += 1
        try:
            yield
        finally:
            self._merged -= 1

    def count(self, kind: str, name: str, flops: float, moved: float):
        self.kernels.append(Kernel(*self._place(), kind, name, flops, moved))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        self.operations[self._place()[1]] += not self._merged
        if name == "_to_copy" and given["self"].device.type == "cpu" and given["self"].dim() == 1:
            self._host_values[out] = given["self"].tolist()
        if _is_free(func, name) or all(t.device.type != "meta" for t in tensors((given, out))):
            return out
        moved = _moved(func, name, given, out)
        if "attention" in name or "attn" in name:
            self.count("attention", name, self._attention_flops(func._schema.name, given), moved)
        elif func._overloadpacket in flop_registry:
            for weight in tensors(given):
                if weight.untyped_storage()._cdata in self.quantized:
                    self.count("memory", "dequantize", 0.0, weight.numel() * (NF4_BYTES + weight.element_size()))
            self.count("matrix", name, flop_registry[func._overloadpacket](*args, **kwargs, out_val=out), moved)
        elif not self._merged:
            self.count("memory", name, 0.0, moved)
        return out

    def _attention_flops(self, name: str, given: dict) -> float:
        query, key = (next(given[n] for n in names if n in given) for names in (("query", "q"), ("key", "k")))
        window = given.get("window_size") or (given.get("window_size_left"), given.get("window_size_right"))
        causal = given.get("is_causal") or given.get("causal") or (window[1] == 0 and window[0] != 0)
        bounds = [value for n, value in given.items() if n.startswith(("cu_seq", "cum_seq")) and value is not None]
        copies, heads_at = (query.shape[0], 1) if "scaled_dot" in name else (math.prod(query.shape[:-3]), -2)
        if bounds:  # (tokens, heads, head_dim), examples one after another
            lengths = [self._lengths(ends, of) for ends, of in zip(bounds, (query, key), strict=False)]
        elif heads_at == 1:  # (batch, heads, n, head_dim)
            lengths = [[query.shape[2]], [key.shape[2]]]
        else:  # (batch, n, heads, head_dim)
            lengths = [[query.shape[-3]], [key.shape[-3]]]
        pairs = sum(n * m - (n * (n - 1) // 2 if causal else 0) for n, m in zip(lengths[0], lengths[-1], strict=True))
        products = 2 * BACKWARD_PRODUCTS if "backward" in name else 2
        return products * 2 * pairs * copies * query.shape[heads_at] * query.shape[-1]

    def _lengths(self, ends: torch.Tensor, of: torch.Tensor) -> list[float]:
        """The lengths of packed examples from their bounds; equal lengths if the host's values are not known."""
        if ends in self._host_values:
            values = self._host_values[ends]
            return [b - a for a, b in zip(values, values[1:], strict=False)]
        return [of.shape[0] / (len(ends) - 1)] * (len(ends) - 1)


def _is_free(func, name: str) -> bool:
    """Whether an operation launches no kernel, because it returns a view, or memory to which nothing is written."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.namespace == "prim" or bool(ALLOCATE.fullmatch(name))


def _moved(func, name: str, given: dict, out) -> float:
    """Bytes that an operation reads and writes."""
    changes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    changed = tensors([value for key, value in given.items() if key in changes])
    operands = tensors([value for key, value in given.items() if key not in changes])
    read, written = sum(map(size, operands)), sum(map(size, changed or tensors(out)))
    if name in ("index_put", "index_put_"):  # the first copies the whole tensor before
        return 2 * size(given["values"]) + (0 if changed else size(given["self"]) + written)
    if name in SCATTER:
        return 3 * read
    if name in GATHER:
        return 2 * written + sum(size(t) for t in operands if not t.is_floating_point())
    if name in SLICE_GRADIENTS or name in NORM_GRADIENTS:
        return 2 * read + written
    if FILL.fullmatch(name):
        return written
    return read + written + (0 if name in ONLY_WRITE or "out" in changes else sum(map(size, changed)))
