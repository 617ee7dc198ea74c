"""The experts' latent vectors: maps of the context h (…, H) to z_1 … z_K, side by side (…, K·D).

    tanh       z_k = tanh(norm(W_k h + c_k))
    linear     z_k = norm(W_k h + c_k)
    residual   z_k = h + U_k h

The norm is optional. With a rank, W_k or U_k is the product A_k B_k of an "up" matrix (D, rank) and a "down" matrix
(rank, H). Every parameter holds the experts one after another in its first dimension.
"""

from typing import cast

import torch
from torch import Tensor, nn

KINDS = ("tanh", "linear", "residual")


def check_latents(
    kind: str,
    in_features: int,
    latent_features: int,
    norm: bool,
    rank: int | None,
    names: tuple[str, str] = ("in_features", "latent_features"),
) -> None:
    """Raise ValueError for options that exclude each other. `names` are the names of the two sizes in its message."""
    if kind not in KINDS:
        raise ValueError(f"latent must be one of {', '.join(KINDS)}, got {kind!r}")
    name_in, name_latent = names
    if kind == "residual" and latent_features != in_features:
        raise ValueError(
            f"latent='residual' adds to the input, so {name_latent} must be {name_in}, got "
            f"{latent_features} and {in_features}"
        )
    if kind == "residual" and norm:
        raise ValueError(
            "latent_norm must be False for latent='residual', whose vectors keep the scale of the input, got True"
        )
    if rank is not None and rank > min(in_features, latent_features):
        raise ValueError(
            f"rank must be at most min({name_in}, {name_latent}) = {min(in_features, latent_features)}, got {rank}"
        )


def make_latents(
    kind: str, in_features: int, n_experts: int, latent_features: int, norm: bool, rank: int | None, device, dtype
) -> nn.Sequential:
    """The module for `kind`. Its first part holds all parameters.

    Raises ValueError for options that exclude each other.
    """
    check_latents(kind, in_features, latent_features, norm, rank)
    residual = kind == "residual"
    options = {"bias": not residual, "device": device, "dtype": dtype}
    maps: nn.Linear | LowRank
    if rank is None:
        maps = nn.Linear(in_features, n_experts * latent_features, **options)
    else:
        maps = LowRank(in_features, n_experts, latent_features, rank, **options)
    if residual:
        return Residual(maps)
    return nn.Sequential(maps, *[ExpertNorm(latent_features)] * norm, *[nn.Tanh()] * (kind == "tanh"))


class LowRank(nn.Module):
    """h (…, H) -> A_k B_k h + c_k for all experts (…, K·D): one product with B, then one with A, batched by expert."""

    def __init__(self, in_features: int, n_experts: int, latent_features: int, rank: int, bias: bool, device, dtype):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(n_experts * rank, in_features, **options))  # B
        self.up = nn.Parameter(torch.empty(n_experts, latent_features, rank, **options))  # A
        self.bias = nn.Parameter(torch.empty(n_experts * latent_features, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise B_k and c_k as nn.Linear does, and A_k so that A_k B_k has the variance of an nn.Linear weight."""
        (_, in_features), rank = self.down.shape, self.up.shape[2]
        nn.init.uniform_(self.down, -(in_features**-0.5), in_features**-0.5)
        nn.init.uniform_(self.up, -((3 / rank) ** 0.5), (3 / rank) ** 0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(in_features**-0.5), in_features**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        n_experts, _, rank = self.up.shape
        inner = nn.functional.linear(h, self.down).view(*h.shape[:-1], n_experts, rank)
        latent = torch.einsum("...kr,kdr->...kd", inner, self.up).flatten(-2)
        return latent if self.bias is None else latent + self.bias

    def extra_repr(self) -> str:
        n_experts, latent_features, rank = self.up.shape
        sizes = f"in_features={self.down.shape[1]}, n_experts={n_experts}, latent_features={latent_features}"
        return f"{sizes}, rank={rank}, bias={self.bias is not None}"


class ExpertNorm(nn.RMSNorm):
    """RMSNorm of each expert's vector, without a weight: a learned gain could saturate tanh again, which is what the
    norm prevents, and the decoder scales the vectors anyway."""

    def __init__(self, latent_features: int):
        super().__init__(latent_features, eps=1e-6, elementwise_affine=False)  # the default eps is 0.008 in bfloat16

    def forward(self, latent: Tensor) -> Tensor:  # (…, K·D)
        (latent_features,) = self.normalized_shape
        experts = latent.view(*latent.shape[:-1], latent.shape[-1] // latent_features, latent_features)
        return super().forward(experts).view(latent.shape)


class Residual(nn.Sequential):
    """h (…, D) -> h + U_k h for all experts (…, K·D). Its only part computes U_k h."""

    def forward(self, h: Tensor) -> Tensor:
        moved = super().forward(h)
        n_experts = moved.shape[-1] // h.shape[-1]
        return (h.unsqueeze(-2) + moved.view(*h.shape[:-1], n_experts, h.shape[-1])).flatten(-2)


def maps_of(latents: nn.Sequential) -> nn.Linear | LowRank:
    """The part that holds W_k and c_k, or U_k, of all experts."""
    return cast(nn.Linear | LowRank, latents[0])


def clear(latents: nn.Sequential) -> None:
    """Set every expert's matrix to 0. Of a product A_k B_k only A_k becomes 0: it still gets a gradient through B_k."""
    maps = maps_of(latents)
    nn.init.zeros_(maps.up if isinstance(maps, LowRank) else maps.weight)


@torch.no_grad()
def perturb(latents: nn.Sequential, latent_features: int, noise: float) -> None:
    """Add to each expert's matrix a random one that maps h to a vector of about `noise` times its length."""
    maps = maps_of(latents)
    if isinstance(maps, LowRank):
        # |B_k h|² is about rank · (mean square of B_k) · |h|²
        lengths = (latent_features * maps.up.shape[2] * maps.down.square().mean()).sqrt()
        maps.up.add_(torch.randn_like(maps.up) * (noise / lengths))
    else:
        maps.weight.add_(torch.randn_like(maps.weight), alpha=noise / latent_features**0.5)


@torch.no_grad()
def repeat_experts(module: nn.Module, times: int) -> None:
    """Repeat the experts as 1 … K, 1 … K, … in a module whose parameters hold them in the first dimension."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                repeated = parameter.repeat(times, *[1] * (parameter.dim() - 1))
                part._parameters[name] = nn.Parameter(repeated, parameter.requires_grad)
        if isinstance(part, nn.Linear):
            part.out_features *= times
