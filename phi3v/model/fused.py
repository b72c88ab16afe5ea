"""Elementwise functions of which an accelerator computes each in one kernel, made by `torch.compile`.

Plain torch runs several kernels for such a function, and each of them reads and writes memory, which is all that takes
time in them. A fused kernel also keeps intermediate results in fp32. Nothing is fused until `turn_on` is called, which
training does on an accelerator; on a CPU the plain functions run.
"""

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from ..ranks import world_size

FEWEST_ROWS = 64  # with fewer, the host takes longer to call a compiled function than the device to compute a plain one

LEAST_NUMBERS = 2**22  # in bf16, a GPU reads so many and writes them in 10 µs, as long as the host takes for two calls


class Fused:
    """A function of tensors with common leading dimensions, which counts as rows, and perhaps of others and numbers.

    Tensors of one dimension, like the weight of a norm, are not rows: every row needs all of them. The same holds for
    what it returns, which is a tensor or a tuple of them; one without rows is a sum over the rows.

    plain: the function as it runs if nothing is fused. It may change its arguments.
    pure: the same function, of rows (n, …), in a form that becomes one kernel: it changes nothing in place. By default
        `plain`.
    example: (rows, dtype, device) → arguments, on which the two are compared.
    """

    every: list["Fused"] = []

    def __init__(self, plain: Callable, example: Callable, pure: Callable | None = None):
        self.plain, self.pure, self.example = plain, pure or plain, example
        self.name = plain.__name__.strip("_")
        self.compiled, self.device_type = None, None
        Fused.every.append(self)

    def is_on(self, x: torch.Tensor) -> bool:
        """Whether it is fused on the device of `x`."""
        return self.compiled is not None and x.device.type == self.device_type

    def __call__(self, *args):
        x = args[0]
        if not self.is_on(x):
            return self.plain(*args)
        common = min(a.dim() for a in args if _has_rows(a)) - 1
        if x.shape[:common].numel() < FEWEST_ROWS:
            return self.plain(*args)
        with torch.no_grad():  # graphs differ between tensors that need gradients and others; views made here need none
            rows = [a.flatten(0, common - 1) if _has_rows(a) else a for a in args]
            rows = [a.detach() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in rows]
        for a in filter(_has_rows, rows):
            torch._dynamo.maybe_mark_dynamic(a, 0)  # so that one graph serves all lengths
        # None of these operations is one that autocast changes, but another graph would be compiled under autocast.
        autocast = torch.amp.is_autocast_available(self.device_type) and torch.is_autocast_enabled(self.device_type)
        if autocast:
            torch.set_autocast_enabled(self.device_type, False)
        try:
            found = self.compiled(*rows)
        except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as e:
            if not isinstance(e, (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)):
                raise
            self.compiled = None  # nothing has been computed yet
            text = f"{self.name} could not be compiled for other inputs, and runs unfused: {_line(e)}"
            warnings.warn(text, stacklevel=2)
            return self.plain(*args)
        finally:
            if autocast:
                torch.set_autocast_enabled(self.device_type, True)
        shaped = [a.unflatten(0, x.shape[:common]) if _has_rows(a) else a for a in _as_tuple(found)]
        return tuple(shaped) if isinstance(found, tuple) else shaped[0]

    def compile(self, device: torch.device, backend: str):
        # In this process alone: starting helper processes would take longer than compiling these few kernels.
        options = {"compile_threads": 1}
        # Sums over a row and over all rows in one kernel, where torch can do that, whatever the number of rows.
        if "triton.mix_order_reduction_non_strict_mode" in torch._inductor.list_options():
            options["triton.mix_order_reduction_non_strict_mode"] = True
        options = {"options": options} if backend == "inductor" else {}
        self.compiled = torch.compile(self.pure, fullgraph=True, backend=backend, **options)
        self.device_type = device.type

    def check(self, device: torch.device, dtype: torch.dtype):
        """Raises ValueError if the compiled function does not compute what the plain one computes in fp32, to within
        two roundings of the largest number to `dtype`."""
        args = self.example(2 * FEWEST_ROWS, dtype, device)
        exact = self._plain_in(torch.float32, args)
        dtypes = [x.dtype for x in self._plain_in(dtype, args)]
        found = _as_tuple(self(*args))
        if self.compiled is None:
            raise ValueError("it can't be compiled")
        for one, own, other in zip(found, dtypes, exact, strict=True):
            error = (one.float() - other).abs().max() / other.abs().max()
            if not error <= 2 * torch.finfo(dtype).eps or one.dtype != own:
                raise ValueError(f"it differs from the plain function by {error:.1e} of the largest number")

    def _plain_in(self, dtype: torch.dtype, args) -> tuple[torch.Tensor, ...]:
        """What the plain function computes of copies of `args` in this dtype; those in fp32 stay so."""
        return _as_tuple(
            self.plain(
                *(
                    a.to(torch.promote_types(dtype, a.dtype), copy=True) if isinstance(a, torch.Tensor) else a
                    for a in args
                )
            )
        )


def _has_rows(a) -> bool:
    return isinstance(a, torch.Tensor) and a.dim() > 1


def _as_tuple(found) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def fused(example: Callable, pure: Callable | None = None) -> Callable[[Callable], Fused]:
    """Makes a `Fused` of the function below it."""
    return lambda plain: Fused(plain, example, pure)


def compile_all(device: torch.device, backend: str = "inductor"):
    """Compiles the functions when they are first called on this kind of device."""
    for function in Fused.every:
        function.compile(device, backend)


def is_fused(x: torch.Tensor) -> bool:
    """Whether functions are fused on the device of `x`."""
    return any(function.is_on(x) for function in Fused.every)


def is_worth_fusing(x: torch.Tensor) -> bool:
    """Whether functions are fused, and `x` is so large that saving a pass over it is worth more time of the host."""
    return x.numel() >= LEAST_NUMBERS and is_fused(x)


def turn_off():
    """From now on the plain functions run."""
    for function in Fused.every:
        function.compiled = None


def turn_on(device: torch.device, dtype: torch.dtype, backend: str = "inductor") -> list[str]:
    """Compiles the functions and compares each with the plain one, on small inputs. If one of them differs or does not
    compile on any rank, the plain functions run on all ranks. Every rank calls it.

    dtype: in which the model computes. Returns lines that say what failed.
    """
    compile_all(device, backend)
    problem = None
    for function in Fused.every:
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                function.check(device, dtype)
        except Exception as e:  # whatever a compiler may raise
            problem = f"{function.name}: {_line(e)}"
            break
    problems = [problem] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    if not any(problems):
        return []
    turn_off()
    rank, problem = next((rank, found) for rank, found in enumerate(problems) if found)
    text = "plain functions run in place of fused ones, as with --no_fuse, and training is a little slower"
    return [f"{text}; on rank {rank}, {problem}"]


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
