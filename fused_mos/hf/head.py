"""The head that replaces a model's lm_head."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .._inputs import prepared
from .._local import LOCAL
from ..head import HeadOutput, check_int
from ..module import MoS
from .loss import LossRequest


@dataclasses.dataclass
class HeadOptions:
    """The head's entry `mos` in a model's configuration."""

    n_experts: int
    rank: int | None = None
    """Rank of the experts' changes to the hidden state; None for full rank."""
    scale: float = 1.0
    """Factor of the logits, as in Cohere and Granite after lm_head."""
    softcap: float | None = None
    """Soft cap of the logits, as in Gemma 2 after lm_head."""

    def __post_init__(self):
        self.n_experts = check_int("n_experts", self.n_experts)
        if self.rank is not None:
            self.rank = check_int("rank", self.rank)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LMHead(MoS):
    """A mixture in place of an lm_head: hidden states (…, D) -> logits (…, V), or the loss that the model asks for.

    The logits are log p + Σ_k π_k L_k, with the experts' log-normalisers L_k. While all experts are equal, these are
    the logits of the original softmax. The second term does not change a softmax of the logits, but it matters to a
    repetition penalty, which depends on their signs.
    """

    scale = 1.0
    request: LossRequest | None = None
    """The loss that the model's current forward pass asks for, if any."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # An empty weight is saved, too. A class that expects an nn.Linear here then fails on its size instead of
        # loading random values. Mamba reads its dtype.
        weight = self.decoder.weight
        self.register_buffer("weight", torch.empty(0, device=weight.device, dtype=weight.dtype))

    @property
    def bias(self) -> Tensor | None:
        return self.decoder.bias

    def _operands(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if hasattr(self.decoder, "_hf_hook"):
            self._take_over_from_accelerate()
        return super()._operands(input)

    def _take_over_from_accelerate(self) -> None:
        """Remove accelerate's hook on the decoder, which moves the inputs of a layer under a device_map. The head reads
        the decoder without calling it, and its own hook moves the inputs.

        Raises RuntimeError if the decoder's weight is offloaded.
        """
        if self.decoder.weight.device.type == "meta":
            raise RuntimeError(
                "the decoder of this head is offloaded, and a mixture reads it without calling it; load the model with "
                "a device_map that keeps lm_head, and a tied embedding, on a device"
            )
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(self.decoder)
        vars(self.decoder).pop("forward", None)  # nn.Linear's own, which accelerate leaves there

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        latent, prior_logits = super().mixture(input)
        return latent if self.scale == 1 else latent * self.scale, prior_logits

    def forward(self, input: Tensor, target: Tensor | None = None, **options):
        if target is not None:
            return super().forward(input, target, **options)
        return self.logits(input) if self.request is None else self._answer(self.request, input)

    def _answer(self, request: LossRequest, input: Tensor) -> Tensor:
        """The loss of `request`. It is returned as the module's output, since hooks of FSDP2 and accelerate see only
        outputs."""
        result = super().forward(
            input,
            request.target(input),
            ignore_index=request.ignore_index,
            reduction=request.reduction,
            label_smoothing=request.label_smoothing,
        )
        assert isinstance(result, HeadOutput)  # and no lse
        return request.reduced(result.loss)

    def logits(self, input: Tensor) -> Tensor:
        """log p + Σ_k π_k L_k: (…, in_features) -> (…, n_classes). Costs the products of `mos_log_prob`, and one more
        with gradients."""
        latent, prior_logits, weight, bias = self._operands(input)
        with prepared(latent, prior_logits, weight, bias, self.backend, self.softcap) as operands:
            log_prob, lse = LOCAL.of_backend(operands).distribution_with_lse(operands.contiguous())
        level = (prior_logits.to(lse.dtype).softmax(-1) * lse).sum(-1, keepdim=True)
        return (log_prob + level).view(*input.shape[:-1], -1)

    def own_parameters(self) -> dict[nn.Module, list[nn.Parameter]]:
        """The mixture's parameters besides the decoder's, by the module that holds them."""
        modules = [module for module in self.modules() if module is not self.decoder]
        return {module: list(module.parameters(recurse=False)) for module in modules}


def upcycle(linear: nn.Linear, options: HeadOptions, noise: float, input_rms: float, backend: str) -> LMHead:
    """A head with the log-probabilities of a trained lm_head, whose Parameters it shares. `input_rms` is the root mean
    square of the hidden states."""
    head = LMHead.from_linear(
        linear,
        options.n_experts,
        rank=options.rank,
        noise=noise,
        input_rms=input_rms,
        backend=backend,
        softcap=options.softcap,
    )
    head.scale = options.scale
    return head


def build(linear: nn.Linear, options: HeadOptions) -> LMHead:
    """A head with the shapes of `upcycle`, to load weights into."""
    weight = linear.weight
    head = LMHead(
        linear.in_features,
        linear.out_features,
        options.n_experts,
        bias=linear.bias is not None,
        latent="residual",
        rank=options.rank,
        softcap=options.softcap,
        device=weight.device,
        dtype=weight.dtype,
    )
    head.scale = options.scale
    return head
