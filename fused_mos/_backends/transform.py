"""Transform of an expert's logits, bias included, before its softmax: a soft cap, then a temperature."""

from typing import NamedTuple


class Transform(NamedTuple):
    """l′ = c·tanh(l/c) / T, with the derivative (1 − (T l′/c)²) / T.

    The soft cap is that of Gemma 2 (Gemma Team 2024, section 2).
    """

    softcap: float = 0.0
    """c > 0, or 0 for no cap: l / T with the derivative 1 / T."""
    temperature: float = 1.0
    """T > 0."""


IDENTITY = Transform()
