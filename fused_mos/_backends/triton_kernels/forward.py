"""Launches of the kernels without gradients: statistics and samples of single rows, the mixture's loss,
log-probabilities and most probable classes.
"""

import functools

import torch
from torch import Tensor

from ..products import cdiv
from ..transform import IDENTITY, Transform
from . import loss as loss_kernels
from . import mixture, rows
from .configurations import Tile
from .described import described_statistics_kernel
from .launch import architecture_of, choose_tile, launch
from .loss import Splits, Statistics, Targets, WeightedLosses
from .mixture import Mixture
from .operands import aligned, aligned_weight, described, described_experts, empty_float32, mixture_constants
from .tiles import Logits, scales

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Programs to aim for when the vocabulary is split because there are few rows."""


def splits_of_vocabulary(n_rows: int, n_classes: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """The number of splits of the vocabulary that occupies the device, and the tiles of each."""
    return _splits(cdiv(n_classes, tile.classes), cdiv(n_rows, tile.rows), architecture_of(device).multiprocessors)


@functools.lru_cache(maxsize=1024)
def _splits(tiles: int, programs_of_split: int, multiprocessors: int) -> tuple[int, int]:
    """A number of splits that gives about as many programs as wanted and the least idle time at the end, and the tiles
    of each."""
    most = min(cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, programs_of_split), tiles)

    def tiles_in_turn(splits: int) -> int:
        return cdiv(programs_of_split * splits, multiprocessors) * cdiv(tiles, splits)

    splits = min(range(cdiv(most, 2), most + 1), key=lambda n: (tiles_in_turn(n), -n))
    tiles_of_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_of_split), tiles_of_split


# ---------------------------------------------------------------------------------------------------------- single rows


def row_statistics(
    rows_: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:  # maximum, log_total and target_logit, (R,) each
    n = rows_.shape[0]
    logits = Logits(aligned(rows_), aligned_weight(weight), bias, n, weight.shape[0], *scales(transform))
    statistics = Statistics(*(empty_float32(rows_, n) for _ in range(3)))
    combine(split_statistics(logits, target, 1), statistics, n, 1)
    return statistics.maximum_ptr, statistics.log_total_ptr, statistics.target_logit_ptr  # type: ignore[return-value]


def split_statistics(
    logits: Logits,  # of R rows, aligned
    target: Tensor | None,  # (R / n_experts,)
    n_experts: int,
) -> Splits:
    """Statistics of R rows for each split of the vocabulary."""
    z, n = logits.z_ptr, logits.n_rows
    tile, constants = choose_tile("statistics", z, n, logits.e_ptr)
    n_splits, tiles_of_split = splits_of_vocabulary(max(n, 1), logits.n_classes, tile, z.device)
    maxima, totals = empty_float32(z, n_splits, n), empty_float32(z, n_splits, n)
    splits = Splits(maxima, totals, None if target is None else empty_float32(z, n_splits, n))
    grid = cdiv(n, tile.rows), n_splits
    constants |= {"D": z.shape[1], "EXPERTS": n_experts}
    arguments = logits, target, splits, tiles_of_split
    if tile.described:
        launch(described_statistics_kernel, grid, *described(z, logits.e_ptr, tile), *arguments, **constants)
    else:
        launch(rows.statistics_kernel, grid, *arguments, **constants)
    return splits


def combine(
    splits: Splits,
    statistics: Statistics,  # out
    n_tokens: int,
    n_experts: int,
    targets: Targets | None = None,
    log_prior: Tensor | None = None,  # (N, K) out
    nll: Tensor | None = None,  # (N,) out
    weighted: WeightedLosses | None = None,  # out
) -> None:
    """Write the statistics of whole rows, and those results of the mixture that are not None."""
    mix = mixture_constants(n_experts)
    grid = (cdiv(n_tokens, mix.tokens),)
    arguments = splits, statistics, targets, log_prior, nll, weighted, n_tokens, splits.total_ptr.shape[0]
    launch(loss_kernels.combine_kernel, grid, *arguments, MIX=mix)


def normalisers(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:  # log π, maximum and log_total, (N, K) each
    n, k, d = latent.shape
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    logits = Logits(z, e, bias, n * k, weight.shape[0], *scales(transform))
    log_prior, maximum, log_total = (empty_float32(latent, n, k) for _ in range(3))
    targets = Targets(prior_logits, None, 0)
    combine(split_statistics(logits, None, k), Statistics(maximum, log_total, None), n, k, targets, log_prior)
    return log_prior, maximum, log_total


def nll(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    ignore_index: int,
    transform: Transform = IDENTITY,
    weighted: WeightedLosses | None = None,  # out
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N,), and (N, K) each
    n, k, d = latent.shape
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    logits = Logits(z, e, bias, n * k, weight.shape[0], *scales(transform))
    losses, statistics = empty_float32(latent, n), Statistics(*(empty_float32(latent, n, k) for _ in range(3)))
    targets = Targets(prior_logits, target, ignore_index)
    combine(split_statistics(logits, target, k), statistics, n, k, targets, None, losses, weighted)
    return losses, *statistics  # type: ignore[return-value]


def choose_rows(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    seed: Tensor,  # (1,)
) -> Tensor:  # (N, D)
    """Draw one expert per token by Gumbel-max. The random numbers depend only on the seed, the token and the expert."""
    n, k, d = latent.shape
    mix = mixture_constants(k, d)
    chosen = latent.new_empty(n, d)
    grid = (cdiv(n, mix.tokens),)
    launch(rows.choose_rows_kernel, grid, latent, prior_logits, seed, chosen, n, D=d, MIX=mix)
    return chosen


def sample(
    rows_: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform,
    seed: Tensor,  # (1,)
) -> Tensor:  # (R,)
    """Draw one class per row by Gumbel-max. The random numbers depend only on the seed, the row and the class."""
    rows_, weight = aligned(rows_), aligned_weight(weight)
    n, d = rows_.shape
    logits = Logits(rows_, weight, bias, n, weight.shape[0], *scales(transform))
    tile, constants = choose_tile("sample", rows_, n, weight)
    n_splits, tiles_of_split = splits_of_vocabulary(max(n, 1), logits.n_classes, tile, rows_.device)
    best, index = empty_float32(rows_, n_splits, n), seed.new_empty(n_splits, n)
    grid = cdiv(n, tile.rows), n_splits
    arguments = logits, seed, best, index, tiles_of_split
    launch(rows.sample_kernel, grid, *arguments, D=d, **constants)
    return _first_of_best(best, index)


def _first_of_best(best: Tensor, index: Tensor) -> Tensor:  # (splits, N), (splits, N) -> (N,)
    n_splits, n = best.shape
    result = index.new_empty(n)
    launch(rows.first_of_best_kernel, (cdiv(n, 128),), best, index, result, n, n_splits, BLOCK=128)
    return result


# ---------------------------------------------------------------------------------------------------------- the mixture


def _mixture_tile(logits: Logits, n_experts: int) -> tuple[Tile, dict]:
    tile, constants = choose_tile("mixture", logits.z_ptr, logits.n_rows, logits.e_ptr)
    if n_experts == 1:  # each tile of the embedding is then used once, so keeping it resident gains nothing
        constants["TILE"] = constants["TILE"]._replace(resident=False)
    return tile, constants


def log_prob(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N, V)
    n, k, d = latent.shape
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    logits = Logits(z, e, bias, n, weight.shape[0], *scales(transform))
    tile, constants = _mixture_tile(logits, k)
    experts = Mixture(log_prior, maximum, log_total)
    result = empty_float32(latent, n, logits.n_classes)
    grid = cdiv(n, tile.rows), cdiv(logits.n_classes, tile.classes)
    part = constants["TILE"]._replace(classes=min(tile.classes, 32), resident=False, described=False)
    constants |= {"K": k, "D": logits.z_ptr.shape[1], "PART": part}
    tiles = described_experts(z.view(n, k, z.shape[1]), e, tile)
    launch(mixture.log_prob_kernel, grid, *tiles, logits, experts, result, **constants)
    return result


def predict(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N,)
    n, k, d = latent.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=latent.device)
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    logits = Logits(z, e, bias, n, weight.shape[0], *scales(transform))
    experts = Mixture(log_prior, maximum, log_total)
    tile, constants = _mixture_tile(logits, k)
    splits, tiles_of_split = splits_of_vocabulary(n, logits.n_classes, tile, latent.device)
    best, index = empty_float32(latent, splits, n), torch.empty((splits, n), dtype=torch.int64, device=latent.device)
    grid = cdiv(n, tile.rows), splits
    constants |= {"K": k, "D": logits.z_ptr.shape[1]}
    tiles = described_experts(z.view(n, k, z.shape[1]), e, tile)
    launch(mixture.predict_kernel, grid, *tiles, logits, experts, best, index, tiles_of_split, **constants)
    return _first_of_best(best, index)
