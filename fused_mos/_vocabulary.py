"""The functions of a head, written once over the few that depend on where the classes are.

`LOCAL` (in `_local`) has them all in this process; `vocab_parallel.VocabShard` has a span of them and asks the other
ranks for the rest. `functional` documents the functions for users, the modules call those of `Head.vocabulary`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from . import _losses
from ._backends.products import spans
from ._inputs import (
    Operands,
    check_constant,
    check_drawn,
    check_filter_eps,
    check_index,
    check_k,
    check_numbers,
    check_reduction,
    check_target,
    check_temperature,
    prepared,
)
from ._losses import NLL, Terms


class TopK(NamedTuple):
    values: Tensor  # (N, k) log-probabilities, descending
    indices: Tensor  # (N, k) int64 classes


class ExpertLogProb(NamedTuple):
    """Each expert by itself, (N, K): l − L of the targets, and the log-normalisers L."""

    log_prob: Tensor
    lse: Tensor


class Normalisers(NamedTuple):
    """log π, and the terms of each expert's log-normaliser L = maximum + log_total over all classes."""

    log_prior: Tensor  # (N, K)
    maximum: Tensor  # (N, K)
    log_total: Tensor  # (N, K)


class WithSum(NamedTuple):
    """What `likelihood_and_sum` knows of each token; all but `is_top1` are differentiable."""

    log_likelihood: Tensor  # (N,), of the target
    lse: Tensor  # (N, K)
    sum: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool, whether no class is more probable than the target


class Score(NamedTuple):
    """(N,) each: log p of the target; the entropy of the distribution, in nats; whether no class is more probable."""

    log_prob: Tensor
    entropy: Tensor
    is_top1: Tensor


BLOCK_BYTES = 32 * 2**20
"""Bytes of the log-probabilities of all classes, and of what sorts them, that are held at once."""


class Vocabulary(ABC):
    """The functions of `fused_mos.functional` over V classes, all of them here or spread over ranks.

    What differs are the abstract methods. They get operands that are checked and cast, and contiguous for any backend
    but "reference", whose vocabulary `of_backend` gives.
    """

    def nll_and_loss(
        self,
        latent: Tensor,  # (N, K, D)
        prior_logits: Tensor,  # (N, K)
        weight: Tensor,  # (V, D), or this rank's rows of it
        target: Tensor,  # (N,), of all V classes; (N, M) with target_prob
        bias: Tensor | None,  # (V,), or this rank's part of it
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
        grad_filter_eps: float = 0.0,
        softcap: float | None = None,
        class_weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        target_prob: Tensor | None = None,
        extra_log_prob: Tensor | None = None,
        return_lse: bool = False,
    ) -> NLL:
        """The loss of `functional.mos_nll_loss`, which says what the arguments are, each token's NLL (N,) before its
        weights and its reduction and, where asked for, lse (N, K). All are differentiable.
        """
        check_reduction(reduction)
        terms = Terms(class_weight, token_weight, label_smoothing, z_loss, extra_log_prob)
        n_external = _losses.check_external(extra_log_prob, latent)
        with prepared(latent, prior_logits, weight, bias, backend, softcap, n_external) as operands:
            n_classes, computing = self.count_classes(operands), self.of_backend(operands)
            check_filter_eps(grad_filter_eps)
            _losses.check_terms(terms, operands.latent, n_classes, soft=target_prob is not None)
            if target_prob is not None:
                ignore_index = check_index(target, operands.latent, n_classes, ignore_index, "target")
                check_numbers("target_prob", target_prob, tuple(target.shape), "(N, M) as target", operands.latent)
                check_constant("target_prob", target_prob)
                return _losses.soft_loss(
                    computing, operands.contiguous(), target, target_prob, ignore_index, reduction, terms, return_lse
                )
            ignore_index = check_target(target, operands.latent, n_classes, ignore_index)
            given = operands.contiguous(), target.contiguous(), ignore_index, reduction, grad_filter_eps
            return _losses.loss(computing, *given, terms, return_lse)

    def mos_expert_log_prob(
        self,
        latent: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> ExpertLogProb:
        """Each expert's log-likelihood of the target and its log-normaliser, (N, K) each."""
        with prepared(latent, None, weight, bias, backend, softcap) as operands:
            ignore_index = check_target(target, operands.latent, self.count_classes(operands), ignore_index)
            valid = target != ignore_index
            index = torch.where(valid, target, _losses.NONE)[:, None]
            log_prob, lse = self.of_backend(operands).experts(operands.contiguous(), index)
            return ExpertLogProb(torch.where(valid[:, None], log_prob.squeeze(2), 0), lse)

    def mos_log_prob_at(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        index: Tensor,
        bias: Tensor | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Log-probabilities of given classes, (N,) or (N, M) as `index`."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            n_classes, computing = self.count_classes(operands), self.of_backend(operands)
            temperature = check_temperature(temperature)
            mixture_temperature = check_temperature(mixture_temperature, "mixture_temperature")
            columns = index[:, None] if isinstance(index, Tensor) and index.dim() == 1 else index
            ignore_index = check_index(columns, operands.latent, n_classes, ignore_index)
            operands = operands.contiguous().without_ignored((columns != ignore_index).any(1))
            log_p, _ = _losses.at_classes(computing, operands, columns, ignore_index, temperature)
            if mixture_temperature != 1:
                nobody = columns.new_full(columns.shape[:1], _losses.NONE)
                found = computing.with_sum(operands, nobody, "tempered", None, mixture_temperature, temperature)
                log_p = torch.where(columns != ignore_index, log_p / mixture_temperature - found.sum[:, None], 0)
            return log_p.view(index.shape)

    def mos_score(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> Score:
        """The target's log-probability, the distribution's entropy, and whether the target is its best class."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            ignore_index = check_target(target, operands.latent, self.count_classes(operands), ignore_index)
            valid = target != ignore_index
            safe = torch.where(valid, target, _losses.NONE)
            counted = operands.contiguous().without_ignored(valid)
            found = self.of_backend(operands).with_sum(counted, safe, "entropy")
            return Score(
                torch.where(valid, found.log_likelihood, 0), torch.where(valid, found.sum, 0), valid & found.is_top1
            )

    def mos_log_prob(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            self.count_classes(operands)
            return self.of_backend(operands).distribution(operands.contiguous())

    @torch.no_grad()
    def mos_predict(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """The most probable class, (N,) int64."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            self.count_classes(operands)
            return self.of_backend(operands).best(operands.contiguous())

    @torch.no_grad()
    def mos_topk(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        k: int,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> TopK:
        """The k most probable classes and their log-probabilities, (N, k)."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            check_k("k", k, self.count_classes(operands))
            return self.of_backend(operands).candidates(operands.contiguous(), k)

    @torch.no_grad()
    def mos_sample(
        self,
        latent: Tensor,
        prior_logits: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        softcap: float | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """One class per token, (N,) int64: first the expert, then a class of that expert; of the whole mixture where
        that is restricted or has a temperature of its own."""
        with prepared(latent, prior_logits, weight, bias, backend, softcap) as operands:
            n_classes, computing = self.count_classes(operands), self.of_backend(operands)
            temperature = check_temperature(temperature)
            mixture_temperature = check_temperature(mixture_temperature, "mixture_temperature")
            if top_k is not None:
                check_k("top_k", top_k, n_classes)
            if top_p is not None and not 0 < top_p <= 1:
                raise ValueError(f"top_p must be in (0, 1], got {top_p}")
            operands = operands.contiguous()
            if mixture_temperature == 1 and top_k is None and top_p is None:
                drawn = computing.drawn(operands, temperature, generator)
            else:
                limits = temperature, mixture_temperature, top_k, 1.0 if top_p is None else top_p
                drawn = computing.drawn_of_mixture(operands, *limits, generator)
            check_drawn(drawn)
            return drawn

    def drawn_of_mixture(
        self,
        operands: Operands,
        temperature: float,
        mixture_temperature: float,
        top_k: int | None,
        top_p: float,
        generator: torch.Generator | None,
    ) -> Tensor:  # (N,) int64
        """Of the mixture's own distribution, for a block of tokens at a time; −1 where no class can be drawn."""
        n, n_classes = operands.latent.shape[0], self.count_classes(operands)
        drawn = torch.empty(n, dtype=torch.int64, device=operands.latent.device)
        for t in spans(n, max(BLOCK_BYTES // (32 * (top_k or n_classes)), 1)):  # with what sorts them
            block = operands.of_tokens(t)
            if top_k is None:
                values, classes = self.distribution(block, temperature), None
            else:
                values, classes = self.candidates(block, top_k, temperature)
            column = self.choose(_nucleus(values / mixture_temperature, top_p), generator)
            found = column if classes is None else classes.gather(1, column.clamp_min(0)[:, None])[:, 0]
            drawn[t] = torch.where(column < 0, -1, found)
        return drawn

    def _given_normalisers(
        self, operands: Operands, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """What the ops over the mixture take."""
        log_prior, maximum, log_total = self.normalisers(operands, temperature)
        return operands.latent, log_prior, operands.weight, operands.bias, maximum, log_total

    # -------------------------------------------------------------------------------------------------- the contract

    @abstractmethod
    def of_backend(self, operands: Operands) -> "Vocabulary":
        """The one that computes with the operands' backend."""

    @abstractmethod
    def count_classes(self, operands: Operands) -> int:
        """V. Raises ValueError for operands that this vocabulary cannot compute with."""

    @abstractmethod
    def loss(
        self,
        operands: Operands,
        target: Tensor,  # (N,)
        ignore_index: int,
        reduction: str,
        filter_eps: float,
        loss_weights: Tensor | None,  # (3, N), of a sum: see `_backends.Kernels.nll_with_gradients`
        with_lse: bool,
    ) -> NLL: ...

    @abstractmethod
    def experts(self, operands: Operands, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """l − L of given classes, (N, K, M) of (N, M), and L, (N, K); the former is undefined where there is no such
        class. Both are differentiable."""

    @abstractmethod
    def sum_of_logits(self, operands: Operands, class_weight: Tensor | None) -> Tensor | None:
        """Σ_v w_v l_v of a single expert, (N,), differentiable; None where a sum over the logits needs them all."""

    @abstractmethod
    def with_sum(
        self,
        operands: Operands,
        target: Tensor,  # (N,)
        kind: str,
        class_weight: Tensor | None = None,  # (V,), of all classes
        mixture_temperature: float = 1.0,
        temperature: float = 1.0,
    ) -> WithSum:
        """A sum over all log-probabilities (`_backends.Sum`) beside the target's, which is undefined where that is no
        class."""

    @abstractmethod
    def distribution(self, operands: Operands, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""

    @abstractmethod
    def normalisers(self, operands: Operands, temperature: float = 1.0) -> Normalisers:
        """The prior, and the experts' normalisers over all classes."""

    @abstractmethod
    def rows(self, whole: Tensor) -> Tensor:
        """(V, …) -> those of this process."""

    @abstractmethod
    def best(self, operands: Operands) -> Tensor:
        """The most probable of all classes, (N,) int64."""

    @abstractmethod
    def candidates(self, operands: Operands, k: int, temperature: float = 1.0) -> TopK:
        """The k most probable of all classes."""

    @abstractmethod
    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        """One class for each token, (N,) int64: of an expert that is drawn from the prior, by its softmax
        (l / temperature)."""

    @abstractmethod
    def choose(self, probability: Tensor, generator: torch.Generator | None) -> Tensor:
        """(N, C) -> one of the C columns for each token, (N,) int64, −1 where none has a probability."""


def chosen_columns(probability: Tensor, generator: torch.Generator | None) -> Tensor:  # (N, C) -> (N,)
    """One of the C columns for each token, −1 where none has a probability. As torch.multinomial, which has the host
    look at the probabilities' values."""
    possible = probability.sum(1) > 0
    times = torch.empty_like(probability).exponential_(generator=generator)
    choice = torch.where(possible[:, None], probability, 1).div_(times).argmax(1)  # the first to decay
    return torch.where(possible, choice, -1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:  # (N, C) -> (N, C)
    """Probabilities of the fewest classes that together have `top_p`, the others' 0; not normalised. Of a row without
    a finite logit, or with NaN, all are 0."""
    probability = torch.softmax(logits, 1).nan_to_num(0)
    if top_p == 1:
        return probability
    ordered, order = probability.sort(1, descending=True)
    kept = ordered.cumsum(1) - ordered < top_p
    kept[:, 0] = True  # also where float32 has no number as small as top_p
    return torch.zeros_like(probability).scatter_(1, order, torch.where(kept, ordered, 0))
