"""The functions of a head, written once over the few that depend on where the classes are.

`LOCAL` has them all in this process; `vocab_parallel.VocabShard` has a span of them and asks the other ranks for the
rest. `functional` documents the functions for users, the modules call those of `Head.vocabulary`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, ops
from ._backends import reference
from ._backends.reference import log_softmax_prior
from ._inputs import (
    Operands,
    check_filter_eps,
    check_k,
    check_reduction,
    check_target,
    check_temperature,
    contiguous,
    prepared,
)

TOPK_BYTES = 32 * 2**20
"""Bytes of the log-probabilities that `mos_topk` holds at once."""


class NLL(NamedTuple):
    nll: Tensor  # (N,)
    loss: Tensor  # () or (N,)


class TopK(NamedTuple):
    values: Tensor  # (N, k) log-probabilities, descending
    indices: Tensor  # (N, k) int64 classes


class Normalisers(NamedTuple):
    """log π, and the terms of each expert's log-normaliser L = maximum + log_total over all classes."""

    log_prior: Tensor  # (N, K)
    maximum: Tensor  # (N, K)
    log_total: Tensor  # (N, K)


class Vocabulary(ABC):
    """The functions of `fused_mos.functional` over V classes, all of them here or spread over ranks.

    What differs are the abstract methods. They get operands that are checked, cast and contiguous (but for the rows
    of `draw`), of any backend but "reference": the functions answer for that one themselves.
    """

    def nll_and_loss(
        self,
        latent: Tensor,  # (N, K, D)
        prior_logits: Tensor,  # (N, K)
        weight: Tensor,  # (V, D), or this rank's rows of it
        target: Tensor,  # (N,), of all V classes
        bias: Tensor | None,  # (V,), or this rank's part of it
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        grad_filter_eps: float = 0.0,
    ) -> NLL:
        """The loss of `functional.mos_nll_loss`, which says what the arguments are, and each token's NLL (N,) before
        its reduction. Both are differentiable.
        """
        check_reduction(reduction)
        with prepared(latent, prior_logits, weight, bias, backend) as operands:
            check_target(target, operands.latent, self.count_classes(operands), ignore_index)
            check_filter_eps(grad_filter_eps)
            if operands.backend == "reference":
                nll = reference.nll(*operands.tensors, target, ignore_index)
                return reduced(nll, target, ignore_index, reduction)
            return self.loss(operands.contiguous(), target.contiguous(), ignore_index, reduction, grad_filter_eps)

    def mos_log_prob(
        self, latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""
        with prepared(latent, prior_logits, weight, bias, backend) as operands:
            self.count_classes(operands)
            if operands.backend == "reference":
                return reference.log_prob(*operands.tensors)
            return self.distribution(operands.contiguous())

    @torch.no_grad()
    def mos_predict(
        self, latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """The most probable class, (N,) int64."""
        with prepared(latent, prior_logits, weight, bias, backend) as operands:
            self.count_classes(operands)
            if operands.backend == "reference":
                return reference.log_prob(*operands.tensors).argmax(-1)
            return self.best(operands.contiguous())

    @torch.no_grad()
    def mos_topk(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        k: int,
        backend: str = "auto",
    ) -> TopK:
        """The k most probable classes and their log-probabilities, (N, k)."""
        with prepared(latent, prior_logits, weight, bias, backend) as operands:
            check_k(k, self.count_classes(operands))
            if operands.backend == "reference":
                return TopK(*reference.log_prob(*operands.tensors).topk(k))
            return self.candidates(operands.contiguous(), k)

    @torch.no_grad()
    def mos_sample(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """One class per token, (N,) int64: first the expert, then a class of that expert."""
        with prepared(latent, prior_logits, weight, bias, backend) as operands:
            self.count_classes(operands)
            check_temperature(temperature)
            if operands.backend == "reference":
                return reference.sample(*operands.tensors, temperature, generator)
            latent, _, weight, bias, backend = operands
            if latent.shape[0] == 0:  # torch.multinomial refuses an empty batch
                return torch.empty(0, dtype=torch.int64, device=latent.device)
            rows = self.choose_rows(operands, generator)
            return self.draw(rows, contiguous(weight), contiguous(bias), temperature, generator, backend)

    # -------------------------------------------------------------------------------------------------- the contract

    @abstractmethod
    def count_classes(self, operands: Operands) -> int:
        """V. Raises ValueError for operands that this vocabulary cannot compute with."""

    @abstractmethod
    def loss(self, operands: Operands, target: Tensor, ignore_index: int, reduction: str, filter_eps: float) -> NLL: ...

    @abstractmethod
    def distribution(self, operands: Operands) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""

    @abstractmethod
    def normalisers(self, operands: Operands) -> Normalisers:
        """The prior, and the experts' normalisers over all classes."""

    @abstractmethod
    def best(self, operands: Operands) -> Tensor:
        """The most probable of all classes, (N,) int64."""

    @abstractmethod
    def candidates(self, operands: Operands, k: int) -> TopK:
        """The k most probable of all classes."""

    @abstractmethod
    def choose_rows(self, operands: Operands, generator: torch.Generator | None) -> Tensor:
        """The latent vector of one expert for each token, drawn from the prior, (N, D)."""

    @abstractmethod
    def draw(
        self,
        rows: Tensor,  # (N, D)
        weight: Tensor,  # (V, D), or this rank's rows of it
        bias: Tensor | None,  # (V,), or this rank's part of it
        temperature: float,
        generator: torch.Generator | None,
        backend: str,
    ) -> Tensor:
        """One of all classes from each row's softmax(l / temperature), (N,) int64."""


class LocalVocabulary(Vocabulary):
    """All classes in this process."""

    def count_classes(self, operands: Operands) -> int:
        return operands.weight.shape[0]

    def loss(self, operands: Operands, target: Tensor, ignore_index: int, reduction: str, filter_eps: float) -> NLL:
        """When the loss is one number, all tokens have the same weight in it, so the gradient can be formed in the
        forward pass, one product cheaper; gradients that arrive through `nll` are then recomputed.
        """
        inputs, backend = operands.tensors, operands.backend
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
        n, n_experts, _ = operands.latent.shape
        if any(needs):
            in_one_op = _backends.kernels(backend).gradient_in_forward_pays(n, n_experts, operands.weight)
        else:
            in_one_op = _backends.has_own_small_kernels(backend)
        if reduction != "none" and in_one_op:
            mean = reduction == "mean"
            loss, nll = ops.nll_with_gradients(*inputs, target, ignore_index, filter_eps, mean, needs, backend)[::2][:2]
            return NLL(nll, loss)
        nll = ops.nll(*inputs, target, ignore_index, filter_eps, backend)[0]
        return reduced(nll, target, ignore_index, reduction)

    def distribution(self, operands: Operands) -> Tensor:
        latent, prior_logits, weight, bias = operands.tensors
        if decoder := _backends.decoder(operands.backend, *operands.tensors):
            log_p = decoder.log_prob(latent, log_softmax_prior(prior_logits).float(), weight, bias)
            if log_p is not None:
                return log_p
        return ops.log_prob(*operands.tensors, operands.backend)[0]

    def normalisers(self, operands: Operands) -> Normalisers:
        return Normalisers(*ops.normalisers(*operands.tensors, operands.backend))

    def best(self, operands: Operands) -> Tensor:
        log_prior, maximum, log_total = self.normalisers(operands)
        kernels = _backends.traceable(operands.backend, operands.latent)
        return kernels.predict(operands.latent, log_prior, operands.weight, operands.bias, maximum, log_total)

    def candidates(self, operands: Operands, k: int) -> TopK:
        latent, prior_logits, weight, bias = operands.tensors
        if decoder := _backends.decoder(operands.backend, latent):
            top = decoder.topk(latent, log_softmax_prior(prior_logits).float(), weight, bias, k)
            if top is not None:
                return TopK(*top)
        return topk_of_spans(operands, self.normalisers(operands), k)

    def choose_rows(self, operands: Operands, generator: torch.Generator | None) -> Tensor:
        kernels = _backends.traceable(operands.backend, operands.latent)
        return kernels.choose_rows(contiguous(operands.latent), contiguous(operands.prior_logits), generator)

    def draw(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
        backend: str,
    ) -> Tensor:
        return _backends.traceable(backend, rows).sample(rows, weight, bias, temperature, generator)


LOCAL = LocalVocabulary()


def reduced(nll: Tensor, target: Tensor, ignore_index: int, reduction: str) -> NLL:  # (N,), (N,)
    """The loss of `nll`, which is 0 where the target is ignored."""
    if reduction == "none":
        return NLL(nll, nll)
    if reduction == "sum":
        return NLL(nll, nll.sum())
    return NLL(nll, nll.sum() / (target != ignore_index).sum())


def topk_of_spans(operands: Operands, normalisers: Normalisers, k: int) -> TopK:
    """The k most probable of the classes in `operands`, all of them where they are fewer."""
    latent, _, weight, bias, backend = operands
    log_prior, maximum, log_total = normalisers
    n, n_classes = latent.shape[0], weight.shape[0]
    values, indices = maximum.new_empty(n, 0), torch.empty(n, 0, dtype=torch.int64, device=latent.device)
    columns = max(TOPK_BYTES // (maximum.itemsize * max(n, 1)), 2 * k, 256)
    for start in range(0, n_classes, columns):
        span = slice(start, start + columns)
        log_p = _backends.traceable(backend, latent).log_prob(
            latent, log_prior, weight[span], bias if bias is None else bias[span], maximum, log_total
        )
        candidates = log_p.topk(min(k, log_p.shape[1]))
        candidates_of_all = torch.cat([indices, candidates.indices + start], 1)
        values = torch.cat([values, candidates.values], 1)
        values, chosen = values.topk(min(k, values.shape[1]))
        indices = candidates_of_all.gather(1, chosen)
    return TopK(values, indices)
