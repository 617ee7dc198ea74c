"""Initial values of a head: a bias from class frequencies, and a check of a tied embedding's scale."""

import warnings

import torch
from torch import Tensor, nn


def warn_of_large(weight: nn.Parameter, stacklevel: int) -> None:
    """Warn if a tied embedding has the scale of nn.Embedding's default, N(0, 1). As a decoder it gives logits that are
    far too large, and the loss starts at several times log V.

    Only the first 256 rows are read. On a GPU this synchronizes once.
    """
    if weight.is_meta or type(weight.data) is not Tensor or not weight.numel():
        return
    std = weight.detach()[:256].float().std(correction=0).item()
    if std > 0.5:
        warnings.warn(
            f"weight has a standard deviation of {std:.2g}, far too large for an untrained decoder "
            "(nn.Embedding starts at 1); initialise the embedding first, for example with "
            "nn.init.uniform_(embedding.weight, -0.1, 0.1)",
            stacklevel=stacklevel,
        )


def smoothed(counts: Tensor, n_classes: int) -> Tensor:  # (V,) -> (V,) float64
    """Class frequencies with add-one smoothing, (count + 1) / (total + V).

    Raises TypeError or ValueError unless `counts` are (V,) finite numbers of occurrences.
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a Tensor, got {type(counts).__name__}")
    if counts.shape != (n_classes,):
        raise ValueError(f"counts must be (n_classes,) = ({n_classes},), got {tuple(counts.shape)}")
    counts = counts.detach().to("cpu", torch.float64)
    wrong = ~((counts >= 0) & counts.isfinite())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"counts must be finite and at least 0, got {counts[first]:g} for class {first}")
    total = counts.sum()
    if total < 2:
        raise ValueError(
            f"counts must be numbers of occurrences (not relative frequencies), at least 2 in all, got {total:g}"
        )
    return (counts + 1) / (total + n_classes)
