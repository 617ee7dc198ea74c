"""The heads as modules: `MoS`, and the paper's baselines `MoC` and `Softmax` behind the same interface.

Each replaces `Linear(in_features, n_classes)` and cross-entropy by a fused log-likelihood.
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
    """A single softmax, the head that a mixture replaces: p = softmax(W h + b).

    Its matrix of log-probabilities has a rank of at most in_features + 2: the bias and the normaliser add one each
    (Yang et al. 2018, section 2.2).

    Args:
        in_features: size H of the context vector.
        n_classes: size V of the vocabulary.
        bias: whether the decoder has a bias.
        weight: an embedding's Parameter (V, H) to tie the decoder to.
        backend: one of `fused_mos.backends()`, or "auto".
        device, dtype: device and dtype of the parameters; by default those of `weight`, if given.
        softcap: c > 0, to replace the logits l by c·tanh(l/c); None for no soft cap.

    Raises:
        TypeError, ValueError: an argument does not fit the description above.
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
        latent_features: size D of the experts' vectors; by default that of `weight`, if given, else in_features.
        bias: whether the decoder has a bias.
        latent_dropout: rate of locked dropout on the latent vectors (the paper's dropoutl). All time steps of an input
            (T, B, H) share one mask; the first axis is time.
        weight: an embedding's Parameter (V, D) to tie the decoder to.
        backend: one of `fused_mos.backends()`, or "auto".
        device, dtype: device and dtype of the parameters; by default those of `weight`, if given.
        softcap: c > 0, to replace each expert's logits l by c·tanh(l/c); None for no soft cap.
        n_external: number K′ of components from elsewhere (a cache, a pointer network, an n-gram model) that the prior
            mixes with the experts. `forward` then needs their `extra_log_prob`, and methods that need all classes raise
            RuntimeError. MoC has none.
        latent: "tanh", as in the paper; "linear", z_k = W_k h + c_k; or "residual", z_k = h + U_k h with U_k = 0 at
            first, which needs latent_features = in_features.
        latent_norm: divide each W_k h + c_k by its root mean square (RMSNorm without a weight). This keeps tanh from
            saturating under Adam. Not supported for "residual".
        rank: r ≤ min(H, D), to make W_k or U_k a product A_k B_k of (D, r) and (r, H); None for full matrices.

    Raises:
        TypeError, ValueError: an argument does not fit the description above.

    The submodules `prior`, `latent.0` and `decoder` are named as in the paper's published code. With a rank, `latent.0`
    has `down` (K·r, H) and `up` (K, D, r) instead of `weight`.

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
        """Replace a trained softmax layer by a mixture with the same log-probabilities. Its experts are residual,
        z_k = h + U_k h with U_k = 0, over the layer's own decoder.

        The decoder's weight and bias are the Parameters of `linear`, so a tied embedding stays tied. (The head itself
        is not marked `tied`; call `head.tie(embedding.weight)` if another module initialises the weight.)

        Equal experts with equal prior probabilities would get equal gradients and stay equal forever. While the experts
        are equal, the prior does not affect the log-probabilities, so it starts random: its logits have a standard
        deviation of 1 for hidden states of root mean square `input_rms`.

        Args:
            linear: a plain nn.Linear (H, V).
            n_experts: K.
            rank: r of U_k = A_k B_k, with A_k = 0 and B_k random; None for full matrices U_k (H, H).
            noise: initial |U_k h| ÷ |h|. Values above 0 cost log-likelihood at first. (In bfloat16, h + U_k h rounds to
                h below about 0.002.)
            input_rms: root mean square of the hidden states, hidden.square().mean().sqrt(); 1 after a norm without a
                gain.
            backend, softcap: as in the constructor.

        Returns:
            The new head, on the device and with the dtype of `linear`.

        Raises:
            TypeError: `linear` is not a plain nn.Linear with a floating-point Parameter.
            ValueError: another argument does not fit the description above.
        """
        _check_linear(linear)
        _check_scales(noise, input_rms)
        weight, bias = linear.weight, linear.bias
        # a single value expanded to (V, H), so no second decoder is allocated
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
        """Return a new head with m copies of each of the K experts, over the same decoder and with the same
        log-probabilities (up to dropout, since each expert draws its own). This head is unchanged. Make a new optimizer
        for the new head.

        The copies of an expert split its prior probability differently at each token, or they would stay equal forever.
        Copy j has the prior logit l_k(h) + v_j·h. Summed over the copies, exp of it is the same multiple of exp(l_k(h))
        for all k, so the mixture does not change. v_j is drawn from N(0, 1 / in_features) and divided by `input_rms`.

        Args:
            m: copies of each expert, in the order 1 … K, 1 … K, …
            noise: length, relative to |h|, of a random vector added to each copy's W_k h or U_k h. Values above 0 cost
                log-likelihood at first.
            input_rms: root mean square of the hidden states, as in `from_linear`.

        Raises:
            TypeError, ValueError: an argument does not fit the description above.
            ValueError: the head has external components, whose share of the prior would change.
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
        """Initialise as the paper does: decoder weight U(−0.1, 0.1), bias 0, torch's default for the rest.

        Residual experts start with U_k = 0 (A_k = 0 with a rank), which makes the head a single softmax. Their prior
        has weights N(0, 1/in_features), so its logits have a standard deviation of 1 if h has a root mean square of 1.
        These unequal shares of the tokens let equal experts diverge.

        A tied weight belongs to its embedding and is left unchanged. The scales suit SGD and Adam. Adam learns the bias
        only slowly, so set it with `init_bias`.
        """
        super().reset_parameters()
        if isinstance(self.latent[0], LowRank):
            self.latent[0].reset_parameters()
        if self.latent_kind == "residual":
            clear(self.latent)
            nn.init.normal_(self.prior.weight, std=self.in_features**-0.5)

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.latent_dropout(self.latent(input))
        # view, since torch.compile cannot trace unflatten under a default device (torch 2.11)
        return latent.view(*input.shape[:-1], self.n_experts, self.decoder.in_features), self.prior(input)

    def _check_components(self, n_external: int) -> None:
        """Raise ValueError if the head cannot have external components."""

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
        kind += "" if isinstance(weight, nn.Parameter) else " computed by a parametrization"
        raise TypeError(f"linear must have a floating-point Parameter as its weight, got a {kind}")


def _check_scales(noise: float, input_rms: float) -> None:
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    if not 0 < input_rms < math.inf:
        raise ValueError(f"input_rms must be positive and finite, got {input_rms}")


class MoC(MoS):
    """Mixture of Contexts: p = softmax(W Σ_k π_k tanh(W_k h + c_k) + b) (Yang et al. 2018, section 2.4).

    The paper's control: it has the arguments and parameters of `MoS`, but mixes inside a single softmax. The rank is at
    most latent_features + 2, as for `Softmax`.
    """

    def _check_components(self, n_external: int) -> None:
        raise ValueError(f"n_external must be 0 for MoC, whose one softmax mixes with nothing, got {n_external}")

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent, prior_logits = super().mixture(input)
        context = torch.softmax(prior_logits, dim=-1).unsqueeze(-2) @ latent
        return context, context.new_zeros(*context.shape[:-1])
