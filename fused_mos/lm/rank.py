"""The rank of a model's log-probabilities (Yang et al. 2018, sections 2.2 and 3.2), of which only a block of rows is
held at a time."""

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


class Spectrum:
    """Singular values of a matrix that comes a block of rows at a time, through its Gram matrix: (V, V) float64, 8·V²
    bytes.

    Squares halve the digits: singular values below 1e-7 of the largest are noise. The rank of float32 numbers asks for
    1e-5.

    Args:
        n_columns: V.
        device: where the Gram matrix is, and rows are moved to.
    """

    def __init__(self, n_columns: int, device: torch.device | str = "cpu"):
        if n_columns < 1:
            raise ValueError(f"n_columns must be positive, got {n_columns}")
        self.n_rows = 0
        self.gram = torch.zeros(n_columns, n_columns, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """rows (n, V), of any floating dtype. Raises ValueError for another width, or numbers that are not finite."""
        if rows.dim() != 2 or rows.shape[1] != self.gram.shape[1]:
            raise ValueError(f"rows must be (n, {self.gram.shape[1]}), got {tuple(rows.shape)}")
        rows = rows.to(self.gram)
        if not rows.isfinite().all():
            raise ValueError("rows must be finite, but some are not: a class of probability 0 has no logarithm")
        self.gram.addmm_(rows.T, rows)
        self.n_rows += len(rows)

    def singular_values(self) -> Tensor:
        """(min(n_rows, V),) float64, the largest first. Takes the time of 4/3·V³ multiplications and additions."""
        squares = torch.linalg.eigvalsh(self.gram).flip(0)
        return squares[: self.n_rows].clamp(min=0).sqrt()


def rank_threshold(n_rows: int, n_columns: int, eps: float = FLOAT32_EPS) -> float:
    """Singular values at most this many times the largest count as 0: ½·√(m + n + 1)·ε, as in the paper. `eps` is that
    of the dtype in which the matrix was computed."""
    return 0.5 * (n_rows + n_columns + 1) ** 0.5 * eps


def numerical_rank(singular_values: Tensor, n_rows: int, n_columns: int, eps: float = FLOAT32_EPS) -> int:
    """How many of the singular values are above `rank_threshold`. Raises ValueError where none is given."""
    if not singular_values.numel():
        raise ValueError("singular_values must not be empty")
    return int((singular_values > rank_threshold(n_rows, n_columns, eps) * singular_values.max()).sum())
