"""Provisional, until `MoS` itself has them: residual latents, and `from_linear`."""

import torch
from torch import Tensor, nn

from ..module import MoS


class ResidualMoS(MoS):
    """A mixture whose experts' vectors are z_k = h + U_k h, or with a rank h + A_k B_k h."""

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_experts: int,
        *,
        bias: bool,
        rank: int | None = None,
        latent: str = "residual",
        backend: str = "auto",
        device=None,
        dtype=None,
        softcap: float | None = None,
    ):
        super().__init__(
            in_features, n_classes, n_experts, bias=bias, backend=backend, device=device, dtype=dtype, softcap=softcap
        )
        assert latent == "residual"
        device, dtype = self.decoder.weight.device, self.decoder.weight.dtype
        features = rank or in_features
        self.latent = nn.Sequential(
            nn.Linear(in_features, n_experts * features, bias=False, device=device, dtype=dtype)
        )
        self.up: nn.Parameter | None = None
        if rank is not None:
            self.up = nn.Parameter(torch.zeros(n_experts, in_features, rank, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, n_experts: int, *, rank: int | None = None, noise: float = 0.0):
        """A head that gives what `linear` gives, to whose Parameters its decoder's are set. The prior is random, which
        parts the experts; `noise` is |U_k h| ÷ |h|."""
        device, dtype = linear.weight.device, linear.weight.dtype
        head = cls(  # with one class, since its own decoder goes
            linear.in_features, 1, n_experts, bias=linear.bias is not None, rank=rank, device=device, dtype=dtype
        )
        head.decoder, head.n_classes = linear, linear.out_features
        narrow = linear.in_features**-0.5
        nn.init.normal_(head.prior.weight, 0, narrow)
        nn.init.normal_(head.latent.get_parameter("0.weight"), 0, noise * narrow if head.up is None else narrow)
        if head.up is not None:
            nn.init.normal_(head.up, 0, noise * head.up.shape[-1] ** -0.5)
        return head

    def mixture(self, input: Tensor) -> tuple[Tensor, Tensor]:
        change = self.latent(input).unflatten(-1, (self.n_experts, -1))
        if self.up is not None:
            change = torch.einsum("...kr,kdr->...kd", change, self.up)
        return input.unsqueeze(-2) + change, self.prior(input)
