"""Random MoS problems, and the criterion that every backend must meet (float64 reference, same-dtype unfused)."""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_mos import functional as F

INPUTS = ("latent", "prior_logits", "weight", "bias")
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


EXACT = {"tiled": (torch.float64, 1e-12), "cpu": (torch.float32, 2e-5), "triton": (torch.float32, 2e-5)}
"""The most precise dtype of each backend, and the tolerance of identities in it for numbers of order 10."""


@dataclass
class Problem:
    latent: Tensor
    prior_logits: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor

    def to(self, dtype: torch.dtype, requires_grad: tuple[str, ...] = INPUTS) -> "Problem":
        """A new copy with leaf tensors of `dtype`."""
        cast = {}
        for name in INPUTS:
            tensor = getattr(self, name)
            cast[name] = (
                None if tensor is None else tensor.detach().to(dtype).clone().requires_grad_(name in requires_grad)
            )
        return Problem(**cast, target=self.target)

    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.latent, self.prior_logits, self.weight, self.bias

    def nll(self, **options) -> Tensor:
        return F.mos_nll_loss(self.latent, self.prior_logits, self.weight, self.target, self.bias, **options)

    def gradients(self) -> dict[str, Tensor]:
        return {
            n: getattr(self, n).grad
            for n in INPUTS
            if getattr(self, n) is not None and getattr(self, n).grad is not None
        }


def problem(
    n: int, k: int, d: int, v: int, bias: bool = True, scale: float = 1.0, seed: int = 0, ignored: bool = True
) -> Problem:
    """A random problem in float64 with logits of order `scale` and biases of order 1, on torch's default device.

    The values are exact in bfloat16, so every dtype gets the same problem, and they are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cpu").bfloat16().double().to(torch.get_default_device())

    target = torch.randint(0, v, (n,), generator=generator, device="cpu").to(torch.get_default_device())
    if ignored and n > 2:
        target[n // 2] = -100
    return Problem(
        latent=torch.tanh(draw(n, k, d)).bfloat16().double(),
        prior_logits=draw(n, k),
        weight=(draw(v, d) * (scale / max(d, 1) ** 0.5)).bfloat16().double(),
        bias=draw(v) if bias else None,
        target=target,
    )


# the computations for `check_forward_and_gradients`: (problem, backend) -> tensor


@functools.cache  # `_expected` is kept by the function
def nll(reduction):
    return lambda p, backend: p.nll(reduction=reduction, backend=backend)


def log_prob(p, backend):
    return F.mos_log_prob(*p.inputs(), backend=backend)


def logsumexp(p, backend):
    return F.mos_logsumexp(p.latent, p.weight, p.bias, backend=backend)


def assert_meets_criterion(
    ours: Tensor, unfused: Tensor, oracle: Tensor, factor: float, dtype: torch.dtype, what: str, slack: float = 0.0
) -> None:
    """Assert max error ≤ factor × the error of the unfused same-dtype computation + the dtype's floor + `slack`."""
    assert ours.shape == oracle.shape
    assert torch.equal(ours.isfinite(), oracle.isfinite()), f"{what}: not finite where the oracle is, or the reverse"
    finite = oracle.isfinite()
    if not finite.any():
        return
    error = (ours.double() - oracle)[finite].abs().max().item()
    allowed = factor * (unfused.double() - oracle)[finite].abs().max().item() + FLOOR[dtype] + slack
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def _computed(case: Problem, compute, dtype: torch.dtype, backend: str, requires_grad) -> tuple[Tensor, dict]:
    """The output, and the gradients for a fixed random gradient of the output."""
    p = case.to(dtype, requires_grad)
    output = compute(p, backend)
    if requires_grad:
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output.device)
        if output.dim() == 0:
            weights = torch.ones_like(weights)
        # outputs of −inf (masked classes) get no gradient
        torch.where(output.isfinite(), output * weights.to(output.dtype), 0).sum().backward()
    return output.detach(), p.gradients()


_KEPT: dict[tuple, tuple] = {}


def _expected(case: Problem, compute, dtype: torch.dtype, requires_grad) -> tuple[Tensor, dict, Tensor, dict]:
    """The unfused computation in `dtype` and the float64 oracle. The last ones are cached: all backends and workspaces
    of a test need the same, and computing it takes longer than their own results."""
    tensors = [getattr(case, name) for name in (*INPUTS, "target")]
    key = (compute, dtype, requires_grad, torch.backends.cuda.matmul.fp32_precision, *map(_digest, tensors))
    if key not in _KEPT:
        unfused = _computed(case, compute, dtype, "reference", requires_grad)
        oracle = _computed(case, compute, torch.float64, "reference", requires_grad)
        if case.weight.nbytes > 2**24:
            return *unfused, *oracle
        if len(_KEPT) == 64:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = *unfused, *oracle
    return _KEPT[key]


def _digest(tensor: Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    return tensor.device, tensor.shape, hashlib.sha1(tensor.contiguous().cpu().numpy().data).digest()


def check_forward_and_gradients(
    case: Problem,
    compute,
    dtype: torch.dtype,
    backend: str = "tiled",
    requires_grad=INPUTS,
    relative_slack: float = 0.0,
) -> None:
    """Check the output of `compute(problem, backend)` and all gradients for a fixed random gradient of it.

    `relative_slack` is added to the criterion, relative to the largest number of a result, and with it what float32's
    rounding of the logits makes of the largest term in the sums of gradients. It is for random problems, where the
    unfused error can be small by chance.
    """
    ours, our_grads = _computed(case, compute, dtype, backend, requires_grad)
    unfused, unfused_grads, oracle, oracle_grads = _expected(case, compute, dtype, requires_grad)

    logits = (case.latent.flatten(0, -2) @ case.weight.T).abs().max().item() if relative_slack else 0.0

    def slack(exact: Tensor, largest_term: float = 1.0) -> float:
        if not relative_slack or not exact.isfinite().any():
            return 0.0
        largest = exact[exact.isfinite()].abs().max().item()
        return relative_slack * largest + (32 + 4 * logits) * torch.finfo(torch.float32).eps * largest_term

    assert_meets_criterion(ours, unfused, oracle, 2, dtype, "forward", slack(oracle))
    assert our_grads.keys() == oracle_grads.keys()
    for name, gradient in our_grads.items():
        assert gradient.dtype == (dtype if name in INPUTS else None)
        assert_meets_criterion(
            gradient,
            unfused_grads[name],
            oracle_grads[name],
            3,
            dtype,
            f"gradient of {name}",
            slack(oracle_grads[name], case.weight.abs().max().item() if name == "latent" else 1.0),
        )
