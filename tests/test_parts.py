"""float32 gradients from products of bfloat16 parts, as some GPUs use for large matrices; here also for small ones."""

import pytest
import torch
from backends import ON_GPU, triton
from problem import check_forward_and_gradients, problem

from fused_mos import functional as F

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted if triton.INTERPRETED else ()

from fused_mos._backends.triton_kernels import parts


@pytest.fixture(autouse=True)
def small_matrices_in_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(parts, "LONGEST_SUM", 32)
    torch.set_default_device("cuda" if ON_GPU else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def products(monkeypatch):
    """Dimensions of the operands of each product with dl."""
    dimensions = []
    for module in (triton, parts.__name__.replace("parts", "operands"), parts.__name__.replace("parts", "backward")):
        name = f"{getattr(module, '__name__', module)}.product_of"
        monkeypatch.setattr(
            name, lambda a, *rest, **options: dimensions.append(a.dim()) or parts.product_of(a, *rest, **options)
        )
    return dimensions


def test_parts_have_all_bits():
    matrix = torch.randn(21, 13, dtype=torch.float64).float() * torch.logspace(-25, 30, 13)
    split = parts.in_parts(matrix, 16, 32)
    assert split.shape == (3, 32, 16) and split.dtype == torch.bfloat16
    assert torch.equal(split.double().sum(0)[:21, :13].float(), matrix)
    assert (split[:, 21:] == 0).all() and (split[..., 13:] == 0).all()


COMPUTATIONS = {
    "mean": lambda p, backend: p.nll(backend=backend),
    "none": lambda p, backend: p.nll(reduction="none", backend=backend),
    "filtered": lambda p, backend: p.nll(grad_filter_eps=1e-9, backend=backend),
    "log_prob": lambda p, backend: F.mos_log_prob(*p.inputs(), backend=backend),
    "capped": lambda p, backend: p.nll(softcap=3.0, backend=backend),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("shape", [(23, 3, 33, 131), (12, 1, 40, 256), (7, 2, 13, 66)], ids=str)
def test_gradients_have_the_accuracy_of_float32(shape, computation, workspace, products):
    check_forward_and_gradients(problem(*shape), COMPUTATIONS[computation], torch.float32, "triton")
    assert set(products) == {3}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_is_infinite_in_an_ignored_token_stays_there(in_parts, softcap, monkeypatch):
    """Also where no row is dropped, as on a GPU."""
    monkeypatch.setattr(parts, "LEAST_PRODUCTS", 1 if in_parts else 2**62)
    monkeypatch.setattr(triton, "kept_rows", lambda *_: None)
    case = problem(9, 3, 8, 40).to(torch.float32)
    case.latent.data[4] = torch.inf  # the ignored token
    case.nll(softcap=softcap, backend="triton").backward()
    assert all(gradient.isfinite().all() for gradient in case.gradients().values())
