"""Portable fused MoS: plain torch, any device, one loop over tiles of the vocabulary.

Each tile is a product, an epilogue in place and, in the backward passes, two more products.
The tile lives in a workspace of fixed size, so extra memory does not grow with N·K·V.

exp is computed as exp2((l − max)·log2 e): torch's CPU exp is several times slower than its exp2.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import from_rows
from .from_rows import choose_rows  # noqa: F401  (part of `Kernels`)
from .products import product, spans
from .reference import accumulation_dtype, log_softmax_prior, mix_target
from .row_filter import kept_rows
from .transform import Transform

WORKSPACE_BYTES = {"cpu": 32 * 2**20, "default": 256 * 2**20}
"""Bytes of the tile and its scratch copies, by device type; the unit of extra memory of this backend."""

MAX_ROWS = 4096
"""Rows of a tile at most: more rows would leave too few columns for efficient products."""

MIN_GRADIENT_ROWS = 128
"""Rows of one token block below which gradients are not formed in the forward pass: each block reads and
writes the whole weight gradient, 8·V·D bytes for 2·rows·V·D FLOP, so few rows make it memory-bound."""

LOG2E = math.log2(math.e)


class Workspace:
    """One allocation per call, from which each tile is cut (a fresh allocation per tile costs page faults)."""

    def __init__(self, like: Tensor, copies: int = 1):
        self.accumulation = accumulation_dtype(like.dtype)
        limit = WORKSPACE_BYTES.get(like.device.type, WORKSPACE_BYTES["default"])
        # 16-bit products need a float32 result, or a 16-bit operand, beside the tile
        item = self.accumulation.itemsize * (1 if like.dtype == self.accumulation else 2)
        self.elements = max(limit // (item * copies), 1)
        self.like = like
        self._buffer: Tensor | None = None

    def rows(self, n_rows: int, group: int = 1) -> int:
        """Rows of a tile: a multiple of `group`, at least one group."""
        return max(min(n_rows, MAX_ROWS) // group, 1) * group

    def columns(self, n_rows: int, n_classes: int) -> int:
        """Columns of a tile of `n_rows`, a multiple of 64 where possible."""
        columns = self.elements // max(n_rows, 1)
        return min(max(columns // 64 * 64, 64), n_classes)

    def tile(self, n_rows: int, n_columns: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < n_rows * n_columns:
            self._buffer = self.like.new_empty(n_rows * n_columns, dtype=self.accumulation)
        return self._buffer[: n_rows * n_columns].view(n_rows, n_columns)


def _operands(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """16-bit operands as the products take them. A GPU multiplies 16-bit numbers and delivers float32; a CPU
    would round each product to 16 bits, for a gain of speed that only some processors have, so there
    they are widened first (and float16, which most CPUs multiply slowly, becomes usable)."""
    if rows.is_cuda:
        return rows, weight, bias
    dtype = accumulation_dtype(rows.dtype)
    return rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    product(rows, weight.t(), out)
    return out if bias is None else out.add_(bias)


def _tiles(workspace: Workspace, n_rows: int, n_classes: int, group: int = 1) -> Iterator[tuple[slice, slice]]:
    """All (rows, columns) tiles, the vocabulary innermost."""
    height = workspace.rows(n_rows, group)
    width = workspace.columns(height, n_classes)
    for rows in spans(n_rows, height):
        for columns in spans(n_classes, width):
            yield rows, columns


def _local_target(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The target's column within the tile, (R, 1), and whether it lies there, (R, 1)."""
    local = target[:, None] - columns.start
    width = columns.stop - columns.start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _exp_(tile: Tensor, maximum: Tensor, log_total: Tensor | None = None) -> Tensor:
    """exp((tile − maximum) − log_total) in place; the two are subtracted apart, since their sum would round away
    the digits of a small log_total beside a large maximum."""
    tile.sub_(maximum)
    if log_total is not None:
        tile.sub_(log_total)
    return tile.mul_(LOG2E).exp2_()


def row_statistics(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
) -> tuple[Tensor, Tensor, Tensor]:
    rows, weight, bias = _operands(rows, weight, bias)
    workspace = Workspace(rows)
    n, n_classes = rows.shape[0], weight.shape[0]
    # the running maximum starts finite, so that a class of logit −inf gives exp(−inf), never inf − inf
    maximum = rows.new_full((n, 1), torch.finfo(workspace.accumulation).min, dtype=workspace.accumulation)
    total = torch.zeros_like(maximum)
    target_logit = torch.full_like(maximum, math.nan)
    for r, c in _tiles(workspace, n, n_classes):
        tile = _logits(
            rows[r], weight[c], None if bias is None else bias[c], workspace.tile(r.stop - r.start, c.stop - c.start)
        )
        if target is not None:
            local, inside = _local_target(target[r], c)
            target_logit[r] = torch.where(inside, tile.gather(1, local), target_logit[r])
        new_maximum = torch.maximum(maximum[r], tile.amax(1, keepdim=True))
        rescale = torch.exp(maximum[r] - new_maximum)
        total[r] = total[r] * rescale + _exp_(tile, new_maximum).sum(1, keepdim=True)
        maximum[r] = new_maximum
    return maximum.squeeze(1), total.log_().squeeze(1), target_logit.squeeze(1)


def rows_backward(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,)
    log_total: Tensor,  # (R,)
    grad_lse: Tensor,  # (R,)
    grad_target: Tensor | None,  # (R,)
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = rows.dtype
    rows, weight, bias = _operands(rows, weight, bias)
    workspace = Workspace(rows)
    accumulation = workspace.accumulation
    grad_rows, grad_weight, grad_bias = _zero_gradients(rows, weight, needs, accumulation)
    for r, c in _tiles(workspace, rows.shape[0], weight.shape[0]):
        tile = _logits(
            rows[r], weight[c], None if bias is None else bias[c], workspace.tile(r.stop - r.start, c.stop - c.start)
        )
        _exp_(tile, maximum[r, None], log_total[r, None]).mul_(grad_lse[r, None])
        if target is not None and grad_target is not None:
            local, inside = _local_target(target[r], c)
            tile.scatter_add_(1, local, torch.where(inside, -grad_target[r, None], 0))
        _add_gradients(tile, rows[r], weight, c, (grad_rows[r] if needs[0] else None, grad_weight, grad_bias), needs)
    return _cast_gradients((grad_rows, grad_weight, grad_bias), dtype)


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dtype == torch.float16:  # gradients before a loss scale has made them large would be rounded to 0
        return False
    block = Workspace(weight).elements // (n_experts * weight.shape[0])
    return min(block, n_tokens) * n_experts >= min(MIN_GRADIENT_ROWS, n_tokens * n_experts) > 0


def _blocks_with_gradients(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,) bool
    scale: Tensor,  # ()
    filter_eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Three products instead of four: a block of tokens keeps its whole rows of exponentiated logits in
    the workspace until their responsibilities are known, and the gradients are formed from them at once."""
    n, k, d = latent.shape
    n_classes = weight.shape[0]
    dtype = latent.dtype
    latent, weight, bias = _operands(latent, weight, bias)
    workspace = Workspace(latent)
    accumulation = workspace.accumulation
    block = max(workspace.elements // (k * n_classes), 1)
    product_needs = (needs[0], needs[2], needs[3])
    grad_rows, grad_weight, grad_bias = _zero_gradients(latent.view(n * k, d), weight, product_needs, accumulation)
    maximum = latent.new_empty(n, k, dtype=accumulation)
    log_total, target_logit = torch.empty_like(maximum), torch.empty_like(maximum)
    nll = maximum.new_empty(n)
    log_prior = log_softmax_prior(prior_logits).to(accumulation)
    grad_prior = torch.empty_like(log_prior) if needs[1] else log_prior.new_empty(0)
    for t in spans(n, block):
        rows = slice(t.start * k, t.stop * k)
        z = latent.view(n * k, d)[rows]
        tile = _logits(z, weight, bias, workspace.tile(rows.stop - rows.start, n_classes))
        local, inside = _local_target(target[t].repeat_interleave(k), slice(0, n_classes))
        target_logit[t] = torch.where(inside, tile.gather(1, local), math.nan).view(-1, k)
        row_maximum = tile.amax(1, keepdim=True).clamp_min(torch.finfo(accumulation).min)
        total = _exp_(tile, row_maximum).sum(1, keepdim=True)
        maximum[t], log_total[t] = row_maximum.view(-1, k), total.log().view(-1, k)
        nll[t], responsibility = mix_target(log_prior[t], maximum[t], log_total[t], target_logit[t])
        responsibility = torch.where(valid[t, None], responsibility, 0)
        if needs[1]:
            grad_prior[t] = torch.where(valid[t, None], log_prior[t].exp() - responsibility, 0) * scale
        row_weight = torch.where(responsibility != 0, responsibility * scale, 0).view(-1, 1)
        tile.mul_(row_weight / total).scatter_add_(1, local, torch.where(inside, -row_weight, 0))
        kept = kept_rows(responsibility.view(-1), responsibility.view(-1), filter_eps)
        gradients = (grad_rows[rows] if needs[0] else None, grad_weight, grad_bias)
        if kept is None:
            _add_gradients(tile, z, weight, slice(0, n_classes), gradients, product_needs)
        elif kept.numel():
            z_kept = z[kept]
            kept_gradient = torch.zeros_like(z_kept, dtype=accumulation)
            # a copy of the kept rows in slices, so that it stays small beside the workspace
            for c in spans(n_classes, max(n_classes // 8, 1)):
                _add_gradients(
                    tile[:, c][kept], z_kept, weight, c, (kept_gradient, grad_weight, grad_bias), product_needs
                )
            if needs[0]:
                grad_rows[rows][kept] = kept_gradient
    grad_rows, grad_weight, grad_bias = _cast_gradients((grad_rows, grad_weight, grad_bias), dtype)
    grad_latent = grad_rows.view(n, k, d) if needs[0] else grad_rows
    return nll, maximum, log_total, target_logit, grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


def nll(*inputs):
    return from_rows.nll(row_statistics, *inputs)


def nll_backward(*inputs):
    return from_rows.nll_backward(rows_backward, *inputs)


def nll_with_gradients(*inputs):
    return from_rows.nll_with_gradients(_blocks_with_gradients, *inputs)


def normalisers(*inputs):
    return from_rows.normalisers(row_statistics, *inputs)


def log_prob(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    n, n_classes = latent.shape[0], weight.shape[0]
    result = maximum.new_empty(n, n_classes)
    for tokens, c, tile in _mixture_tiles(latent, log_prior, weight, bias, maximum, log_total):
        result[tokens, c] = tile
    return result


def predict(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    best = maximum.new_full((latent.shape[0],), -math.inf)
    index = torch.zeros(latent.shape[0], dtype=torch.int64, device=latent.device)
    for tokens, c, tile in _mixture_tiles(latent, log_prior, weight, bias, maximum, log_total):
        value, column = tile.max(dim=1)
        better = value > best[tokens]  # strictly: the first of equals wins, as in torch.argmax
        index[tokens] = torch.where(better, column + c.start, index[tokens])
        best[tokens] = torch.where(better, value, best[tokens])
    return index


def _mixture_tiles(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(tokens, columns, log-probabilities of that tile), K tiles summed in the workspace."""
    n, k, d = latent.shape
    latent, weight, bias = _operands(latent, weight, bias)
    workspace = Workspace(latent)
    log_scale = log_prior - log_total
    for rows, c in _tiles(workspace, n * k, weight.shape[0], group=k):
        tokens = slice(rows.start // k, rows.stop // k)
        tile = workspace.tile(rows.stop - rows.start, c.stop - c.start)
        _logits(latent.view(n * k, d)[rows], weight[c], None if bias is None else bias[c], tile)
        joint = tile.view(-1, k, c.stop - c.start).sub_(maximum[tokens, :, None]).add_(log_scale[tokens, :, None])
        # every exponent is ≤ 0; the maximum is subtracted so that the sum over experts cannot underflow
        largest = joint.amax(1).clamp_min_(torch.finfo(joint.dtype).min)
        mixture = _exp_(joint, largest[:, None]).sum(1).log_().add_(largest)
        yield tokens, c, mixture


def log_prob_backward(
    grad: Tensor,  # (N, V)
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sweeps: the first finds s[n,k] = Σ_v G q, the second forms dl = G q − s·exp(l − L)."""
    n, k, d = latent.shape
    n_classes = weight.shape[0]
    dtype = latent.dtype
    latent, weight, bias = _operands(latent, weight, bias)
    workspace = Workspace(latent, copies=2)
    product_needs = (needs[0], needs[2], needs[3])
    rows = latent.view(n * k, d)
    log_scale = log_prior - log_total

    def weighted_responsibility(r: slice, c: slice) -> tuple[slice, Tensor]:
        """G·q of one tile, (tokens, K, columns), with q = softmax_k(log π + l − L): as a softmax over the experts it
        sums to one however large the logits are, and needs no saved log-probabilities."""
        tokens = slice(r.start // k, r.stop // k)
        tile = _logits(
            rows[r], weight[c], None if bias is None else bias[c], workspace.tile(r.stop - r.start, c.stop - c.start)
        )
        joint = tile.view(-1, k, c.stop - c.start).sub_(maximum[tokens, :, None]).add_(log_scale[tokens, :, None])
        q = _exp_(joint, joint.amax(1, keepdim=True).clamp_min_(torch.finfo(joint.dtype).min))
        # the largest term is 1, so the sum is at least 1, but for a masked class, where all are 0
        return tokens, q.mul_((grad[tokens, c] / q.sum(1).clamp_min_(1))[:, None])

    s = torch.zeros_like(maximum)
    for r, c in _tiles(workspace, n * k, n_classes, group=k):
        tokens, gq = weighted_responsibility(r, c)
        s[tokens] += gq.sum(-1)
    grad_rows, grad_weight, grad_bias = _zero_gradients(rows, weight, product_needs, workspace.accumulation)
    if any(product_needs):
        for r, c in _tiles(workspace, n * k, n_classes, group=k):
            tokens, gq = weighted_responsibility(r, c)
            softmax = _logits(
                rows[r], weight[c], None if bias is None else bias[c], torch.empty_like(gq).view(r.stop - r.start, -1)
            )
            _exp_(softmax, maximum.view(-1, 1)[r], log_total.view(-1, 1)[r]).mul_(s.view(-1, 1)[r])
            gradients = (grad_rows[r] if needs[0] else None, grad_weight, grad_bias)
            _add_gradients(gq.view_as(softmax).sub_(softmax), rows[r], weight, c, gradients, product_needs)
    grad_prior = s - log_prior.exp() * s.sum(-1, keepdim=True) if needs[1] else s.new_empty(0)
    grad_rows, grad_weight, grad_bias = _cast_gradients((grad_rows, grad_weight, grad_bias), dtype)
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """Gumbel-max: argmax_v (l/temperature − log(−log u)), with the running best over the tiles."""
    generator = from_rows.generator_of(seed, "classes")
    rows, weight, bias = _operands(rows, weight, bias)
    workspace = Workspace(rows, copies=2)
    best = rows.new_full((rows.shape[0],), -math.inf, dtype=workspace.accumulation)
    index = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    for r, c in _tiles(workspace, rows.shape[0], weight.shape[0]):
        tile = _logits(
            rows[r], weight[c], None if bias is None else bias[c], workspace.tile(r.stop - r.start, c.stop - c.start)
        )
        # −log(exponential) is a Gumbel variate; exponential_ draws from (0, inf), so the logarithm is finite
        gumbel = torch.empty_like(tile).exponential_(generator=generator).log_()
        value, column = tile.div_(transform.temperature).sub_(gumbel).max(dim=1)
        better = value > best[r]
        index[r] = torch.where(better, column + c.start, index[r])
        best[r] = torch.where(better, value, best[r])
    return torch.where(best > -math.inf, index, -1)


def _zero_gradients(
    rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    def zeros(shape: torch.Size, needed: bool) -> Tensor:
        return rows.new_zeros(shape if needed else (0,), dtype=dtype)

    return zeros(rows.shape, needs[0]), zeros(weight.shape, needs[1]), zeros(weight.shape[:1], needs[2])


def _add_gradients(
    tile: Tensor, rows: Tensor, weight: Tensor, columns: slice, gradients, needs: tuple[bool, bool, bool]
) -> None:
    """Adds one tile of dl to (dz of these rows, dE, db)."""
    grad_rows, grad_weight, grad_bias = gradients
    if needs[0]:
        product(tile.to(weight.dtype), weight[columns], grad_rows, accumulate=True)
    if needs[1]:
        product(tile.t().to(rows.dtype), rows, grad_weight[columns], accumulate=True)
    if needs[2]:
        grad_bias[columns] += tile.sum(0)


def _cast_gradients(gradients: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, grad_weight, grad_bias = gradients
    return grad_rows.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)
