"""The exchange between ranks after each backward pass, the only point at which a step waits.

It all-reduces one tensor of numbers and, with a sharded decoder, one of gradients before it.
"""

import math
import signal
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime import signals
from .ranks import Ranks


class StepDecision(NamedTuple):
    """What all ranks do after a step, because at least one has a reason to."""

    signum: int  # signal that ends the run, or 0
    save: bool
    stop: bool  # the time limit is reached


class StepTotals(NamedTuple):
    """Results of a step over all ranks."""

    nll: float  # summed over the words
    gradient_norm: float
    decision: StepDecision


def exchange(
    nll: Tensor,  # (), summed over this rank's words
    sharded: list[Tensor],  # gradients of this rank's shards of parameters
    whole: list[Tensor],  # gradients of parameters that all ranks have in full
    ranks: Ranks,
    clock: signals.CheckpointClock,
) -> StepTotals:
    """Sums a step's results over all ranks, and makes them take the same decision.

    With a sharded decoder, `whole` is replaced by its mean over the ranks that share the decoder. Their gradients are
    equal up to the rounding of non-deterministic kernels; the mean keeps parameters identical.
    """
    if ranks.n_vocab > 1:
        _average(whole, ranks)
    squares = [
        torch.nn.utils.get_total_norm(grads).double() ** 2 if grads else nll.new_zeros(()) for grads in (sharded, whole)
    ]
    times = (clock.due, clock.over) if ranks.is_main else (0, 0)  # only the main rank's clock counts: clocks differ
    stops = [signals.noted() == number for number in signals.SIGNALS]
    square = squares[0] / ranks.n_data + squares[1] / ranks.n_ranks
    numbers = ranks.sums(nll / ranks.n_vocab, square, *stops, *times)
    total, total_square, interrupt, terminate, due, over = numbers.tolist()
    signum = signal.SIGINT if interrupt else signal.SIGTERM if terminate else 0
    return StepTotals(total, math.sqrt(total_square), StepDecision(signum, bool(due or signum), bool(over)))


def _average(gradients: list[Tensor], ranks: Ranks) -> None:
    """Replaces each gradient by its mean over the ranks that share a decoder, in one all-reduce."""
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=ranks.mesh["vocab"].get_group())
    together.div_(ranks.n_vocab)
    parts = together.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])
