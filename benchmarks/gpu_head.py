"""Times the head's calls on a GPU, ours and the peers', eager and captured."""

import functools
import gc

import torch

from fused_mos import functional as F
from fused_mos._backends.triton_kernels.proof import float32_products

from . import gpu_timing as timing
from .gpu_cases import OURS, SHAPES, STEP
from .gpu_device import DEVICE, DRY_RUN
from .harness import attempt, clear, inputs, memory, spread, step
from .peers import COMPILED, MIXTURE, SINGLE, Loss, compiled, unavailable

ROUNDS = 2 if DRY_RUN else 30
PROFILED = 1 if DRY_RUN else 5
"""Calls under the profiler."""
BUDGET = 2.0
"""Seconds after which no more rounds start, once there are three."""


class Failed(Exception):
    """The call cannot be measured, for the reason in one line."""

    name_in_row = "failed"


class Unavailable(Failed):
    """The peer is not installed or does not support this device."""

    name_in_row = "unavailable"


def mean_loss(*arguments: torch.Tensor) -> torch.Tensor:
    return F.mos_nll_loss(*arguments, backend="triton")


class Head:
    """The calls at one shape and dtype, on shared tensors."""

    def __init__(self, shape: str, dtype: str):
        self.sizes = SHAPES[shape]
        with float32_products(dtype) as self.dtype:
            self.products = timing.products(self.sizes, self.dtype)
        self.precision = dtype
        self.arguments = inputs(*self.sizes, self.dtype, device=DEVICE)
        self._calls: dict[tuple[str, str, str], timing.Call | Failed] = {}

    def measure(self, operation: str, contender: str, mode: str) -> dict:
        """A row with the times of one contender and their ratio to ours, in turns."""
        with float32_products(self.precision):
            call = self.call(operation, contender, mode)
            row = memory(call, self.arguments) if mode == "eager" else {"peak MiB": None, "kept MiB": None}
            calls = {contender: call}
            if contender != OURS:
                try:
                    calls[OURS] = self.call(operation, OURS, mode)
                except Failed:
                    pass  # its own row says why
            row |= timing.summary(timing.device_events(call, PROFILED), PROFILED)
            times = timing.in_turns(calls, ROUNDS, BUDGET)
        clear(self.arguments)
        fastest = min(self.products.values())
        row |= {
            "wall ms": spread(1e3 * wall for _, wall in times[contender]),
            "host ms": spread(1e3 * host for host, _ in times[contender]),
            "mm ms": fastest,
            "over mm": round(row["gpu ms"] / fastest, 3),
        }
        if len(calls) > 1:
            row["times ours"] = spread((t[1] / ours[1] for t, ours in zip(times[contender], times[OURS])), 3)
        return {"shape": self.sizes} | row

    def call(self, operation: str, contender: str, mode: str) -> timing.Call:
        """A warm call. Raises Failed."""
        key = operation, contender, mode
        if key not in self._calls:
            try:
                self._calls[key] = self._warm(*key)
            except Failed as failure:
                self._calls[key] = failure
        found = self._calls[key]
        if isinstance(found, Failed):
            raise found
        return found

    def _warm(self, operation: str, contender: str, mode: str) -> timing.Call:
        if contender != OURS and (reason := unavailable(contender, DEVICE)):
            raise Unavailable(reason)
        made: list[timing.Call] = []
        failure = attempt(lambda: made.append(self._made(operation, contender, mode)) or made[0]())
        clear(self.arguments)
        gc.collect()
        if failure:
            if failure.startswith(("ImportError", "ModuleNotFoundError")):
                raise Unavailable(failure)
            raise Failed(failure)
        return made[0]

    def _made(self, operation: str, contender: str, mode: str) -> timing.Call:
        if operation != STEP:
            return our_calls(self.arguments)[operation]
        loss = loss_of(contender, self.sizes[1])
        if mode == "graph":
            return timing.captured(functools.partial(gradients, loss, self.arguments)).replay
        if mode == "reduce-overhead":
            return reducing_overhead(loss, self.arguments)
        return functools.partial(step, loss, self.arguments)


def loss_of(contender: str, n_experts: int) -> Loss:
    if contender == OURS:
        return mean_loss
    name = contender.removesuffix(", compiled")
    if name != contender and name in COMPILED:
        return compiled(name)
    return (SINGLE if n_experts == 1 else MIXTURE)[contender]


def gradients(loss: Loss, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run forward and backward without accumulating into .grad: its autograd nodes remember an earlier stream."""
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    found = torch.autograd.grad(loss(*arguments), leaves, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def reducing_overhead(loss: Loss, arguments: list[torch.Tensor]) -> timing.Call:
    """A step of the loss under torch.compile(mode="reduce-overhead"), which replays graphs from the third call on."""
    fast = torch.compile(loss, mode="reduce-overhead", dynamic=False)

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        step(fast, arguments)

    for _ in range(timing.WARM_UPS):
        call()
    return call


def our_calls(arguments: list[torch.Tensor]) -> dict[str, timing.Call]:
    """The head's calls besides the mean step, by name."""
    z, a, w, y, b = arguments
    options = {"backend": "triton"}

    def without_grad(function, *inputs, **more):
        with torch.no_grad():
            return function(*inputs, **options, **more)

    def log_prob_step() -> None:
        clear(arguments)
        log_p = F.mos_log_prob(z, a, w, b, **options)
        log_p.backward(log_p.detach())  # any gradient will do

    return {
        "step none": lambda: step(lambda *x: F.mos_nll_loss(*x, reduction="none", **options).mean(), arguments),
        "forward": lambda: without_grad(F.mos_nll_loss, *arguments),
        "log_prob": lambda: without_grad(F.mos_log_prob, z, a, w, b),
        "log_prob step": log_prob_step,
        "predict": lambda: without_grad(F.mos_predict, z, a, w, b),
        "sample": lambda: without_grad(F.mos_sample, z, a, w, b),
        "topk": lambda: without_grad(F.mos_topk, z, a, w, b, k=5),
    }


_kept: dict[tuple[str, str], Head] = {}
"""The head of the last case. The next case at the same shape and dtype reuses its tensors and warm calls."""


def measure(shape: str, dtype: str, operation: str, contender: str, mode: str) -> dict:
    """The row of a case in gpu_cases."""
    if (shape, dtype) not in _kept:
        _kept.clear()
        gc.collect()
        torch._dynamo.reset()  # it stops compiling after a few shapes
        if not DRY_RUN:
            torch.cuda.empty_cache()
        _kept[shape, dtype] = Head(shape, dtype)
    return _kept[shape, dtype].measure(operation, contender, mode)
