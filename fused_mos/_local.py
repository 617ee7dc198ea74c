"""A vocabulary whose classes are all in this process, computed by the fused ops or, for "reference", by plain torch."""

from abc import abstractmethod

import torch
from torch import Tensor

from . import _backends, ops
from ._backends import IDENTITY, Sum, Transform, reference
from ._backends.from_rows import weighted
from ._backends.reference import log_softmax_prior
from ._backends.tracing import is_exporting
from ._inputs import Operands
from ._losses import NLL, reduced
from ._vocabulary import Normalisers, TopK, Vocabulary, WithSum, chosen_columns
from .ops.sums import at_top


class AllClasses(Vocabulary):
    """Base class of the fused and the reference vocabulary."""

    def of_backend(self, operands: Operands) -> "AllClasses":
        return REFERENCE if operands.backend == "reference" else LOCAL

    def count_classes(self, operands: Operands) -> int:
        return operands.weight.shape[0]

    def rows(self, whole: Tensor) -> Tensor:
        return whole

    def sum_of_logits(self, operands: Operands, class_weight: Tensor | None) -> Tensor | None:
        """z·(Eᵀw) + b·w, without a product of every token with E."""
        latent, _, weight, bias, _, softcap = operands
        if latent.shape[1] > 1 or softcap:
            return None
        dtype = reference.accumulation_dtype(latent.dtype)
        rows = weight.sum(0, dtype=dtype) if class_weight is None else weight.to(dtype).t() @ class_weight
        sums = latent[:, 0].to(dtype) @ rows
        if bias is None:
            return sums
        if class_weight is None:
            return sums + bias.sum(dtype=dtype)
        return sums + torch.where(class_weight != 0, bias.to(dtype), 0) @ class_weight

    @abstractmethod
    def distribution_with_lse(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all classes, (N, V), and the experts' log-normalisers, (N, K)."""

    def choose(self, probability: Tensor, generator: torch.Generator | None) -> Tensor:
        return chosen_columns(probability, generator)


class LocalVocabulary(AllClasses):
    def loss(
        self,
        operands: Operands,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        filter_eps: float,
        loss_weights: Tensor | None,
        with_lse: bool,
    ) -> NLL:
        """Form the gradient in the forward pass if the loss is one number: each token's weight in it is then known, and
        one product is saved. Gradients that arrive through `nll` or `lse` are recomputed in that case."""
        inputs, backend, softcap = operands.tensors, operands.backend, operands.softcap
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
        n, n_experts, _ = operands.latent.shape
        if is_exporting():
            in_one_op = False  # choosing by N would restrict N in the exported program
        elif any(needs):
            in_one_op = _backends.kernels(backend).gradient_in_forward_pays(n, n_experts, *inputs[2:])
        else:
            in_one_op = _backends.has_own_small_kernels(backend)
        if reduction != "none" and in_one_op:
            mean = reduction == "mean"
            options = ignore_index, filter_eps, mean, needs, backend, softcap, with_lse, loss_weights
            results = ops.call_nll_with_gradients(*inputs, target, *options)
            return NLL(results[2], results[0], results[-1] if with_lse else None)
        lse_too = with_lse or loss_weights is not None
        results = ops.call_nll(*inputs, target, ignore_index, filter_eps, backend, softcap, lse_too)
        return reduced_loss(results[0], results[-1], operands, target, ignore_index, reduction, loss_weights, with_lse)

    def experts(self, operands: Operands, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        latent, _, weight, bias, backend, softcap = operands
        return ops.expert_log_prob(latent, weight, bias, index, backend, softcap, temperature)[:2]

    def with_sum(
        self,
        operands: Operands,
        target: Tensor,
        kind: str,
        class_weight: Tensor | None = None,
        mixture_temperature: float = 1.0,
        temperature: float = 1.0,
    ) -> WithSum:
        of_sum = kind, class_weight, mixture_temperature
        options = operands.backend, operands.softcap, temperature
        return WithSum(*ops.likelihood_and_sum(*operands.tensors, target, *of_sum, *options)[:4])

    def distribution(self, operands: Operands, temperature: float = 1.0) -> Tensor:
        log_p = self._distribution_of_few_tokens(operands, temperature)
        if log_p is None:
            log_p = ops.log_prob(*operands.tensors, operands.backend, operands.softcap, temperature)[0]
        return log_p

    def distribution_with_lse(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """log p, (N, V), and the experts' log-normalisers, (N, K), both differentiable.

        With gradients it takes one product more than `distribution`, whose normalisers are not differentiable by
        themselves.
        """
        log_p = self._distribution_of_few_tokens(operands)
        if log_p is None:
            log_p, maximum, log_total = ops.log_prob(*operands.tensors, operands.backend, operands.softcap)
            if not log_p.requires_grad:
                return log_p, maximum + log_total
        return log_p, ops.logsumexp(
            operands.latent, operands.weight, operands.bias, operands.backend, operands.softcap
        )[0]

    def _distribution_of_few_tokens(self, operands: Operands, temperature: float = 1.0) -> Tensor | None:
        """Log-probabilities in one product, or None if the backend needs two."""
        latent, prior_logits, weight, bias = operands.tensors
        if decoder := self._decoder(operands, temperature, *operands.tensors):
            return decoder.log_prob(latent, log_softmax_prior(prior_logits).float(), weight, bias)
        return None

    def normalisers(self, operands: Operands, temperature: float = 1.0) -> Normalisers:
        return Normalisers(*ops.normalisers(*operands.tensors, operands.backend, operands.softcap, temperature))

    def best(self, operands: Operands) -> Tensor:
        return ops.predict(*operands.tensors, operands.backend, operands.softcap)

    def candidates(self, operands: Operands, k: int, temperature: float = 1.0) -> TopK:
        latent, prior_logits, weight, bias = operands.tensors
        if decoder := self._decoder(operands, temperature, latent):
            top = decoder.topk(latent, log_softmax_prior(prior_logits).float(), weight, bias, k)
            if top is not None:
                return TopK(*top)
        return TopK(*ops.topk(*operands.tensors, k, operands.backend, operands.softcap, temperature))

    @staticmethod
    def _decoder(operands: Operands, temperature: float, latent: Tensor, *others: Tensor | None):
        """The backend's kernel for generation, or None: it cannot transform logits."""
        if Transform(operands.softcap, temperature) != IDENTITY:
            return None
        return _backends.decoder(operands.backend, latent, *others)

    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        seed = new_seed(generator, operands.latent.device)
        return ops.sample(*operands.tensors, temperature, seed, operands.backend, operands.softcap)


class ReferenceVocabulary(AllClasses):
    """Plain torch that materialises all K distributions. It supports every kind of differentiation."""

    def loss(
        self,
        operands: Operands,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        filter_eps: float,
        loss_weights: Tensor | None,
        with_lse: bool,
    ) -> NLL:
        nll, lse = reference.nll(*operands.tensors, target, ignore_index, Transform(operands.softcap))
        return reduced_loss(nll, lse, operands, target, ignore_index, reduction, loss_weights, with_lse)

    def experts(self, operands: Operands, index: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        latent, _, weight, bias, _, softcap = operands
        return reference.expert_log_prob(latent, weight, bias, index.clamp_min(0), Transform(softcap, temperature))

    def with_sum(
        self,
        operands: Operands,
        target: Tensor,
        kind: str,
        class_weight: Tensor | None = None,
        mixture_temperature: float = 1.0,
        temperature: float = 1.0,
    ) -> WithSum:
        log_p = self.distribution(operands, temperature)
        if kind == "tempered":
            value = torch.logsumexp(log_p / mixture_temperature, 1)
        else:
            value = Sum(kind, class_weight).terms(log_p, slice(None))[0].sum(1)
        log_likelihood, lse = self.experts(operands, target[:, None], temperature)
        joint = log_softmax_prior(operands.prior_logits).to(lse.dtype) + log_likelihood.squeeze(2)
        of_target = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
        return WithSum(reference.mixed(joint), lse, value, at_top(of_target, log_p.amax(1)))

    def distribution(self, operands: Operands, temperature: float = 1.0) -> Tensor:
        return reference.log_prob(*operands.tensors, Transform(operands.softcap, temperature))

    def distribution_with_lse(self, operands: Operands) -> tuple[Tensor, Tensor]:
        latent, _, weight, bias, _, softcap = operands
        return self.distribution(operands), reference.logsumexp(latent, weight, bias, Transform(softcap))

    def normalisers(self, operands: Operands, temperature: float = 1.0) -> Normalisers:
        latent, prior_logits, weight, bias, _, softcap = operands
        lse = reference.logsumexp(latent, weight, bias, Transform(softcap, temperature))
        return Normalisers(log_softmax_prior(prior_logits).to(lse.dtype), lse, torch.zeros_like(lse))

    def best(self, operands: Operands) -> Tensor:
        return self.distribution(operands).argmax(-1)

    def candidates(self, operands: Operands, k: int, temperature: float = 1.0) -> TopK:
        return TopK(*self.distribution(operands, temperature).topk(k))

    def drawn(self, operands: Operands, temperature: float, generator: torch.Generator | None) -> Tensor:
        return reference.sample(*operands.tensors, Transform(operands.softcap, temperature), generator)


def reduced_loss(
    nll: Tensor,  # (N,)
    lse: Tensor,  # (N, K)
    operands: Operands,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    loss_weights: Tensor | None,
    with_lse: bool,
) -> NLL:
    """Weight and reduce the tokens' NLL, which is 0 for ignored tokens."""
    if loss_weights is None:
        loss = reduced(nll, (target != ignore_index).sum(), reduction)
    else:
        loss = weighted(nll, lse, log_softmax_prior(operands.prior_logits), loss_weights).sum()
    return NLL(nll, loss, lse if with_lse else None)


def new_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed (1,) for an op that samples: a generator itself cannot be an op's argument."""
    return torch.randint(2**62, (1,), generator=generator, device=device)


LOCAL = LocalVocabulary()
REFERENCE = ReferenceVocabulary()
