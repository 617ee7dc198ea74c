"""The one rule for numbers that are not finite: they end a run, and no checkpoint holds them."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from .errors import TrainingDiverged


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor of floating-point numbers that has a NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        # least and largest number instead of isfinite: no copy of a large tensor, and NaN is both
        if tensor.is_floating_point() and tensor.numel():
            if tensor.element_size() == 1:
                tensor = tensor.float()  # of 8 bits torch tells no extremes
            if not all(math.isfinite(extreme.item()) for extreme in tensor.detach().aminmax()):
                return name
    return None


@contextlib.contextmanager
def explained(tensors: Callable[[], Mapping[str, Tensor]], diverged: Callable[[str], Exception]) -> Iterator[None]:
    """Turns the ValueError of a head that is given NaN, which it looks for on a CPU alone, into the error that
    `diverged` makes of what happened. Where all `tensors` are finite, the ValueError is another."""
    try:
        yield
    except ValueError as error:
        if (name := first_not_finite(tensors())) is None:
            raise
        raise diverged(f"{name} is no longer finite") from error


def diverged(what: str, step: int, checkpoints: Path) -> TrainingDiverged:
    """The error of a run whose `checkpoints` are from before what happened."""
    return TrainingDiverged(
        f"training diverged at step {step}: {what}; the checkpoints in {checkpoints} are from before that; try a lower "
        "--lr or --clip, and another --out"
    )
