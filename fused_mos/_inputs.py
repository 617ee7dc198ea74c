"""Everything that happens to a function's arguments before it computes: checks, autocast and the choice of backend.

`prepared` handles the operands that all functions share. The other checks are for arguments that only some functions
have. Values are checked only on CPU tensors and never while a graph is traced; reading them elsewhere would stall the
device.
"""

import contextlib
import sys
from collections.abc import Iterator
from numbers import Integral, Real
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from . import _backends
from ._backends.tracing import has_memory

REDUCTIONS = ("mean", "sum", "none")

T = TypeVar("T", Tensor, Tensor | None)


class Operands(NamedTuple):
    """Checked inputs, cast to the dtype to compute in, and the resolved backend (never "auto")."""

    latent: Tensor  # (N, K, D)
    prior_logits: Tensor  # (N, K), or (N, K + K′) with external components
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    backend: str
    softcap: float = 0.0  # 0 for none

    def of_tokens(self, tokens: slice) -> "Operands":
        return self._replace(latent=self.latent[tokens], prior_logits=self.prior_logits[tokens])

    def without_ignored(self, counts: Tensor) -> "Operands":  # (N,) bool
        """The operands with zeros for tokens that do not count: infinite values there, times a weight of 0, are NaN."""
        if values_can_be_read(counts) and counts.all():
            return self
        latent, prior_logits = torch.where(counts[:, None, None], self.latent, 0), self.prior_logits
        if prior_logits is not None:
            prior_logits = torch.where(counts[:, None], prior_logits, 0)
        return self._replace(latent=latent, prior_logits=prior_logits)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self[:4]

    def contiguous(self) -> "Operands":
        """The operands laid out for the fused backends (see `contiguous`); unchanged for "reference"."""
        if self.backend == "reference":
            return self
        return self._replace(
            latent=contiguous(self.latent),
            prior_logits=contiguous(self.prior_logits),
            weight=contiguous(self.weight),
            bias=contiguous(self.bias),
        )


@contextlib.contextmanager
def prepared(
    latent: Tensor,
    prior_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    softcap: float | None = None,
    n_external: int = 0,
    weight_later: bool = False,
) -> Iterator[Operands]:
    """Check and cast the inputs, resolve `backend`, and disable autocast inside the `with` block.

    A function without a prior passes None for `prior_logits` and gets None back in the operands. With external
    components, `prior_logits` also has a column for each of them. With `weight_later`, the caller looks for NaN in the
    weight if its result has any: of a few tokens, reading the weight for that alone is a third of a step.

    Raises TypeError or ValueError for bad input, and whatever `_backends.resolve` raises.
    """
    check_inputs(latent, prior_logits, weight, bias, n_external, weight_later)
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        yield Operands(latent, prior_logits, weight, bias, backend, check_softcap(softcap))  # type: ignore[arg-type]


def contiguous(tensor: T) -> T:
    """The tensor as the fused backends expect it (see `_backends.Kernels`).

    Raises RuntimeError if it carries a forward-mode tangent, which they would ignore, or is wrapped by a torch.func
    transform.
    """
    if tensor is None:
        return None
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError("the fused MoS ops have no forward-mode derivative; use backend='reference' for that")
    if not torch.compiler.is_compiling() and _is_transformed(tensor):
        raise RuntimeError(
            "the fused MoS ops do not support the transforms of torch.func (grad, vmap, …); use backend='reference' "
            "for that"
        )
    return tensor.contiguous()


def _is_transformed(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_gradtrackingtensor(tensor) or functorch.is_batchedtensor(tensor)


# ------------------------------------------------------------------------------------------------------------- autocast


def is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context that disables autocast; it does nothing on the meta device, which has no autocast."""
    return torch.autocast(device_type, enabled=False) if device_type != "meta" else contextlib.nullcontext()


def _autocast(
    latent: Tensor, prior_logits: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Cast as torch.autocast would, but keep the prior in float32, since its product is small."""
    device = latent.device.type
    if not is_autocast(device) or latent.dtype == torch.float64:
        return latent, prior_logits, weight, bias
    dtype = torch.get_autocast_dtype(device)
    prior_logits = prior_logits if prior_logits is None else prior_logits.float()
    return latent.to(dtype), prior_logits, weight.to(dtype), bias if bias is None else bias.to(dtype)


# --------------------------------------------------------------------------------------------------------------- checks


def check_inputs(
    latent: Tensor,
    prior_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    n_external: int = 0,
    weight_later: bool = False,
) -> None:
    """Check shapes, dtypes and devices, and look for NaN where values can be read, but not in a weight that is read
    later.

    Raises TypeError or ValueError.
    """
    named = check_shapes(
        latent, prior_logits, weight, bias, isinstance(latent, Tensor) and is_autocast(latent.device.type), n_external
    )
    for name, tensor in named.items():
        if not (weight_later and name == "weight"):
            refuse_nan(name, tensor)


def refuse_nan(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the tensor contains NaN, where values can be read."""
    if values_can_be_read(tensor) and _has_nan(tensor):
        raise ValueError(f"{name} contains NaN ({int(tensor.isnan().sum())} of {tensor.numel()} values)")


def explain_nan(result: Tensor, weight: Tensor) -> None:
    """Raise ValueError if the result contains NaN and so does the weight, where values can be read."""
    if values_can_be_read(result) and result.numel() and result.detach().max().isnan():
        refuse_nan("weight", weight)


_WITHOUT_NAN = WeakIdKeyDictionary()  # Parameter -> its `_state` when it was last found free of NaN


def _state(tensor: Tensor) -> tuple | None:
    """A cheap fingerprint that changes when a Parameter is written to, or None for other tensors and during training.

    The version counter alone is not enough: fused optimizers do not raise it. So a sum of about 64 values joins it.
    """
    if type(tensor) is not Parameter or torch.is_grad_enabled() or tensor.is_inference() or not tensor.is_contiguous():
        return None
    sample = tensor.detach().view(-1)[:: max(tensor.numel() // 64, 1)]
    return tensor._version, tensor.data_ptr(), float(sample.sum())


def _has_nan(tensor: Tensor) -> bool:
    """True if the tensor contains NaN.

    Outside training a Parameter is read once and then again only after a write: for a single token, reading the weight
    costs as much as multiplying by it. A write of a few values through .data or NumPy goes unnoticed.
    """
    if tensor.numel() == 0:
        return False
    state = _state(tensor)
    if state is not None and _WITHOUT_NAN.get(tensor) == state:
        return False
    # max propagates NaN and, unlike isnan().any(), allocates nothing; amax takes twice as long in bfloat16
    if tensor.detach().max().isnan():
        return True
    if state is not None:
        _WITHOUT_NAN[tensor] = state
    return False


def check_shapes(
    latent: Tensor,
    prior_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    autocast: bool = False,
    n_external: int = 0,
) -> dict[str, Tensor]:
    """Return the tensors that are not None, by name. Under autocast their floating dtypes may differ.

    Raises TypeError or ValueError for a wrong type, dtype, device or shape.
    """
    arguments = {"latent": latent, "prior_logits": prior_logits, "weight": weight, "bias": bias}
    named = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if _is_dtensor(tensor):
            raise TypeError(
                f"{name} is a DTensor, as fully_shard makes them, but the head reads it without calling the module "
                "that holds it; shard the head as a whole and register its methods with "
                "torch.distributed.fsdp.register_fsdp_forward_method (or use fused_mos.vocab_parallel)"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != latent.device:
            raise ValueError(f"{name} is on {tensor.device} but latent is on {latent.device}")
        allowed = (latent.dtype, torch.float32) if name == "prior_logits" else (latent.dtype,)
        if tensor.dtype not in allowed and not autocast:
            raise TypeError(
                f"{name} must have latent's dtype {latent.dtype}, got {tensor.dtype}; convert one of them, or use "
                "torch.autocast"
            )
    if latent.dim() != 3:
        raise ValueError(f"latent must be (N, K, D), got shape {tuple(latent.shape)}")
    n, k, d = latent.shape
    if k == 0:
        raise ValueError(f"latent must have at least one expert, got K = 0 in shape {tuple(latent.shape)}")
    if prior_logits is not None and prior_logits.shape != (n, k + n_external):
        of = f"(N, K + K′), K′ of extra_log_prob, = {(n, k + n_external)}" if n_external else f"(N, K) = {(n, k)}"
        raise ValueError(f"prior_logits must be {of} to match latent, got {tuple(prior_logits.shape)}")
    if weight.dim() != 2 or weight.shape[1] != d:
        raise ValueError(f"weight must be (V, D) with latent's D = {d}, got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class, got V = 0 in shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be (V,) = {(weight.shape[0],)} to match weight, got {tuple(bias.shape)}")
    return named


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes half as long as torch
    return module is not None and isinstance(tensor, module.DTensor)


def check_softcap(softcap: float | None) -> float:
    """Return the soft cap as the ops take it, 0.0 for None."""
    if softcap is None:
        return 0.0
    check_number("softcap", softcap)
    if not 1e-6 <= softcap <= 1e6:  # what is computed from it must fit float32
        raise ValueError(f"softcap must be between 1e-6 and 1e6, or None, got {softcap}")
    return float(softcap)


def check_number(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_target(target: Tensor, latent: Tensor, n_classes: int, ignore_index: int) -> int:
    """Check target (N,) and return `ignore_index` as a Python int, which the ops need even if NumPy's was given."""
    ignore_index = _check_kinds("target", target, ignore_index)
    check_target_shape(target, latent)
    _check_classes("target", target, n_classes, ignore_index)
    return ignore_index


def check_index(index: Tensor, latent: Tensor, n_classes: int, ignore_index: int, name: str = "index") -> int:
    """`check_target` for classes (N, M)."""
    ignore_index = _check_kinds(name, index, ignore_index)
    _check_int64(name, index, latent)
    if index.dim() != 2 or index.shape[0] != latent.shape[0]:
        raise ValueError(f"{name} must be (N, M) with latent's N = {latent.shape[0]}, got {tuple(index.shape)}")
    _check_classes(name, index, n_classes, ignore_index)
    return ignore_index


def _check_kinds(name: str, index: Tensor, ignore_index: int) -> int:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(index).__name__}")
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    return int(ignore_index)


def check_target_shape(target: Tensor, latent: Tensor) -> None:
    _check_int64("target", target, latent)
    if target.shape != latent.shape[:1]:
        raise ValueError(f"target must be (N,) = {(latent.shape[0],)} to match latent, got {tuple(target.shape)}")


def _check_int64(name: str, index: Tensor, latent: Tensor) -> None:
    if index.dtype != torch.int64:
        is_number = index.is_floating_point() or index.is_complex()
        remedy = f"{name} holds class indices" if is_number else f"convert it by {name}.long()"
        raise TypeError(f"{name} must have dtype torch.int64, got {index.dtype}; {remedy}")
    if index.device != latent.device:
        raise ValueError(f"{name} is on {index.device} but latent is on {latent.device}")


def _check_classes(name: str, index: Tensor, n_classes: int, ignore_index: int) -> None:
    if values_can_be_read(index):
        wrong = index[(index != ignore_index) & ((index < 0) | (index >= n_classes))]
        if wrong.numel():
            raise IndexError(
                f"{name} must be in [0, V = {n_classes}) or ignore_index = {ignore_index}, got {int(wrong[0])}"
            )


def check_numbers(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str, latent: Tensor) -> None:
    """Check for a floating tensor of `shape` on latent's device, without NaN where values can be read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != latent.device:
        raise ValueError(f"{name} is on {tensor.device} but latent is on {latent.device}")
    if values_can_be_read(tensor) and tensor.isnan().any():
        raise ValueError(f"{name} contains NaN ({int(tensor.isnan().sum())} of {tensor.numel()} values)")


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a weight requires a gradient."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} gets no gradient and must not require one; detach it, or weight the losses yourself")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_filter_eps(grad_filter_eps: float) -> None:
    if not 0 <= grad_filter_eps < 1:
        raise ValueError(f"grad_filter_eps must be in [0, 1), got {grad_filter_eps}")


def check_k(name: str, k: int, n_classes: int) -> None:
    if not isinstance(k, Integral):
        raise TypeError(f"{name} must be an int, got {type(k).__name__}")
    if not 1 <= k <= n_classes:
        raise ValueError(f"{name} must be in [1, V = {n_classes}], got {k}")


COLDEST = 1e-30
"""The lowest temperature: its inverse times a logit of 10⁸ still fits float32. Colder ones draw the same best class."""


def check_temperature(temperature: float, name: str = "temperature") -> float:
    """Return the temperature to compute with, at least COLDEST."""
    check_number(name, temperature)
    if not temperature > 0:
        raise ValueError(f"{name} must be positive, got {temperature} (predict, or topk with k = 1, is greedy)")
    return max(temperature, COLDEST)


def check_drawn(drawn: Tensor) -> None:
    """Raise ValueError if a token has no class to draw (−1), where values can be read."""
    if values_can_be_read(drawn) and drawn.numel() and drawn.amin() < 0:
        token = int((drawn < 0).nonzero()[0])
        raise ValueError(f"token {token} has no class to draw: its prior or all of its logits are −inf or NaN")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name, whether or not it is available here."""
    if backend not in _backends.NAMES:
        raise ValueError(f"backend must be one of {', '.join(_backends.NAMES)}, got {backend!r}")


def values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and has_memory(tensor)
