"""Bad input gets an error that names the argument and both values, before anything is computed (but for NaN in a loss's
weight)."""

import math
from functools import partial

import numpy
import pytest
import torch
from backends import CPU, TRITON

import fused_mos
from fused_mos import functional as F

N, K, D, V = 4, 3, 5, 11


def _inputs():
    return {
        "latent": torch.randn(N, K, D),
        "prior_logits": torch.randn(N, K),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(0, V, (N,)),
    }


def _nan(*shape):
    return torch.full(shape, math.nan)


CASES = [
    ("latent", torch.randn(N, D), ValueError, r"latent must be \(N, K, D\), got shape \(4, 5\)"),
    ("latent", torch.randn(N, 0, D), ValueError, r"K = 0"),
    ("latent", [[1.0]], TypeError, r"latent must be a Tensor, got list"),
    (
        "latent",
        torch.ones(N, K, D, dtype=torch.int64),
        TypeError,
        r"latent must have a floating dtype, got torch.int64",
    ),
    ("latent", _nan(N, K, D), ValueError, r"latent contains NaN \(60 of 60"),
    (
        "prior_logits",
        torch.randn(N, K + 1),
        ValueError,
        r"prior_logits must be .* \(4, 3\) to match latent, got \(4, 4\)",
    ),
    (
        "prior_logits",
        torch.randn(N, K).half(),
        TypeError,
        r"prior_logits must have latent's dtype torch.float32, got torch.float16",
    ),
    ("prior_logits", _nan(N, K), ValueError, r"prior_logits contains NaN"),
    ("weight", torch.randn(V, D + 1), ValueError, r"weight must be \(V, D\) with latent's D = 5, got \(11, 6\)"),
    ("weight", torch.randn(0, D), ValueError, r"V = 0"),
    (
        "weight",
        torch.randn(V, D).double(),
        TypeError,
        r"weight must have latent's dtype torch.float32, got torch.float64; convert one of them, or use torch.autocast",
    ),
    ("weight", torch.randn(V, D, device="meta"), ValueError, r"weight is on meta but latent is on cpu"),
    ("weight", _nan(V, D), ValueError, r"weight contains NaN"),
    ("bias", torch.randn(V + 1), ValueError, r"bias must be \(V,\) = \(11,\) to match weight, got \(12,\)"),
    ("bias", _nan(V), ValueError, r"bias contains NaN"),
    (
        "target",
        torch.randint(0, V, (N + 1,)),
        ValueError,
        r"target must be \(N,\) = \(4,\) to match latent, got \(5,\)",
    ),
    (
        "target",
        torch.zeros(N),
        TypeError,
        r"target must have dtype torch.int64, got torch.float32; target holds class indices$",
    ),
    (
        "target",
        torch.zeros(N, dtype=torch.int32),
        TypeError,
        r"target must have dtype torch.int64, got torch.int32; convert it by target.long\(\)",
    ),
    (
        "target",
        torch.tensor([0, V, 1, 2]),
        IndexError,
        r"target must be in \[0, V = 11\) or ignore_index = -100, got 11",
    ),
    ("target", torch.tensor([0, 1, -1, 2]), IndexError, r"got -1"),
]


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(("name", "value", "error", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_tensors(name, value, error, message, backend):
    with pytest.raises(error, match=message):
        F.mos_nll_loss(**{**_inputs(), name: value}, backend=backend)
    inputs = {**_inputs(), name: value}
    target, prior_logits = inputs.pop("target"), inputs["prior_logits"]
    if name != "target":
        for function in (F.mos_log_prob, F.mos_predict, F.mos_sample, partial(F.mos_topk, k=1)):
            with pytest.raises(error, match=message):
                function(**inputs, backend=backend)
        if name != "prior_logits":
            del inputs["prior_logits"]
            with pytest.raises(error, match=message):
                F.mos_logsumexp(**inputs, backend=backend)
    assert prior_logits is not None and target is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "average"}, ValueError, "reduction must be one of mean, sum, none, got 'average'"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .*, got 'cudnn'"),
        ({"grad_filter_eps": 1.0}, ValueError, r"grad_filter_eps must be in \[0, 1\), got 1.0"),
        ({"grad_filter_eps": -0.1}, ValueError, "got -0.1"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        F.mos_nll_loss(**_inputs(), **options)


@pytest.mark.parametrize("integer", [numpy.int64, numpy.int8, numpy.uint16])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_numpy_integers_are_integers(integer, backend):
    inputs = _inputs()
    for reduction in F.REDUCTIONS:
        expected = F.mos_nll_loss(**inputs, ignore_index=3, reduction=reduction, backend=backend)
        loss = F.mos_nll_loss(**inputs, ignore_index=integer(3), reduction=reduction, backend=backend)
        assert torch.equal(loss, expected)
    target = inputs.pop("target")
    assert F.mos_topk(**inputs, k=integer(2), backend=backend).indices.shape == (N, 2)
    for head in (
        fused_mos.MoS(integer(D), integer(V), integer(K), integer(6), backend=backend),
        fused_mos.Softmax(integer(D), integer(V), backend=backend),
    ):
        assert all(type(value) is int for value in (head.in_features, head.n_classes, head.decoder.in_features))
        head(torch.randn(N, D), target, ignore_index=integer(3)).loss.backward()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature(temperature):
    inputs = _inputs()
    del inputs["target"]
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        F.mos_sample(**inputs, temperature=temperature)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, r"k must be in \[1, V = 11\], got 0"),
        (12, ValueError, "got 12"),
        (2.0, TypeError, "k must be an int, got float"),
    ],
)
def test_topk(k, error, message):
    inputs = _inputs()
    del inputs["target"]
    with pytest.raises(error, match=message):
        F.mos_topk(**inputs, k=k)


@pytest.mark.parametrize("head", [fused_mos.MoS, fused_mos.MoC, fused_mos.Softmax])
def test_module(head):
    module = head(D, V)
    target = torch.zeros(N, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input must be \(…, in_features = 5\), got \(4, 6\)"):
        module(torch.randn(N, D + 1), target)
    with pytest.raises(TypeError, match="input must be a Tensor, got list"):
        module([1.0], target)
    with pytest.raises(TypeError, match="target must be a Tensor, got list"):
        module(torch.randn(N, D), [1])
    remedy = "convert one of them, or use torch.autocast"
    with pytest.raises(TypeError, match=f"parameters' dtype torch.float32, got torch.float64; {remedy}$"):
        module(torch.randn(N, D).double(), target)
    with pytest.raises(ValueError, match="input is on meta but the parameters are on cpu"):
        module(torch.randn(N, D, device="meta"), target)
    with pytest.raises(ValueError, match=r"target must have input's leading shape \(4,\), got \(3,\)"):
        module(torch.randn(N, D), target[:3])
    with pytest.raises(ValueError, match="reduction"):
        module(torch.randn(N, D), target, reduction="average")
    with pytest.raises(ValueError, match="contains NaN"):
        module(_nan(N, D), target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "n_experts must be at least 1, got 0"),
        ({"in_features": 0}, "must be at least 1, got 0"),
        ({"n_classes": -2}, "n_classes must be at least 1, got -2"),
        ({"latent_features": 0}, "latent_features must be at least 1, got 0"),
        ({"latent_dropout": 1.0}, r"latent_dropout must be in \[0, 1\), got 1.0"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
        ({"weight": torch.nn.Parameter(torch.zeros(V + 1, D))}, r"weight must be .* = \(11, 5\), got \(12, 5\)"),
    ],
)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        fused_mos.MoS(**{"in_features": D, "n_classes": V, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 2.5}, "n_experts must be an int, got 2.5"),
        ({"weight": torch.nn.Embedding(V, D)}, "weight must be a Parameter, .* got Embedding"),
    ],
)
def test_constructor_types(options, message):
    with pytest.raises(TypeError, match=message):
        fused_mos.MoS(**{"in_features": D, "n_classes": V, **options})


@pytest.mark.parametrize("fused", [False, True])
def test_nan_is_found_in_a_weight_that_was_written_to(fused):
    """Outside training, a weight is checked once and then again only after a write."""
    latent, prior_logits, weight = torch.randn(N, K, D), torch.randn(N, K), torch.nn.Parameter(torch.randn(V, D))

    def step():
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=math.inf, fused=fused).step()
        weight.grad.zero_()
        torch.optim.SGD([weight], lr=math.inf, fused=fused).step()  # 0 · inf

    writes = [
        lambda: weight[0, 0].fill_(torch.nan),
        lambda: weight.mul_(torch.nan),
        lambda: weight.copy_(_nan(V, D)),
        lambda: setattr(weight, "data", _nan(V, D)),
        lambda: weight.data.fill_(torch.nan),
        step,
    ]
    for write in writes:
        with torch.no_grad():
            weight.copy_(torch.randn(V, D))
            F.mos_log_prob(latent, prior_logits, weight)
            write()
            with pytest.raises(ValueError, match="weight contains NaN"):
                F.mos_log_prob(latent, prior_logits, weight)


@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"softcap": 3.0}, {"class_weight": torch.arange(float(V))}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_one_nan_in_the_weight_is_found_by_the_loss(backend, dtype, options):
    """It looks for NaN in the weight only if its result has any."""
    inputs = _inputs() | {"target": torch.tensor([0, -100, 1, 2])}
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    inputs["weight"][V - 1, D - 1] = torch.nan
    with pytest.raises(ValueError, match=r"weight contains NaN \(1 of 55 values\)"):
        F.mos_nll_loss(**inputs, **options, backend=backend)


def test_the_loss_does_not_read_the_weight_for_nan_alone(monkeypatch):
    inputs, read, maximum = _inputs(), [], torch.Tensor.max
    inputs["weight"].requires_grad_()
    monkeypatch.setattr(torch.Tensor, "max", lambda self, *args: read.append(self.shape) or maximum(self, *args))
    F.mos_nll_loss(**inputs, backend="reference")
    assert inputs["latent"].shape in read and inputs["weight"].shape not in read


def test_a_weight_is_read_once_but_in_training(monkeypatch):
    latent, prior_logits, weight = torch.randn(N, K, D), torch.randn(N, K), torch.nn.Parameter(torch.randn(V, D))
    read, maximum = [], torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda self, *args: read.append(self.shape) or maximum(self, *args))
    for n_expected, training in ((1, False), (4, True)):
        with torch.set_grad_enabled(training):
            for _ in range(3):
                F.mos_log_prob(latent, prior_logits, weight, backend="reference")
        assert read.count(weight.shape) == n_expected
