"""Calls of the forward kernels: statistics and samples of single rows, and the mixture's log-probabilities and most
probable classes.
"""

import torch
import triton
from torch import Tensor

from . import mixture, rows
from .configurations import Tile
from .launch import architecture_of, choose_tile, launch
from .operands import aligned, empty_float32, unwritten_target_logits

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs to aim at when the vocabulary is split because rows are few."""


def splits_of_vocabulary(n_rows: int, n_classes: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """How many splits of the vocabulary occupy the device, and the tiles of each."""
    tiles = triton.cdiv(n_classes, tile.classes)
    wanted = triton.cdiv(
        PROGRAMS_PER_MULTIPROCESSOR * architecture_of(device).multiprocessors, triton.cdiv(n_rows, tile.rows)
    )
    tiles_of_split = triton.cdiv(tiles, min(wanted, tiles))
    return triton.cdiv(tiles, tiles_of_split), tiles_of_split


# ---------------------------------------------------------------------------------------------------------- single rows


def row_statistics(
    rows_: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows_, weight = aligned(rows_), aligned(weight)
    maximum, log_total = (empty_float32(rows_, rows_.shape[0]) for _ in range(2))
    target_logit = unwritten_target_logits(rows_, rows_.shape[0])
    write_statistics(rows_, weight, bias, target, maximum, log_total, target_logit)
    return maximum, log_total, target_logit


def write_statistics(
    rows_: Tensor,  # (R, D), aligned
    weight: Tensor,  # (V, D), aligned
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,) out
    log_total: Tensor,  # (R,) out
    target_logit: Tensor | None,  # (R,) out
) -> None:
    n, n_classes = rows_.shape[0], weight.shape[0]
    if n == 0:
        return
    tile, constants = choose_tile("statistics", rows_, n)
    splits, tiles_of_split = splits_of_vocabulary(n, n_classes, tile, rows_.device)
    maxima, totals = empty_float32(rows_, splits, n), empty_float32(rows_, splits, n)
    launch(
        rows.statistics_kernel,
        (triton.cdiv(n, tile.rows), splits),
        rows_,
        weight,
        bias,
        target,
        maxima,
        totals,
        target_logit,
        n,
        n_classes,
        tiles_of_split,
        D=weight.shape[1],
        EXPERTS=1,
        HAS_BIAS=bias is not None,
        HAS_TARGET=target is not None,
        ROWS=tile.rows,
        RESIDENT=tile.resident,
        **constants,
    )
    launch(
        rows.combine_kernel, (triton.cdiv(n, 32),), maxima, totals, maximum, log_total, n, splits, BLOCK=32, SPLITS=32
    )


def sample(
    rows_: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """Gumbel-max, with random numbers that depend on the seed, the row and the class alone."""
    rows_, weight = aligned(rows_.contiguous()), aligned(weight)
    n, n_classes = rows_.shape[0], weight.shape[0]
    tile, constants = choose_tile("sample", rows_, n)
    splits, tiles_of_split = splits_of_vocabulary(n, n_classes, tile, rows_.device)
    seed = torch.randint(2**62, (1,), generator=generator, device=rows_.device)
    best, index = empty_float32(rows_, splits, n), seed.new_empty(splits, n)
    launch(
        rows.sample_kernel,
        (triton.cdiv(n, tile.rows), splits),
        rows_,
        weight,
        bias,
        seed,
        best,
        index,
        1 / temperature,
        n,
        n_classes,
        tiles_of_split,
        D=weight.shape[1],
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        RESIDENT=tile.resident,
        **constants,
    )
    return _first_of_best(best, index)


def _first_of_best(best: Tensor, index: Tensor) -> Tensor:  # (splits, N), (splits, N) -> (N,)
    return torch.where(best == best.amax(0), index, torch.iinfo(torch.int64).max).amin(0)


# ---------------------------------------------------------------------------------------------------------- the mixture


def mixture_constants(latent: Tensor, z: Tensor, bias: Tensor | None, family: str = "mixture") -> tuple[Tile, dict]:
    tile, constants = choose_tile(family, z, latent.shape[0])
    return tile, constants | {
        "K": latent.shape[1],
        "D": z.shape[1],
        "HAS_BIAS": bias is not None,
        "TOKENS": tile.rows,
        "RESIDENT": tile.resident,
    }


def log_prob(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    n, n_classes = latent.shape[0], weight.shape[0]
    z, e = aligned(latent.view(-1, latent.shape[-1])), aligned(weight)
    tile, constants = mixture_constants(latent, z, bias)
    result = empty_float32(latent, n, n_classes)
    launch(
        mixture.log_prob_kernel,
        (triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.classes)),
        z,
        e,
        bias,
        log_prior,
        maximum,
        log_total,
        result,
        n,
        n_classes,
        **constants,
    )
    return result


def predict(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    n, n_classes = latent.shape[0], weight.shape[0]
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=latent.device)
    z, e = aligned(latent.view(-1, latent.shape[-1])), aligned(weight)
    tile, constants = mixture_constants(latent, z, bias)
    splits, tiles_of_split = splits_of_vocabulary(n, n_classes, tile, latent.device)
    best, index = empty_float32(latent, splits, n), torch.empty((splits, n), dtype=torch.int64, device=latent.device)
    launch(
        mixture.predict_kernel,
        (triton.cdiv(n, tile.rows), splits),
        z,
        e,
        bias,
        log_prior,
        maximum,
        log_total,
        best,
        index,
        n,
        n_classes,
        tiles_of_split,
        **constants,
    )
    return _first_of_best(best, index)
