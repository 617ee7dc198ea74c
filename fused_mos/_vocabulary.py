"""The functions of a head, written once on top of the few that depend on where the classes are.

`LOCAL` (in `_local`) holds all classes in this process; `vocab_parallel.VocabShard` holds a span of them and
communicates with the other ranks. `functional` documents the functions for users; the modules call
`Head.vocabulary`.
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
    explain_nan,
    prepared,
)
from ._losses import NLL, Terms


class TopK(NamedTuple):
    values: Tensor  # (N, k) log-probabilities, descending
    indices: Tensor  # (N, k) int64 classes


class ExpertLogProb(NamedTuple):
    """Per expert, (N, K) each: the targets' log-likelihood l − L, and the log-normaliser L."""

    log_prob: Tensor
    lse: Tensor


class Normalisers(NamedTuple):
    """log π, and each expert's log-normaliser over all classes as two terms, L = maximum + log_total."""

    log_prior: Tensor  # (N, K)
    maximum: Tensor  # (N, K)
    log_total: Tensor  # (N, K)


class WithSum(NamedTuple):
    """Result of `likelihood_and_sum`. All but `is_top1` are differentiable."""

    log_likelihood: Tensor  # (N,), of the target
    lse: Tensor  # (N, K)
    sum: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool, True if no class is more probable than the target


class Score(NamedTuple):
    """Per token, (N,) each: log p of the target, the distribution's entropy in nats, and True if no class is more
    probable than the target."""

    log_prob: Tensor
    entropy: Tensor
    is_top1: Tensor


BLOCK_BYTES = 32 * 2**20
"""Bytes of all classes' log-probabilities, and of the buffers that sort them, that sampling may hold at once."""


class Vocabulary(ABC):
    """The functions of `fused_mos.functional` over V classes, all in this process or spread over ranks.

    Subclasses implement the abstract methods. These receive checked and cast operands, contiguous for every backend but
    "reference", which `of_backend` maps to a vocabulary of its own.
    """

    def nll_and_loss(
        self,
        latent: Tensor,  # (N, K, D)
        prior_logits: Tensor,  # (N, K)
        weight: Tensor,  # (V, D), or this rank's rows
        target: Tensor,  # (N,), counting all V classes; (N, M) with target_prob
        bias: Tensor | None,  # (V,), or this rank's part
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
        """The loss of `functional.mos_nll_loss`, each token's NLL (N,) before weights and reduction, and lse (N, K) if
        requested. All are differentiable. See `functional.mos_nll_loss` for the arguments.
        """
        check_reduction(reduction)
        terms = Terms(class_weight, token_weight, label_smoothing, z_loss, extra_log_prob)
        n_external = _losses.check_external(extra_log_prob, latent)
        with prepared(latent, prior_logits, weight, bias, backend, softcap, n_external, weight_later=True) as operands:
            n_classes, computing = self.count_classes(operands), self.of_backend(operands)
            check_filter_eps(grad_filter_eps)
            _losses.check_terms(terms, operands.latent, n_classes, soft=target_prob is not None)
            if target_prob is not None:
                ignore_index = check_index(target, operands.latent, n_classes, ignore_index, "target")
                check_numbers("target_prob", target_prob, tuple(target.shape), "(N, M) as target", operands.latent)
                check_constant("target_prob", target_prob)
                result = _losses.soft_loss(
                    computing, operands.contiguous(), target, target_prob, ignore_index, reduction, terms, return_lse
                )
            else:
                ignore_index = check_target(target, operands.latent, n_classes, ignore_index)
                given = operands.contiguous(), target.contiguous(), ignore_index, reduction, grad_filter_eps
                result = _losses.loss(computing, *given, terms, return_lse)
            explain_nan(result.nll, operands.weight)
            return result

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
        """Each expert's log-likelihood of the target and log-normaliser, (N, K) each."""
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
        """Log-probabilities of given classes, (N,) or (N, M) like `index`."""
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
        """Each target's log-probability, the distribution's entropy, and whether the target is the best class."""
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
        """Draw one class per token, (N,) int64: an expert from the prior, then a class from that expert. With top_k,
        top_p or a mixture temperature the class is drawn from the mixture's own distribution."""
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
        """Draw from the mixture's own distribution, one block of tokens at a time; −1 if no class can be drawn."""
        n, n_classes = operands.latent.shape[0], self.count_classes(operands)
        drawn = torch.empty(n, dtype=torch.int64, device=operands.latent.device)
        for t in spans(n, max(BLOCK_BYTES // (32 * (top_k or n_classes)), 1)):  # 32 bytes a class, sorting included
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
        """The arguments of the ops over the whole mixture."""
        log_prior, maximum, log_total = self.normalisers(operands, temperature)
        return operands.latent, log_prior, operands.weight, operands.bias, maximum, log_total

    # -------------------------------------------------------------------------------------------------- the contract

    @abstractmethod
    def of_backend(self, operands: Operands) -> "Vocabulary":
        """The vocabulary that computes with the operands' backend."""

    @abstractmethod
    def count_classes(self, operands: Operands) -> int:
        """V, the number of classes. Raises ValueError for operands that this vocabulary cannot compute with."""

    @abstractmethod
    def loss(
        self,
        operands: Operands,
        target: Tensor,  # (N,)
        ignore_index: int,
        reduction: str,
        filter_eps: float,
        loss_weights: Tensor | None,  # (3, N), for "sum": see `_backends.Kernels.nll_with_gradients`
        with_lse: bool,
    ) -> NLL: ...

    @abstractmethod
    def experts(self, operands: Operands, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """l − L of given classes (N, M), as (N, K, M), and L, (N, K). The former is undefined where `index` is no
        class. Both are differentiable."""

    @abstractmethod
    def sum_of_logits(self, operands: Operands, class_weight: Tensor | None) -> Tensor | None:
        """Σ_v w_v l_v of a single expert, (N,), differentiable; None if the sum would need every logit."""

    @abstractmethod
    def with_sum(
        self,
        operands: Operands,
        target: Tensor,  # (N,)
        kind: str,
        class_weight: Tensor | None = None,  # (V,), for all classes
        mixture_temperature: float = 1.0,
        temperature: float = 1.0,
    ) -> WithSum:
        """A sum over all log-probabilities (`_backends.Sum`), and the target's log-probability, undefined where the
        target is no class."""

    @abstractmethod
    def distribution(self, operands: Operands, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""

    @abstractmethod
    def normalisers(self, operands: Operands, temperature: float = 1.0) -> Normalisers:
        """The log-prior, and the experts' normalisers over all classes."""

    @abstractmethod
    def rows(self, whole: Tensor) -> Tensor:
        """(V, …) -> the rows that this process holds."""

    @abstractmethod
    def best(self, operands: Operands) -> Tensor:
        """The most probable class of all, (N,) int64."""

    @abstractmethod
    def candidates(self, operands: Operands, k: int, temperature: float = 1.0) -> TopK:
        """The k most probable classes of all."""

    @abstractmethod
    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Draw one class per token, (N,) int64: an expert from the prior, then a class from softmax(l / temperature) of
        that expert."""

    @abstractmethod
    def choose(self, probability: Tensor, generator: torch.Generator | None) -> Tensor:
        """(N, C) -> one of the C columns per token, (N,) int64, drawn by probability; −1 if all are 0."""


def chosen_columns(probability: Tensor, generator: torch.Generator | None) -> Tensor:  # (N, C) -> (N,)
    """Draw one of the C columns per token, −1 if all probabilities are 0. Unlike torch.multinomial, this does not make
    the host wait to check the values."""
    possible = probability.sum(1) > 0
    times = torch.empty_like(probability).exponential_(generator=generator)
    choice = torch.where(possible[:, None], probability, 1).div_(times).argmax(1)  # the first to decay
    return torch.where(possible, choice, -1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:  # (N, C) -> (N, C)
    """Probabilities, not normalised, of the fewest classes that together reach `top_p`, 0 for the others. A row with
    NaN or without a finite logit becomes 0."""
    probability = torch.softmax(logits, 1).nan_to_num(0)
    if top_p == 1:
        return probability
    ordered, order = probability.sort(1, descending=True)
    kept = ordered.cumsum(1) - ordered < top_p
    kept[:, 0] = True  # even if top_p rounds to 0 in float32
    return torch.zeros_like(probability).scatter_(1, order, torch.where(kept, ordered, 0))
