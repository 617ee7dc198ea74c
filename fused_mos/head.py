"""The base class of the heads: a decoder, a mixture over it, and the functions computed from both.

The interface follows torch.nn.AdaptiveLogSoftmaxWithLoss.
"""

import warnings
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._initial import smoothed, warn_of_large
from ._inputs import check_backend, check_reduction, check_softcap, is_autocast
from ._local import LOCAL
from ._plain import read_decoder
from ._vocabulary import Score, TopK, Vocabulary


class HeadOutput(NamedTuple):
    """`output`: log-likelihood of each target, 0 where ignored. `loss`: the reduced negative log-likelihood."""

    output: Tensor
    loss: Tensor


class Head(nn.Module):
    """Base class of all heads: a decoder, and the mixture over it that `mixture(input)` defines."""

    vocabulary: Vocabulary = LOCAL
    """Computes the head's functions. `vocab_parallel.parallelize` replaces it by a VocabShard."""
    softcap: float | None = None  # a class attribute, for heads pickled by an earlier version
    n_external: int = 0

    def __init__(
        self,
        latent_features: int,
        n_classes: int,
        bias: bool,
        weight: nn.Parameter | None,
        backend: str,
        device,
        dtype,
        softcap: float | None,
    ):
        super().__init__()
        latent_features = check_int("latent_features", latent_features)
        n_classes = check_int("n_classes", n_classes)
        if weight is not None:
            _check_weight(weight, n_classes, latent_features)
            if (
                dtype not in (None, weight.dtype)
                or device is not None
                and torch.device(device).type != weight.device.type
            ):
                raise ValueError(
                    f"device and dtype must be those of weight, {weight.device} and {weight.dtype}, or None, got "
                    f"{device} and {dtype}"
                )
        check_backend(backend)
        check_softcap(softcap)
        self.n_classes = n_classes
        self.softcap = softcap
        self.backend = backend
        self.tied = False
        in_place = "meta" if weight is not None else device  # never allocate a second (V, D)
        self.decoder = nn.Linear(latent_features, n_classes, bias, device=in_place, dtype=dtype)
        if weight is not None:
            self._share(weight)
            warn_of_large(weight, stacklevel=4)  # the constructor's caller
            if bias:
                self.decoder.bias = nn.Parameter(weight.new_empty(n_classes))

    def tie(self, weight: nn.Parameter) -> None:
        """Make an embedding's Parameter (V, D) the decoder's weight, like the constructor's argument `weight`. Call it
        again if the two have become different parameters.

        Raises TypeError unless `weight` is a Parameter, ValueError unless it is (n_classes, latent_features).
        """
        _check_weight(weight, self.decoder.out_features, self.decoder.in_features)
        self._share(weight)
        warn_of_large(weight, stacklevel=3)

    def _share(self, weight: nn.Parameter) -> None:
        self.decoder.weight = weight
        self.tied = True

    def _apply(self, fn, recurse=True):
        before = self.decoder._parameters.get("weight") if self.tied else None
        super()._apply(fn, recurse)
        # .to(device) replaces the data of the same Parameter; to_empty makes a new one
        if before is not None and self.decoder._parameters.get("weight") is not before:
            self._lose_tie("to_empty")
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if self.tied and local_metadata.get("assign_to_params_buffers") and f"{prefix}decoder.weight" in state_dict:
            self._lose_tie("load_state_dict(assign=True)")

    def _lose_tie(self, cause: str) -> None:
        self.tied = False
        warnings.warn(
            f"{cause} makes two parameters of a tied weight, so the decoder now has its own; to tie it to the "
            "embedding again, call head.tie(embedding.weight)",
            stacklevel=3,
        )

    def reset_parameters(self) -> None:
        """Initialise as the paper does: decoder weight U(−0.1, 0.1), bias 0, torch's default for the rest.
        A tied weight belongs to its embedding and is left unchanged."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.decoder:
                module.reset_parameters()
        if not self.tied:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)

    @torch.no_grad()
    def init_bias(self, counts: Tensor) -> None:
        """Set the decoder's bias, in place, to the log-frequencies of the classes in the training text.

        Call it before training. Adam moves the bias by about the learning rate per step, so it needs thousands of steps
        to reach the bias of rare words. Until then the latent vectors are driven to make up for it.

        Args:
            counts: (V,) integers or floats, how often each class is a target. The frequencies are
                (count + 1) / (total + V), so no class has frequency 0. They become the head's probabilities at latent
                vectors of 0 (only approximately with a softcap, which also caps the bias).

        On a head sharded by `vocab_parallel`, pass the counts of all classes; each rank takes its own.

        Raises TypeError or ValueError for bad counts, and ValueError if the head has no bias or its bias was trained.
        """
        _, bias = read_decoder(self.decoder)
        if not isinstance(bias, nn.Parameter):
            raise ValueError(f"init_bias needs a head whose decoder has a bias of its own (bias=True), got {bias}")
        frequencies = smoothed(counts, self.n_classes)
        least, largest = bias.aminmax()
        if least != largest:
            raise ValueError(
                "init_bias is for an untrained bias, whose values are all equal, but the decoder's range from "
                f"{least:.4g} to {largest:.4g}; call reset_parameters first to start again"
            )
        bias.copy_(self.vocabulary.rows(frequencies).log())

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """input (…, in_features) -> latent (…, K, D), prior_logits (…, K + n_external). Subclasses define it."""
        raise NotImplementedError

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        grad_filter_eps: float = 0.0,
        class_weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        target_prob: Tensor | None = None,
        extra_log_prob: Tensor | None = None,
        return_lse: bool = False,
    ) -> "HeadOutput | tuple[HeadOutput, Tensor]":
        """Log-likelihood and loss of `target` given `input`.

        Args:
            input: (…, in_features). Only `MoS.latent_dropout` depends on the order of the leading axes: the first must
                be time.
            target: (…) int64 classes, or `ignore_index`. With `target_prob`, both are (…, M).
            token_weight: (…).
            extra_log_prob: (…, n_external), required for a head with external components and forbidden for others.
            Other arguments: see `functional.mos_nll_loss`.

        Returns:
            output: (…) log-likelihoods in nats. loss: () or, for reduction="none", (…). With `return_lse`,
            ((output, loss), lse) with the experts' log-normalisers lse (…, K). All are differentiable.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as `functional.mos_nll_loss`.
        """
        leading = self._check_external(extra_log_prob, input)
        latent, prior_logits, weight, bias = self._operands(input)
        n_targets = _check_leading("target", target, leading, 0 if target_prob is None else 1)
        if target_prob is not None:
            _check_leading("target_prob", target_prob, leading, 1)
        if token_weight is not None:
            _check_leading("token_weight", token_weight, leading, 0)
        check_reduction(reduction)
        n = latent.shape[0]
        nll, loss, lse = self.vocabulary.nll_and_loss(
            latent,
            prior_logits,
            weight,
            target.reshape(n, *n_targets),
            bias,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=self.backend,
            grad_filter_eps=grad_filter_eps,
            softcap=self.softcap,
            class_weight=class_weight,
            token_weight=None if token_weight is None else token_weight.reshape(n),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            target_prob=None if target_prob is None else target_prob.reshape(n, target_prob.shape[-1]),
            extra_log_prob=None if extra_log_prob is None else extra_log_prob.reshape(n, self.n_external),
            return_lse=return_lse,
        )
        result = HeadOutput(-nll.view(leading), loss.view(leading) if reduction == "none" else loss)
        return result if lse is None else (result, lse.view(*leading, lse.shape[1]))

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes: (…, in_features) -> (…, n_classes)."""
        self._refuse_external("log_prob")
        log_prob = self.vocabulary.mos_log_prob(*self._operands(input), softcap=self.softcap, backend=self.backend)
        return log_prob.view(*input.shape[:-1], self.n_classes)

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class: (…, in_features) -> (…) int64."""
        self._refuse_external("predict")
        index = self.vocabulary.mos_predict(*self._operands(input), softcap=self.softcap, backend=self.backend)
        return index.view(input.shape[:-1])

    def topk(self, input: Tensor, k: int) -> TopK:
        """The k most probable classes, best first: (…, in_features) -> values (…, k), which are log-probabilities, and
        indices (…, k) int64."""
        self._refuse_external("topk")
        values, indices = self.vocabulary.mos_topk(
            *self._operands(input), k=k, softcap=self.softcap, backend=self.backend
        )
        return TopK(values.view(*input.shape[:-1], k), indices.view(*input.shape[:-1], k))

    def sample(
        self,
        input: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        mixture_temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Draw one class per position: (…, in_features) -> (…) int64.

        `temperature` divides each expert's logits, `mixture_temperature` the mixture's log-probabilities; see
        `functional.mos_sample`. For the most probable class use `predict`.
        """
        self._refuse_external("sample")
        index = self.vocabulary.mos_sample(
            *self._operands(input),
            temperature=temperature,
            mixture_temperature=mixture_temperature,
            top_k=top_k,
            top_p=top_p,
            softcap=self.softcap,
            generator=generator,
            backend=self.backend,
        )
        return index.view(input.shape[:-1])

    def log_prob_at(
        self,
        input: Tensor,
        index: Tensor,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        mixture_temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities of given classes: input (…, in_features), index (…) or (…, M) int64 -> the shape of
        `index`. See `functional.mos_log_prob_at`."""
        self._refuse_external("log_prob_at")
        latent, prior_logits, weight, bias = self._operands(input)
        several = isinstance(index, Tensor) and index.dim() == input.dim()
        columns = _check_leading("index", index, input.shape[:-1], several)
        log_prob = self.vocabulary.mos_log_prob_at(
            latent,
            prior_logits,
            weight,
            index.reshape(latent.shape[0], *columns),
            bias,
            ignore_index=ignore_index,
            temperature=temperature,
            mixture_temperature=mixture_temperature,
            softcap=self.softcap,
            backend=self.backend,
        )
        return log_prob.view(index.shape)

    def score(self, input: Tensor, target: Tensor, *, ignore_index: int = -100) -> Score:
        """The target's log_prob, the distribution's entropy, and is_top1, (…) each: input (…, in_features), target (…)
        int64. See `functional.mos_score`."""
        self._refuse_external("score")
        latent, prior_logits, weight, bias = self._operands(input)
        _check_leading("target", target, input.shape[:-1], 0)
        score = self.vocabulary.mos_score(
            latent,
            prior_logits,
            weight,
            target.reshape(-1),
            bias,
            ignore_index=ignore_index,
            softcap=self.softcap,
            backend=self.backend,
        )
        return Score(*(part.view(target.shape) for part in score))

    def _check_external(self, extra_log_prob: Tensor | None, input: Tensor) -> torch.Size:
        """Check `extra_log_prob` against the head and `input`, and return the leading shape."""
        leading = input.shape[:-1] if isinstance(input, Tensor) else torch.Size()
        if (extra_log_prob is not None) != (self.n_external > 0):
            if self.n_external:
                raise ValueError(f"extra_log_prob must be given, since n_external = {self.n_external}, got None")
            raise ValueError("extra_log_prob is for a head with external components, but n_external = 0")
        if extra_log_prob is not None and tuple(extra_log_prob.shape) != (*leading, self.n_external):
            expected, got = (*leading, self.n_external), tuple(extra_log_prob.shape)
            raise ValueError(f"extra_log_prob must be (…, n_external) = {expected}, got {got}")
        return leading

    def _refuse_external(self, method: str) -> None:
        if self.n_external:
            raise RuntimeError(
                f"{method} needs the probabilities of all classes, but {self.n_external} of this head's components are "
                "external and known at the targets only"
            )

    def _operands(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Check `input`; return latent (N, K, D), prior_logits (N, K), and the decoder's weight and bias."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must be (…, in_features = {self.in_features}), got {tuple(input.shape)}")
        weight, bias = read_decoder(self.decoder)
        if input.dtype != weight.dtype and not is_autocast(input.device.type):
            raise TypeError(
                f"input must have the parameters' dtype {weight.dtype}, got {input.dtype}; convert one of them, or use "
                "torch.autocast"
            )
        if input.device != weight.device:
            raise ValueError(f"input is on {input.device} but the parameters are on {weight.device}")
        latent, prior_logits = self.mixture(input)
        return latent.reshape(-1, *latent.shape[-2:]), prior_logits.reshape(-1, prior_logits.shape[-1]), weight, bias

    def extra_repr(self) -> str:
        softcap = "" if self.softcap is None else f", softcap={self.softcap:g}"
        return f"backend={self.backend!r}{softcap}" + (", tied" if self.tied else "")


def _check_leading(name: str, tensor: Tensor, leading: torch.Size, more: int) -> torch.Size:
    """Check that `tensor` has the leading shape and `more` further dimensions, and return the shape of those."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(leading) + more or tensor.shape[: len(leading)] != leading:
        behind = " and one dimension more" if more else ""
        raise ValueError(f"{name} must have input's leading shape {tuple(leading)}{behind}, got {tuple(tensor.shape)}")
    return tensor.shape[len(leading) :]


def check_int(name: str, value: int, least: int = 1) -> int:
    """Return `value` as a Python int, which torch.compile needs even if NumPy's was given.

    Raises TypeError unless it is an integer, ValueError if it is below `least`.
    """
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_parameter(weight: nn.Parameter) -> nn.Parameter:
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"weight must be a Parameter, such as embedding.weight, got {type(weight).__name__}")
    return weight


def _check_weight(weight: nn.Parameter, n_classes: int, latent_features: int) -> None:
    if tuple(check_parameter(weight).shape) != (n_classes, latent_features):
        raise ValueError(
            f"weight must be (n_classes, latent_features) = {(n_classes, latent_features)}, got {tuple(weight.shape)}"
        )
