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
    check_drawn,
    check_filter_eps,
    check_k,
    check_reduction,
    check_target,
    check_temperature,
    prepared,
)


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

    What differs are the abstract methods. They get operands that are checked, cast and contiguous, of any backend but
    "reference": the functions answer for that one themselves.
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
            ignore_index = check_target(target, operands.latent, self.count_classes(operands), ignore_index)
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
            temperature = check_temperature(temperature)
            if operands.backend == "reference":
                drawn = reference.sample(*operands.tensors, temperature, generator)
            else:
                drawn = self.drawn(operands.contiguous(), temperature, generator)
            check_drawn(drawn)
            return drawn

    def _given_normalisers(self, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """What the ops over the mixture take."""
        log_prior, maximum, log_total = self.normalisers(operands)
        return operands.latent, log_prior, operands.weight, operands.bias, maximum, log_total

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
    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        """One class for each token, (N,) int64: of an expert that is drawn from the prior, by its softmax
        (l / temperature)."""


def new_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The seed (1,) of an op's samples: a generator itself cannot be an op's argument."""
    return torch.randint(2**62, (1,), generator=generator, device=device)


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
        if torch.compiler.is_exporting():
            in_one_op = False  # a choice by N would bound the N of the exported program
        elif any(needs):
            in_one_op = _backends.kernels(backend).gradient_in_forward_pays(n, n_experts, *inputs[2:])
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
        return ops.predict(*self._given_normalisers(operands), operands.backend)

    def candidates(self, operands: Operands, k: int) -> TopK:
        latent, prior_logits, weight, bias = operands.tensors
        if decoder := _backends.decoder(operands.backend, latent):
            top = decoder.topk(latent, log_softmax_prior(prior_logits).float(), weight, bias, k)
            if top is not None:
                return TopK(*top)
        return TopK(*ops.topk(*self._given_normalisers(operands), k, operands.backend))

    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        seed = new_seed(generator, operands.latent.device)
        return ops.sample(*operands.tensors, temperature, seed, operands.backend)


LOCAL = LocalVocabulary()


def reduced(nll: Tensor, target: Tensor, ignore_index: int, reduction: str) -> NLL:  # (N,), (N,)
    """The loss of `nll`, which is 0 where the target is ignored."""
    if reduction == "none":
        return NLL(nll, nll)
    if reduction == "sum":
        return NLL(nll, nll.sum())
    return NLL(nll, nll.sum() / (target != ignore_index).sum())
