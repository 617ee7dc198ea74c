"""linear_cross_entropy and LinearCrossEntropyLoss: torch's cross-entropy of a linear layer, and torch's names."""

import inspect
import itertools

import pytest
import torch
from backends import CPU, TRITON
from problem import EXACT
from torch.nn import functional as TF

import fused_mos
from fused_mos import functional as F

TORCH_HAS_IT = hasattr(TF, "linear_cross_entropy")  # since 2.13


@pytest.fixture(params=["tiled", "reference", CPU, TRITON])
def backend(request):
    return request.param


def operands(dtype, leading=(4, 5), d=9, v=70):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        numbers = torch.randn(shape, generator=generator, device="cpu")
        return numbers.to(torch.get_default_device(), dtype).requires_grad_()

    target = torch.randint(0, v, leading, generator=generator, device="cpu").to(torch.get_default_device())
    if target.numel() > 2:
        target.view(-1)[1] = -100
    return draw(*leading, d), draw(v, d), draw(v), target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(), (7,), (4, 5), (2, 3, 2), (0,)], ids=str)
def test_is_cross_entropy_of_a_linear_layer(leading, reduction, backend):
    dtype, tolerance = EXACT.get(backend, (torch.float64, 1e-12))
    x, weight, bias, target = operands(dtype, leading)
    class_weight = torch.rand(70).to(dtype)
    for with_bias, weighted, smoothing in itertools.product((True, False), (True, False), (0.0, 0.1)):
        b, w = bias if with_bias else None, class_weight if weighted else None
        logits = TF.linear(x, weight, b).reshape(-1, 70)
        expected = TF.cross_entropy(logits, target.reshape(-1), w, reduction=reduction, label_smoothing=smoothing)
        loss = F.linear_cross_entropy(
            x, weight, target, linear_bias=b, weight=w, reduction=reduction, label_smoothing=smoothing, backend=backend
        )
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert torch.allclose(loss, expected.view_as(loss), rtol=0, atol=20 * tolerance, equal_nan=True)
        if target.numel() == 0:
            continue
        inputs = [t for t in (x, weight, b) if t is not None]
        gradients = (torch.autograd.grad(result.sum(), inputs) for result in (loss, expected))
        for ours, wanted in zip(*gradients):
            assert torch.allclose(ours, wanted, rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_give_float32(dtype, backend):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the native kernels have no float16")
    x, weight, bias, target = operands(dtype)
    loss, lse = F.linear_cross_entropy(x, weight, target, linear_bias=bias, return_lse=True, backend=backend)
    exact = TF.linear(x.double(), weight.double(), bias.double())
    assert loss.dtype == lse.dtype == torch.float32 and lse.shape == target.shape
    assert torch.allclose(lse.double(), exact.logsumexp(-1), rtol=0, atol=0.05)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == dtype


def test_softcap_and_z_loss(backend):
    dtype, tolerance = EXACT.get(backend, (torch.float64, 1e-12))
    x, weight, bias, target = operands(dtype)
    loss = F.linear_cross_entropy(x, weight, target, linear_bias=bias, softcap=2.0, z_loss=0.1, backend=backend)
    logits = 2 * torch.tanh(TF.linear(x, weight, bias) / 2)
    valid = target != -100
    expected = TF.cross_entropy(logits[valid], target[valid]) + 0.1 * (logits[valid].logsumexp(-1) ** 2).mean()
    assert torch.allclose(loss, expected, rtol=0, atol=tolerance)


@pytest.mark.skipif(not TORCH_HAS_IT, reason="this torch has no linear_cross_entropy")
def test_the_signatures_are_torch_s():
    """With keywords behind them."""
    for ours, its in (
        (F.linear_cross_entropy, TF.linear_cross_entropy),
        (fused_mos.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss),
    ):
        mine, theirs = (inspect.signature(f).parameters for f in (ours, its))
        for name, parameter in theirs.items():
            if name == "out_features":  # of K-dimensional losses, which are not offered
                continue
            assert mine[name].default == parameter.default and mine[name].kind == parameter.kind, name
        assert list(mine)[:3] == list(theirs)[:3] or ours is fused_mos.LinearCrossEntropyLoss


@pytest.mark.skipif(not TORCH_HAS_IT, reason="this torch has no linear_cross_entropy")
def test_probabilities_are_torch_s_own():
    x, weight, bias, _ = operands(torch.float32)
    probability = torch.rand(4, 5, 70).softmax(-1)
    ours = F.linear_cross_entropy(x.view(-1, 9), weight, probability.view(-1, 70), linear_bias=bias)
    its = TF.linear_cross_entropy(x.view(-1, 9), weight, probability.view(-1, 70), linear_bias=bias)
    assert torch.equal(ours, its)
    for option in ({"softcap": 2.0}, {"backend": "tiled"}, {"return_lse": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            F.linear_cross_entropy(x, weight, probability, **option)


@pytest.mark.parametrize("bias", [False, True])
def test_the_module(bias):
    module = fused_mos.LinearCrossEntropyLoss(9, 70, bias=bias, weight=torch.rand(70), label_smoothing=0.1)
    x, _, _, target = operands(torch.float32)
    x = x.detach()
    logits = module.linear(x)
    expected = TF.cross_entropy(logits.view(-1, 70), target.view(-1), module.weight, label_smoothing=0.1)
    assert torch.allclose(module(x, target), expected, rtol=0, atol=1e-6)
    module(x, target).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    if TORCH_HAS_IT:
        its = torch.nn.LinearCrossEntropyLoss(9, 70, bias=bias, weight=torch.rand(70), label_smoothing=0.1)
        module.load_state_dict(its.state_dict())
        assert torch.allclose(module(x, target), its(x.view(-1, 9), target.view(-1)), rtol=0, atol=1e-6)
    assert "label_smoothing=0.1" in repr(module)
    for wrong in ({"weight": torch.rand(3)}, {"label_smoothing": 3.0}, {"softcap": -1.0}, {"reduction": "max"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fused_mos.LinearCrossEntropyLoss(9, 70, **wrong)


def test_bad_input_is_named():
    x, weight, bias, target = operands(torch.float32)
    for arguments, name in (
        ({"target": target[:3]}, "target"),
        ({"target": target.int()}, "target"),
        ({"target": target.clone().fill_(70)}, "target"),
        ({"linear_weight": weight[:, :8]}, "^linear_weight.*input"),
        ({"linear_bias": bias[:5]}, "^linear_bias"),
        ({"weight": torch.ones(5)}, "^weight"),
        ({"input": torch.full_like(x, torch.nan)}, "^input"),
        ({"reduction": "max"}, "reduction"),
        ({"softcap": -1.0}, "softcap"),
        ({"input": 3.0}, "input"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=name):
            F.linear_cross_entropy(**{"input": x, "linear_weight": weight, "target": target.clamp(0, 69)} | arguments)
