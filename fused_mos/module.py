"""The heads as modules: `MoS`, and the paper's baselines `MoC` and `Softmax` behind the same interface.

All three put a fused log-likelihood where a model would have `Linear(in_features, n_classes)` and cross-entropy.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._latents import LowRank, clear, make_latents, perturb, repeat_experts
from ._plain import addition
from .dropout import LockedDropout, check_probability
from .head import Head, check_int, check_parameter

Mixture = TypeVar("Mixture", bound="MoS")


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
    """Mixture of Softmaxes: p = Σ_k π_k softmax(W z_k + b), z_k = tanh(W_k h + c_k) (Yang et al. 2018, section 2.3).

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
        latent: "tanh", the paper's; "linear", z_k = W_k h + c_k; or "residual", z_k = h + U_k h with U_k = 0 to begin
            with, which needs latent_features = in_features.
        latent_norm: divide each W_k h + c_k by its root mean square (an RMSNorm without a weight), which keeps tanh
            from saturating under Adam. Not for "residual".
        rank: r, for W_k or U_k as a product A_k B_k of (D, r) and (r, H); at most min(H, D). None for whole matrices.

    Raises ValueError, TypeError: an argument that is not as above.

    The submodules `prior`, `latent.0` and `decoder` are named as in the paper's published code; with a rank, `latent.0`
    has `down` (K·r, H) and `up` (K, D, r) for `weight`.

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
        latent: str = "tanh",
        latent_norm: bool = False,
        rank: int | None = None,
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
        self.latent_kind, self.latent_norm = latent, latent_norm
        self.rank = None if rank is None else check_int("rank", rank)
        sizes = in_features, n_experts, self.decoder.in_features
        self.latent = make_latents(latent, *sizes, latent_norm, self.rank, device, dtype)
        self.latent_dropout = LockedDropout(latent_dropout)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls: type[Mixture],
        linear: nn.Linear,
        n_experts: int,
        *,
        rank: int | None = None,
        noise: float = 0.0,
        input_rms: float = 1.0,
        backend: str = "auto",
        softcap: float | None = None,
    ) -> Mixture:
        """A mixture in the place of a trained softmax layer, with the same log-probabilities: experts with residual
        latents, U_k = 0, over the layer's own decoder.

        The decoder's weight and bias are the Parameters of `linear`, so ties survive. (The head is not `tied` itself:
        `head.tie(embedding.weight)` tells it that another module initialises the weight.)

        Experts that are equal and have equal shares would get equal gradients and never part. Any shares leave the
        log-probabilities as they are, so it is the prior that is random: weights N(0, 1 / in_features), logits of
        standard deviation 1 for hidden states of root mean square `input_rms`.

        Args:
            linear: a plain nn.Linear (H, V).
            n_experts: K.
            rank: r of U_k = A_k B_k, with A_k = 0 and B_k random; by default U_k are whole matrices (H, H).
            noise: |U_k h| ÷ |h| to begin with, which costs log-likelihood. (In bfloat16 h + U_k h is h where this is
                below 0.002.)
            input_rms: of the hidden states, such as hidden.square().mean().sqrt(): 1 behind a norm without gains.
            backend, softcap: as in the constructor.

        Raises TypeError, ValueError.
        """
        _check_linear(linear)
        _check_scales(noise, input_rms)
        weight, bias = linear.weight, linear.bias
        # one number that stands for (V, H): there never is a second decoder
        place = nn.Parameter(weight.new_zeros(()).expand_as(weight), requires_grad=False)
        head = cls(
            linear.in_features,
            linear.out_features,
            n_experts,
            bias=bias is not None,
            weight=place,
            backend=backend,
            softcap=softcap,
            latent="residual",
            rank=rank,
        )
        head.decoder.weight, head.decoder.bias, head.tied = weight, bias, False
        with torch.no_grad():
            head.prior.weight.div_(input_rms)
        if noise:
            perturb(head.latent, head.decoder.in_features, noise)
        return head.train(linear.training)

    def grow(self: Mixture, m: int, *, noise: float = 0.0, input_rms: float = 1.0) -> Mixture:
        """A new head of m·K experts, m copies of each, over the same decoder, with the same log-probabilities (but for
        dropout, of which each expert has its own). This head stays as it is. Make a new optimizer for the new one.

        Copies share their expert's part of the mixture, in shares that depend on the token, else they would never
        part: copy j has the prior logit l_k(h) + v_j·h, of which the sum over copies is the same multiple of
        exp(l_k(h)) for all k. v_j is N(0, 1 / in_features) and makes logits of standard deviation 1.

        Args:
            m: copies of each expert; those of a copy stand together: 1 … K, 1 … K, …
            noise: the length of the random vectors added to each copy's W_k h or U_k h, ÷ |h|; it costs log-likelihood.
            input_rms: the root mean square of the hidden states, as in `from_linear`.

        Raises TypeError, ValueError; ValueError, too, for a head with external components, whose share would change.
        """
        m = check_int("m", m)
        _check_scales(noise, input_rms)
        if self.n_external:
            raise ValueError(f"grow needs a head with n_external = 0, got {self.n_external}")
        head = copy.deepcopy(self, {id(parameter): parameter for parameter in self.decoder.parameters()})
        for module in (head.prior, head.latent):
            repeat_experts(module, m)
        head.n_experts = m * self.n_experts
        if m > 1:
            shares = torch.randn_like(self.prior.weight[:1].expand(m, -1)) / (input_rms * self.in_features**0.5)
            with torch.no_grad():
                head.prior.weight.add_(shares.repeat_interleave(self.n_experts, 0))
        if noise:
            perturb(head.latent, head.decoder.in_features, noise)
        return head

    def reset_parameters(self) -> None:
        """The paper's initialisation: decoder weight U(−0.1, 0.1), bias 0, torch's default for the rest.

        Residual latents begin as h itself, U_k = 0 (A_k where there is a rank), which makes the head a softmax. Their
        prior has weights N(0, 1/in_features), and so logits of standard deviation 1 where h has a root mean square of
        1: experts that are equal part by their shares of the tokens alone.

        A tied weight belongs to its embedding and is left alone. These scales suit SGD and Adam; what Adam cannot do
        in few steps is to learn the bias, which `init_bias` sets.
        """
        super().reset_parameters()
        if isinstance(self.latent[0], LowRank):
            self.latent[0].reset_parameters()
        if self.latent_kind == "residual":
            clear(self.latent)
            nn.init.normal_(self.prior.weight, std=self.in_features**-0.5)

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent_dropout(self.latent(input))
        # not unflatten, which torch.compile cannot trace where a default device is set (torch 2.11)
        return latent.view(*input.shape[:-1], self.n_experts, self.decoder.in_features), self.prior(input)

    def _check_components(self, n_external: int) -> None:
        """Whether the head can have external components."""

    def extra_repr(self) -> str:
        external = f", n_external={self.n_external}" if self.n_external else ""
        latent = f", latent={self.latent_kind!r}" if self.latent_kind != "tanh" else ""
        norm = ", latent_norm=True" if self.latent_norm else ""
        rank = f", rank={self.rank}" if self.rank else ""
        return f"n_experts={self.n_experts}{external}{latent}{norm}{rank}, {super().extra_repr()}"


def _check_linear(linear: nn.Linear) -> None:
    if more := addition(linear, nn.Linear):
        raise TypeError(f"linear must be a plain nn.Linear, but it {more}")
    weight = linear.weight
    if not isinstance(weight, nn.Parameter) or is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
        kind = f"{type(weight.data).__name__} of {weight.dtype}"
        kind += "" if isinstance(weight, nn.Parameter) else ", of a parametrization"
        raise TypeError(f"linear must have a floating-point Parameter as its weight, got a {kind}")


def _check_scales(noise: float, input_rms: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    if not 0 < input_rms < math.inf:
        raise ValueError(f"input_rms must be positive and finite, got {input_rms}")


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
