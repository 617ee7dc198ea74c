"""The options of losses and the functions of given classes under torch.compile, torch.export, autocast and opcheck."""

import pytest
import torch
from backends import CPU, TRITON
from problem import EXACT, problem

import fused_mos
from fused_mos import functional as F
from fused_mos import ops

N, K, D, V = 5, 3, 4, 90


@pytest.fixture(params=["tiled", "reference", CPU, TRITON])
def backend(request):
    return request.param


class Everything(torch.nn.Module):
    """All functions with options as one number, in which each has its own weight."""

    def __init__(self, backend: str):
        super().__init__()
        self.head = fused_mos.MoS(6, V, K, D, backend=backend, softcap=3.0)
        self.external = fused_mos.MoS(6, V, K, D, backend=backend, n_external=1)
        self.linear = fused_mos.LinearCrossEntropyLoss(6, V, backend=backend, label_smoothing=0.1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        classes = torch.linspace(0, 1, V, dtype=x.dtype, device=x.device)
        tokens = torch.ones_like(x[:, 0])
        index = torch.stack([target, (target + 1) % V], -1)
        result = self.head(x, target, class_weight=classes, token_weight=tokens, z_loss=0.1).loss
        result = result + self.head(x, target, label_smoothing=0.1, reduction="none").loss.sum()
        output, lse = self.head(x, target, return_lse=True)
        result = result + output.loss + lse.sum()
        result = result + self.head(x, index, target_prob=torch.ones_like(index, dtype=x.dtype)).loss
        result = result + self.external(x, target, extra_log_prob=tokens[:, None].detach() - 2).loss
        result = result + self.head.log_prob_at(x, index, temperature=0.8).sum()
        result = result + self.head.log_prob_at(x, target, mixture_temperature=0.8).sum()
        score = self.head.score(x, target)
        return result + score.log_prob.sum() + score.entropy.sum() + self.linear(x, target)


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["compile", "export"])
def test_compiles_and_exports_with_any_number_of_tokens(backend, how):
    dtype, tolerance = EXACT.get(backend, (torch.float64, 1e-12))
    module = Everything(backend).to(dtype)
    if how == "compile":
        torch.compiler.reset()
        traced = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    else:
        n = torch.export.Dim("N", min=2)
        example = torch.randn(6, 6, dtype=dtype), torch.arange(6)
        traced = torch.export.export(module, example, dynamic_shapes=({0: n}, {0: n})).module()
    for n_tokens in (7, 40):
        x = torch.randn(n_tokens, 6, dtype=dtype, requires_grad=True)
        target = torch.randint(0, V, (n_tokens,))
        expected, found = module(x, target), traced(x, target)
        assert torch.allclose(found, expected, rtol=10 * tolerance, atol=10 * tolerance)
        (wanted,), (gradient,) = torch.autograd.grad(expected, x), torch.autograd.grad(found, x)
        assert torch.allclose(gradient, wanted, rtol=0, atol=100 * tolerance)


@pytest.mark.compiles
def test_restricted_samples_compile(backend):
    head = fused_mos.MoS(6, V, K, D, backend=backend)
    sample = torch.compile(lambda x: head.sample(x, top_k=5, top_p=0.9), fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 6)
    top = head.topk(x, 5).indices
    assert (top == sample(x)[:, None]).any(1).all()


@pytest.mark.compiles
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["tiled", TRITON, CPU])
def test_opcheck(backend, bias):
    dtype = EXACT[backend][0]
    case = problem(N, K, D, V, bias=bias).to(dtype)
    z, a, e, b = case.inputs()
    maximum, log_total, logit, s = (torch.randn(N, K, dtype=dtype) for _ in range(4))
    index, needs = torch.randint(0, V, (N, 4)), [True, True, True, bias]
    weights, classes, of_token = (torch.rand(shape, dtype=dtype) for shape in ((3, N), (V,), (N,)))
    experts = (z, e, b, index, backend, 3.0, 0.8)
    of_sum = ("classes", classes, 1.0)
    loss = (z, a, e, b, case.target, -100, 0.0)
    checks = {
        ops.nll: (*loss, backend, 3.0, True),
        ops.nll_with_gradients: (*loss, False, needs, backend, 3.0, True, weights),
        ops.expert_log_prob: experts,
        ops.likelihood_and_sum: (
            z,
            a,
            e,
            b,
            case.target.clamp(0),
            *of_sum,
            backend,
            3.0,
        ),  # NaN of one that is no class
    }
    for op, arguments in checks.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    z, a, e = z.detach(), a.detach(), e.detach()
    b = None if b is None else b.detach()
    of_experts = torch.randn(N, K, 4, dtype=dtype), torch.randn(N, K, dtype=dtype)
    known = (case.target, maximum, log_total, logit)
    not_differentiable = {
        ops.nll_backward: (of_token, z, a, e, b, *known, -100, 0.0, needs, backend, 3.0, s),
        ops.expert_log_prob_backward: (
            *of_experts,
            z,
            e,
            b,
            index,
            maximum,
            log_total,
            torch.randn(N, K, 4, dtype=dtype),
            [True, True, bias],
            backend,
            3.0,
        ),
        ops.mixture_sum: (z, a.log_softmax(-1), e, b, maximum, log_total, *of_sum, backend, 3.0),
        ops.mixture_sum_backward: (of_token, of_token, s, z, a, e, b, *known, s, of_token, *of_sum, needs, backend),
    }
    for op, arguments in not_differentiable.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_gradcheck():
    module = Everything("tiled").double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, 7, -100, 7])
    assert torch.autograd.gradcheck(lambda x: module(x, torch.where(target < 0, 0, target)), (x,))
    case = problem(N, K, D, V).to(torch.float64)
    index = torch.tensor([[1, 1, 4], [0, -100, 2], [5, 6, 7], [-100, -100, -100], [9, 8, 9]])
    assert torch.autograd.gradcheck(
        lambda z, a, e, b: F.mos_log_prob_at(z, a, e, index, b, softcap=2.0, mixture_temperature=0.7), case.inputs()
    )


def test_under_autocast(backend):
    """Products in the autocast dtype, results in float32."""
    head = fused_mos.MoS(6, V, K, D, backend=backend, softcap=3.0)
    x, target = torch.randn(9, 6), torch.randint(0, V, (9,))
    exact = head(x, target, label_smoothing=0.1, z_loss=0.1).loss, head.log_prob_at(x, target), *head.score(x, target)
    with torch.autocast(x.device.type, torch.bfloat16):
        cast = (
            head(x, target, label_smoothing=0.1, z_loss=0.1).loss,
            head.log_prob_at(x, target),
            *head.score(x, target),
        )
    for a, b in zip(exact[:-1], cast[:-1]):
        assert b.dtype == torch.float32 and torch.allclose(a, b, rtol=0, atol=0.05) and not torch.equal(a, b)
