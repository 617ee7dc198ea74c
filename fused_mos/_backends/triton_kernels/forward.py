"""Calls of the forward kernels: statistics and samples of single rows, and the mixture's log-probabilities and most
probable classes.
"""

import torch
import triton
from torch import Tensor

from . import mixture, rows
from .configurations import Tile
from .launch import architecture_of, choose_tile, launch
from .mixture import Mixture
from .operands import aligned, empty_float32, unwritten_target_logits
from .tiles import Logits

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
    rows_: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
) -> tuple[Tensor, Tensor, Tensor]:  # maximum, log_total and target_logit, (R,) each
    n = rows_.shape[0]
    rows_, weight = aligned(rows_), aligned(weight)
    maximum, log_total = empty_float32(rows_, n), empty_float32(rows_, n)
    target_logit = unwritten_target_logits(rows_, n)
    write_statistics(Logits(rows_, weight, bias, n, weight.shape[0]), target, maximum, log_total, target_logit)
    return maximum, log_total, target_logit


def write_statistics(
    logits: Logits,  # of R rows, aligned
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,) out
    log_total: Tensor,  # (R,) out
    target_logit: Tensor | None,  # (R,) out
) -> None:
    z, n = logits.z_ptr, logits.n_rows
    if n == 0:
        return
    tile, constants = choose_tile("statistics", z, n)
    splits, tiles_of_split = splits_of_vocabulary(n, logits.n_classes, tile, z.device)
    maxima, totals = empty_float32(z, splits, n), empty_float32(z, splits, n)
    grid = triton.cdiv(n, tile.rows), splits
    outputs = maxima, totals, target_logit
    launch(rows.statistics_kernel, grid, logits, target, *outputs, tiles_of_split, D=z.shape[1], **constants)
    blocks = (triton.cdiv(n, 32),)
    launch(rows.combine_kernel, blocks, maxima, totals, maximum, log_total, n, splits, BLOCK=32, SPLITS=32)


def sample(
    rows_: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:  # (R,)
    """Gumbel-max, with random numbers that depend on the seed, the row and the class alone."""
    rows_, weight = aligned(rows_.contiguous()), aligned(weight)
    n, d = rows_.shape
    logits = Logits(rows_, weight, bias, n, weight.shape[0])
    tile, constants = choose_tile("sample", rows_, n)
    splits, tiles_of_split = splits_of_vocabulary(n, logits.n_classes, tile, rows_.device)
    seed = torch.randint(2**62, (1,), generator=generator, device=rows_.device)
    best, index = empty_float32(rows_, splits, n), seed.new_empty(splits, n)
    grid = triton.cdiv(n, tile.rows), splits
    launch(rows.sample_kernel, grid, logits, seed, best, index, 1 / temperature, tiles_of_split, D=d, **constants)
    return _first_of_best(best, index)


def _first_of_best(best: Tensor, index: Tensor) -> Tensor:  # (splits, N), (splits, N) -> (N,)
    return torch.where(best == best.amax(0), index, torch.iinfo(torch.int64).max).amin(0)


# ---------------------------------------------------------------------------------------------------------- the mixture


def log_prob(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
) -> Tensor:  # (N, V)
    n, k, d = latent.shape
    logits = Logits(aligned(latent.view(-1, d)), aligned(weight), bias, n, weight.shape[0])
    tile, constants = choose_tile("mixture", logits.z_ptr, n)
    experts = Mixture(log_prior, maximum, log_total)
    result = empty_float32(latent, n, logits.n_classes)
    grid = triton.cdiv(n, tile.rows), triton.cdiv(logits.n_classes, tile.classes)
    constants |= {"K": k, "D": logits.z_ptr.shape[1]}
    launch(mixture.log_prob_kernel, grid, logits, experts, result, **constants)
    return result


def predict(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
) -> Tensor:  # (N,)
    n, k, d = latent.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=latent.device)
    logits = Logits(aligned(latent.view(-1, d)), aligned(weight), bias, n, weight.shape[0])
    experts = Mixture(log_prior, maximum, log_total)
    tile, constants = choose_tile("mixture", logits.z_ptr, n)
    splits, tiles_of_split = splits_of_vocabulary(n, logits.n_classes, tile, latent.device)
    best, index = empty_float32(latent, splits, n), torch.empty((splits, n), dtype=torch.int64, device=latent.device)
    grid = triton.cdiv(n, tile.rows), splits
    constants |= {"K": k, "D": logits.z_ptr.shape[1]}
    launch(mixture.predict_kernel, grid, logits, experts, best, index, tiles_of_split, **constants)
    return _first_of_best(best, index)
