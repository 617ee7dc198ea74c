"""The exchange between ranks that ends each step's backward pass. It is the one time that a step waits.

It is one tensor of numbers; with a sharded decoder, one of gradients before it.
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
    """The actions of all ranks after a step, if one of them has reason to act."""

    signum: int  # of a signal that ends the run, or 0
    save: bool
    stop: bool  # the time is up


class StepTotals(NamedTuple):
    """A step over all ranks."""

    nll: float  # summed over the words
    gradient_norm: float
    decision: StepDecision


def exchange(
    nll: Tensor,  # (), summed over this rank's words
    sharded: list[Tensor],  # gradients of this rank's parts of parameters
    whole: list[Tensor],  # gradients of parameters that all ranks have
    ranks: Ranks,
    clock: signals.CheckpointClock,
) -> StepTotals:
    """Sums a step over all ranks, and has them decide alike. `whole` becomes the mean over ranks that share a decoder:
    theirs are the same up to rounding, on which some kernels do not decide alike."""
    if ranks.n_vocab > 1:
        _average(whole, ranks)
    squares = [
        torch.nn.utils.get_total_norm(grads).double() ** 2 if grads else nll.new_zeros(()) for grads in (sharded, whole)
    ]
    times = (clock.due, clock.over) if ranks.is_main else (0, 0)  # clocks differ
    stops = [signals.noted() == number for number in signals.SIGNALS]
    square = squares[0] / ranks.n_data + squares[1] / ranks.n_ranks
    numbers = ranks.sums(nll / ranks.n_vocab, square, *stops, *times)
    total, total_square, interrupt, terminate, due, over = numbers.tolist()
    signum = signal.SIGINT if interrupt else signal.SIGTERM if terminate else 0
    return StepTotals(total, math.sqrt(total_square), StepDecision(signum, bool(due or signum), bool(over)))


def _average(gradients: list[Tensor], ranks: Ranks) -> None:
    """Puts the mean over the ranks that share a decoder in each gradient's place, by one exchange."""
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=ranks.mesh["vocab"].get_group())
    together.div_(ranks.n_vocab)
    parts = together.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])
