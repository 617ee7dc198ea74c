"""The heads as modules: `MoS`, and the paper's baselines `MoC` and `Softmax` behind the same interface.

All three put a fused log-likelihood where a model would have `Linear(in_features, n_classes)` and cross-entropy.
"""

import torch
from torch import Tensor, nn

from .dropout import LockedDropout, check_probability
from .head import Head, check_int, check_parameter


class Softmax(Head):
    """One softmax, the head that a mixture replaces: p = softmax(W h + b), whose logarithms have a rank of at most
    in_features + 2: one for the bias, one for the normaliser (Yang et al. 2018, section 2.2).

    Args:
        in_features: size H of the context vector.
        n_classes: size V of the vocabulary.
        bias: whether the decoder has a bias.
        weight: an embedding's Parameter (V, H) to tie the decoder to.
        backend: one of `fused_mos.backends()`, or "auto".
        device, dtype: of the parameters; those of `weight` where it is given.
        softcap: c > 0, for logits c·tanh(l/c); None for none.

    Raises ValueError, TypeError: an argument that is not as above.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        bias: bool = True,
        weight: nn.Parameter | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
        softcap: float | None = None,
    ):
        in_features = check_int("in_features", in_features)
        super().__init__(in_features, n_classes, bias, weight, backend, device, dtype, softcap)
        self.in_features = in_features
        self.reset_parameters()

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return input.unsqueeze(-2), input.new_zeros(*input.shape[:-1], 1)


class MoS(Head):
    """Mixture of Softmaxes: p = Σ_k π_k softmax(W tanh(W_k h + c_k) + b) (Yang et al. 2018, section 2.3).

    Args:
        in_features: size H of the context vector h.
        n_classes: size V of the vocabulary.
        n_experts: K, the number of softmaxes.
        latent_features: size D of the experts' vectors; by default that of `weight`, else in_features.
        bias: whether the decoder has a bias.
        latent_dropout: the paper's dropoutl: locked dropout of the latent vectors, one mask for all time steps
            of an input (T, B, H), whose first axis is time.
        weight: an embedding's Parameter (V, D) to tie the decoder to.
        backend: one of `fused_mos.backends()`, or "auto".
        device, dtype: of the parameters; those of `weight` where it is given.
        softcap: c > 0, for each expert's logits c·tanh(l/c); None for none.
        n_external: K′ components from elsewhere (a cache, a pointer, an n-gram model) that the prior mixes with the
            experts; `forward` is given their `extra_log_prob`, and what needs all classes refuses. Not for MoC.

    Raises ValueError, TypeError: an argument that is not as above.

    The submodules `prior`, `latent.0` and `decoder` are named as in the paper's published code.

    >>> head = MoS(in_features=512, n_classes=10_000, n_experts=15, latent_features=280)
    >>> output, loss = head(hidden, target)   # (T, B, 512), (T, B) -> (T, B), ()
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_experts: int = 10,
        latent_features: int | None = None,
        bias: bool = True,
        latent_dropout: float = 0.0,
        weight: nn.Parameter | None = None,
        backend: str = "auto",
        device=None,
        dtype=None,
        softcap: float | None = None,
        n_external: int = 0,
    ):
        in_features = check_int("in_features", in_features)
        n_experts = check_int("n_experts", n_experts)
        check_probability("latent_dropout", latent_dropout)
        if latent_features is None:
            latent_features = in_features if weight is None else check_parameter(weight).shape[-1]
        super().__init__(latent_features, n_classes, bias, weight, backend, device, dtype, softcap)
        self.n_external = check_int("n_external", n_external, least=0)
        if n_external:
            self._check_components(n_external)
        self.in_features = in_features
        self.n_experts = n_experts
        device, dtype = self.decoder.weight.device, self.decoder.weight.dtype
        self.prior = nn.Linear(in_features, n_experts + self.n_external, bias=False, device=device, dtype=dtype)
        projections = nn.Linear(in_features, n_experts * latent_features, device=device, dtype=dtype)
        self.latent = nn.Sequential(projections, nn.Tanh())
        self.latent_dropout = LockedDropout(latent_dropout)
        self.reset_parameters()

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent_dropout(self.latent(input))
        # not unflatten, which torch.compile cannot trace where a default device is set (torch 2.11)
        return latent.view(*input.shape[:-1], self.n_experts, self.decoder.in_features), self.prior(input)

    def _check_components(self, n_external: int) -> None:
        """Whether the head can have external components."""

    def extra_repr(self) -> str:
        external = f", n_external={self.n_external}" if self.n_external else ""
        return f"n_experts={self.n_experts}{external}, {super().extra_repr()}"


class MoC(MoS):
    """Mixture of Contexts: p = softmax(W Σ_k π_k tanh(W_k h + c_k) + b) (Yang et al. 2018, section 2.4).

    As many parameters as `MoS` and the same arguments, but the mixture is inside one softmax, so the rank
    stays at most latent_features + 2, as in `Softmax`: the paper's control.
    """

    def _check_components(self, n_external: int) -> None:
        raise ValueError(f"n_external must be 0 for MoC, whose one softmax mixes with nothing, got {n_external}")

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent, prior_logits = super().mixture(input)
        context = torch.softmax(prior_logits, dim=-1).unsqueeze(-2) @ latent
        return context, context.new_zeros(*context.shape[:-1])
