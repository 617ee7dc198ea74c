"""A training step of the head never makes the host wait for a GPU, as a CUDA graph asks for.

The bodies of the ops run on fake CUDA tensors, which need no device, and every operation that torch dispatches is
looked at. Kernels of the Triton backend are noted instead of launched. Where torch's CPU wheel has no CUDA tensors, the
meta device stands for them: `make test` runs these tests, too.
"""

import contextlib
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_mos import MoS, _backends, ops
from fused_mos._backends.triton_kernels import configurations

DEVICE = "cuda" if torch.version.cuda else "meta"
BACKENDS = [
    "tiled",
    pytest.param("triton", marks=pytest.mark.skipif(bool(_backends.why_absent("triton")), reason="there is no triton")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"one block": (20, 3, 16, 50), "several blocks": (840, 15, 280, 10_000)}


class Audit(TorchDispatchMode):
    """Notes the operations whose result the host reads, or gives the shape of, and copies between host and device."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.n_operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.n_operations += 1
        if self._is_read(function, args):
            self.waits.append(f"{function} is read by the host")
        devices = {leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            devices.add(kwargs["device"].type)
        if len(devices) > 1:
            self.waits.append(f"{function} copies between host and device")
        if function is torch.ops.aten.addmm.dtype_out:  # torch 2.11 has no decomposition of it for fake tensors
            return kwargs["out"]
        return function(*args, **kwargs)

    @staticmethod
    def _is_read(function, args) -> bool:
        if function is torch.ops.aten.index.Tensor:  # whose shape depends on the values of a mask alone
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def without_memory() -> contextlib.AbstractContextManager:
    return FakeTensorMode() if DEVICE == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def noted_launches():
    """Notes what the Triton backend would launch."""
    from fused_mos._backends.triton_kernels import launch

    with launch.overridden(configurations.ARCHITECTURES["sm_90"], record=True) as calls:
        yield
    assert calls


def audited(backend: str, step) -> list[str]:
    """What `step` makes the host wait for."""
    with without_memory(), torch.no_grad(), Audit() as audit:
        with noted_launches() if backend == "triton" else contextlib.nullcontext():
            step()
    assert audit.n_operations > 5
    return audit.waits


def inputs_of(shape: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    n, k, d, v = SHAPES[shape]
    with torch.device(DEVICE):
        return (
            *(torch.empty(size, dtype=dtype) for size in ((n, k, d), (n, k), (v, d), (v,))),
            torch.empty(n, dtype=torch.int64),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [True, False])
def test_gradients_in_the_forward_pass(mean, backend, shape, dtype):
    """The loss with its gradients, and the backward pass, which scales them."""

    def step():
        inputs, needs = inputs_of(shape, dtype), [True] * 4
        options = (-100, 0.0, mean, needs, backend)
        outputs = ops.nll_with_gradients._init_fn(*inputs, *options)
        context = SimpleNamespace(
            options=(-100, 0.0, backend, 0.0),
            needs_input_grad=needs,
            saved_tensors=(*inputs, *outputs[3:6], outputs[1], *outputs[6:10]),
        )
        ops.losses._nll_with_gradients_backward(context, torch.ones_like(outputs[0]), *[None] * 10)

    assert audited(backend, step) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_recomputed(backend, shape, dtype):
    def step():
        inputs = inputs_of(shape, dtype)
        losses, *statistics, _ = ops.nll._init_fn(*inputs, -100, 0.0, backend)
        ops.nll_backward._init_fn(losses, *inputs, *statistics, -100, 0.0, [True] * 4, backend)

    assert audited(backend, step) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples(backend, shape, dtype):
    def step():
        *operands, _ = inputs_of(shape, dtype)
        ops.sample._init_fn(*operands, 0.8, torch.empty(1, dtype=torch.int64, device=DEVICE), backend)

    assert audited(backend, step) == []


@fake_cuda.only_without_a_device
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_a_head(backend, reduction):
    """What is around the ops: the projections, checks, autograd."""
    with FakeTensorMode(), torch.device("cuda"), Audit() as audit:
        head = MoS(12, 50, 3, 16, latent_dropout=0.2, backend=backend)
        x, target = torch.empty(4, 5, 12), torch.empty(4, 5, dtype=torch.int64)
        audit.waits.clear()  # of the head's initialisation, which is no part of a step
        fake_cuda.grad(head(x, target, reduction=reduction).loss.mean(), list(head.parameters()))
    assert audit.waits == []


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to a GPU": lambda x: torch.ones(3, device="cpu").to(DEVICE),
    "from a GPU": lambda x: x.to("cpu"),
}
if DEVICE == "cuda":
    WAITS["tensor"] = lambda x: torch.tensor([1.0, 2.0, 3.0], device=DEVICE)


@pytest.mark.parametrize("wait", WAITS)
def test_what_makes_the_host_wait_is_noted(wait):
    with without_memory(), Audit() as audit:
        # what fake tensors and the meta device cannot answer is noted before they refuse it
        with contextlib.suppress(RuntimeError, NotImplementedError):
            WAITS[wait](torch.empty(3, device=DEVICE))
    assert len(audit.waits) == 1
