"""The rank of a model's matrix of log-probabilities (Yang et al. 2018, sections 2.2 and 3.2), computed from blocks of
rows."""

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


class Spectrum:
    """Singular values of a matrix given in blocks of rows, through its Gram matrix, (V, V) float64 of 8·V² bytes.

    Squaring halves the number of digits: singular values below 1e-7 of the largest are noise. The rank of float32 data
    needs 1e-5.

    Args:
        n_columns: V.
        device: device of the Gram matrix; rows are moved there.

    Raises ValueError unless n_columns is positive.
    """

    def __init__(self, n_columns: int, device: torch.device | str = "cpu"):
        if n_columns < 1:
            raise ValueError(f"n_columns must be positive, got {n_columns}")
        self.n_rows = 0
        self.gram = torch.zeros(n_columns, n_columns, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Add rows (n, V) of any floating dtype. Raises ValueError for another width or values that are not finite."""
        if rows.dim() != 2 or rows.shape[1] != self.gram.shape[1]:
            raise ValueError(f"rows must be (n, {self.gram.shape[1]}), got {tuple(rows.shape)}")
        rows = rows.to(self.gram)
        if not rows.isfinite().all():
            raise ValueError("rows must be finite, but some are not: a class of probability 0 has no logarithm")
        self.gram.addmm_(rows.T, rows)
        self.n_rows += len(rows)

    def singular_values(self) -> Tensor:
        """Singular values (min(n_rows, V),) float64, largest first. Takes about 4/3·V³ multiplications and
        additions."""
        squares = torch.linalg.eigvalsh(self.gram).flip(0)
        return squares[: self.n_rows].clamp(min=0).sqrt()


def rank_threshold(n_rows: int, n_columns: int, eps: float = FLOAT32_EPS) -> float:
    """The ratio to the largest singular value at or below which others count as 0: ½·√(m + n + 1)·ε, as in the paper.
    `eps` is that of the dtype in which the matrix was computed."""
    return 0.5 * (n_rows + n_columns + 1) ** 0.5 * eps


def numerical_rank(singular_values: Tensor, n_rows: int, n_columns: int, eps: float = FLOAT32_EPS) -> int:
    """The number of singular values above `rank_threshold`. Raises ValueError if there are none at all."""
    if not singular_values.numel():
        raise ValueError("singular_values must not be empty")
    return int((singular_values > rank_threshold(n_rows, n_columns, eps) * singular_values.max()).sum())
