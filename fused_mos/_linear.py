"""torch's linear_cross_entropy, computed by the mixture's kernels with K = 1."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ._inputs import check_backend, check_reduction, check_softcap
from ._local import LOCAL
from ._losses import check_terms_of_loss
from ._plain import read_decoder


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a linear layer, without storing its logits: F.cross_entropy(F.linear(input, linear_weight,
    linear_bias), target, …).

    The signature is that of torch.nn.functional.linear_cross_entropy (torch 2.13) with four more keywords. Unlike
    torch's, it takes only 2-D weights and int64 targets, and the loss of 16-bit inputs is float32.

    Args:
        input: (…, D).
        linear_weight: (V, D).
        target: (…) int64 classes, or probabilities (…, V), which are passed on to torch's function (torch ≥ 2.13).
        linear_bias: (V,) or None.
        weight: (V,) class weights, as in F.cross_entropy.
        reduction: "mean", "sum" or "none".
        ignore_index: None for −100.
        label_smoothing: in [0, 1].
        options: options of torch's own implementation; ignored unless the targets are probabilities.
        softcap, z_loss, backend: as in `mos_nll_loss`; not supported if the targets are probabilities.
        return_lse: also return the log-sum-exp of the logits; not supported if the targets are probabilities.

    Returns:
        The loss in nats: () for "mean" and "sum", (…) for "none". With `return_lse`, (loss, lse) with lse (…);
        both are differentiable.

    Each target belongs to the input at the same position. To predict the next token of the same sequence (`shift` in
    cut cross-entropy), pass input[..., :-1, :] and target[..., 1:]; both are copied to contiguous memory.

    Cost: 3 products for a mean or sum with its gradients, label smoothing included; 4 for "none" (see `mos_nll_loss`).

    Raises:
        TypeError, ValueError, IndexError: bad input, as in `mos_nll_loss`.
    """
    if not isinstance(input, Tensor) or input.dim() == 0:
        raise TypeError(f"input must be a Tensor (…, D), got {input if isinstance(input, Tensor) else type(input)}")
    if isinstance(target, Tensor) and target.is_floating_point():
        return _of_probabilities(
            input,
            linear_weight,
            target,
            softcap is not None or z_loss or return_lse or backend != "auto",
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    if isinstance(target, Tensor) and target.shape != input.shape[:-1]:
        raise ValueError(f"target must have input's leading shape {tuple(input.shape[:-1])}, got {tuple(target.shape)}")
    check_reduction(reduction)
    latent = input.reshape(-1, 1, input.shape[-1])
    with _own_names():
        _, loss, lse = LOCAL.nll_and_loss(
            latent,
            latent.new_zeros(latent.shape[:2]),
            linear_weight,
            target.reshape(-1) if isinstance(target, Tensor) else target,
            linear_bias,
            ignore_index=-100 if ignore_index is None else ignore_index,
            reduction=reduction,
            backend=backend,
            softcap=softcap,
            class_weight=weight,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_lse=return_lse,
        )
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss if lse is None else (loss, lse.view(target.shape))


OWN_NAMES = {"latent": "input", "weight": "linear_weight", "bias": "linear_bias", "class_weight": "weight"}
"""The mixture's argument names, and what they are called here."""


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Make errors name the arguments of `linear_cross_entropy`."""
    if torch.compiler.is_compiling():  # it cannot trace the code below, and reports errors in its own way
        yield
        return
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        message = re.sub(r"\b(latent|class_weight|weight|bias)\b", lambda name: OWN_NAMES[name[0]], str(error))
        raise type(error)(message) from None


def _of_probabilities(input: Tensor, linear_weight: Tensor, target: Tensor, extended: object, **arguments) -> Tensor:
    if extended:
        raise ValueError("softcap, z_loss, return_lse and backend are for targets that are classes, got probabilities")
    its_own = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if its_own is None:
        raise TypeError(f"target must be int64 classes, got {target.dtype}; probabilities need torch 2.13 or newer")
    return its_own(input, linear_weight, target, **arguments)


class LinearCrossEntropyLoss(nn.Module):
    """torch.nn.LinearCrossEntropyLoss (torch 2.13) on top of `linear_cross_entropy`: a linear layer and its
    cross-entropy, without `out_features`.

    Args:
        in_features: D.
        num_classes: V.
        bias: whether the linear layer has a bias.
        weight: (V,) class weights, as in nn.CrossEntropyLoss; kept as a buffer.
        device, dtype: device and dtype of the layer's parameters.
        reduction, ignore_index, label_smoothing, options, softcap, z_loss, backend: as in `linear_cross_entropy`.

    Call it with input (…, D) and target (…) to get the loss. Its state_dict is that of torch's module.

    Raises ValueError unless `weight` is (num_classes,).
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        check_reduction(reduction)
        check_softcap(softcap)
        check_backend(backend)
        check_terms_of_loss(label_smoothing, z_loss)
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must be (num_classes,) = {(num_classes,)}, got {tuple(weight.shape)}")
        self.in_features, self.num_classes = in_features, num_classes
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.softcap, self.z_loss, self.backend = options, softcap, z_loss, backend

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = read_decoder(self.linear)
        return linear_cross_entropy(  # type: ignore[return-value]
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            z_loss=self.z_loss,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        softcap = "" if self.softcap is None else f", softcap={self.softcap:g}"
        return (
            f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing:g}, z_loss={self.z_loss:g}{softcap}, "
            f"backend={self.backend!r}"
        )
