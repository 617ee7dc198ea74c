"""Detection of NaN and infinity: they end a run, and are never saved in a checkpoint."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from .errors import TrainingDiverged


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first floating-point tensor with a NaN or an infinity, or None."""
    for name, tensor in tensors.items():
        # aminmax instead of isfinite: it makes no copy of a large tensor, and propagates NaN
        if tensor.is_floating_point() and tensor.numel():
            if tensor.element_size() == 1:
                tensor = tensor.float()  # torch has no aminmax of 8-bit floats
            if not all(math.isfinite(extreme.item()) for extreme in tensor.detach().aminmax()):
                return name
    return None


@contextlib.contextmanager
def explained(tensors: Callable[[], Mapping[str, Tensor]], diverged: Callable[[str], Exception]) -> Iterator[None]:
    """Replaces the ValueError of a head that finds NaN in its input, which it checks on a CPU only, by the error that
    `diverged` returns for a message. A ValueError passes through if all `tensors` are finite."""
    try:
        yield
    except ValueError as error:
        if (name := first_not_finite(tensors())) is None:
            raise
        raise diverged(f"{name} is no longer finite") from error


def diverged(what: str, step: int, checkpoints: Path) -> TrainingDiverged:
    """Returns the error of a run that diverged. Its folder `checkpoints` only has checkpoints from before that."""
    return TrainingDiverged(
        f"training diverged at step {step}: {what}; the checkpoints in {checkpoints} are from before that; try a lower "
        "--lr or --clip, and another --out"
    )
