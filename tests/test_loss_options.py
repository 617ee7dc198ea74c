"""The options of the loss on every backend: soft caps, weights, smoothing, z-loss, soft targets and external
components. The reference is tested against the formulas and against torch, the backends against the reference."""

import functools

import formulas
import pytest
import torch
from backends import CPU, ON_GPU, TRITON
from problem import EXACT, INPUTS, Problem, check_forward_and_gradients, problem

from fused_mos import functional as F

SHAPES = [(5, 1, 3, 2), (7, 3, 17, 3), (23, 3, 33, 131), (1, 4, 16, 123), (19, 1, 21, 300)]
DTYPES = [torch.float32, torch.bfloat16]
SOFTCAP = 2.5  # the logits of `problem` are of order 1 and some

OPTIONS = {
    "softcap": ("softcap",),
    "class weights": ("class_weight",),
    "token weights": ("token_weight",),
    "z-loss": ("z_loss",),
    "z-loss, weights and softcap": ("z_loss", "softcap", "token_weight", "class_weight"),
    "smoothing": ("label_smoothing",),
    "smoothing and all": ("label_smoothing", "class_weight", "token_weight", "z_loss"),
    "smoothing and softcap": ("label_smoothing", "softcap"),
}


def options_of(names: tuple[str, ...], n: int, v: int, dtype: torch.dtype) -> dict:
    """Options with values exact in bfloat16. A class and some tokens have weight 0, and others are negative."""
    generator = torch.Generator().manual_seed(5)
    class_weight = torch.rand(v, generator=generator, device="cpu").bfloat16().to(dtype)
    token_weight = torch.randn(n, generator=generator, device="cpu").bfloat16().to(dtype) + 0.5
    class_weight[0] = 0
    token_weight[: n // 3] = 0
    values = {
        "softcap": SOFTCAP,
        "class_weight": class_weight,
        "token_weight": token_weight,
        "label_smoothing": 0.125,
        "z_loss": 0.0625,
    }
    return {name: values[name].to(torch.get_default_device()) if "weight" in name else values[name] for name in names}


@functools.cache  # as in problem.py
def loss(names: tuple[str, ...], reduction: str):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        options = options_of(names, len(p.latent), len(p.weight), torch.promote_types(p.latent.dtype, torch.float32))
        return p.nll(reduction=reduction, backend=backend, **options)

    return compute


@pytest.fixture(params=["tiled", CPU, TRITON])
def backend(request):
    return request.param


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_formula(shape, reduction, names):
    for bias in (True, False):
        case = problem(*shape, bias=bias).to(torch.float64)
        options = options_of(names, shape[0], shape[3], torch.float64) | {"reduction": reduction}
        ours, formula = (
            f(case.latent, case.prior_logits, case.weight, case.target, case.bias, **options)
            for f in (functools.partial(F.mos_nll_loss, backend="reference"), formulas.loss)
        )
        assert torch.allclose(ours, formula, rtol=0, atol=1e-12, equal_nan=True)
        inputs = [tensor for tensor in case.inputs() if tensor is not None]
        gradients = (torch.autograd.grad(result.sum(), inputs, retain_graph=True) for result in (ours, formula))
        for of_ours, of_formula in zip(*gradients):
            assert torch.allclose(of_ours, of_formula, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends(shape, reduction, names, dtype, backend):
    case = problem(*shape, bias=shape[0] != 23, ignored=True)
    check_forward_and_gradients(case, loss(names, reduction), dtype, backend, relative_slack=2**-9)


@pytest.mark.parametrize("names", [OPTIONS["z-loss, weights and softcap"], OPTIONS["smoothing and all"]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_tiles(reduction, names, workspace, backend):
    check_forward_and_gradients(problem(37, 3, 20, 507), loss(names, reduction), torch.float32, backend)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_single_expert_is_cross_entropy(reduction, weighted, smoothing, backend):
    dtype, tolerance = EXACT[backend]
    case = problem(23, 1, 15, 131).to(dtype)
    options = options_of(("class_weight",) if weighted else (), 23, 131, dtype)
    loss = case.nll(reduction=reduction, label_smoothing=smoothing, backend=backend, **options)
    logits = case.latent[:, 0] @ case.weight.t() + case.bias
    expected = torch.nn.functional.cross_entropy(
        logits, case.target, options.get("class_weight"), reduction=reduction, label_smoothing=smoothing
    )
    # a sum of 23 tokens is of order 100
    assert torch.allclose(loss, expected, rtol=0, atol=tolerance * (10 if reduction == "sum" else 1))
    inputs = case.latent, case.weight, case.bias
    for ours, wanted in zip(*(torch.autograd.grad(result.sum(), inputs) for result in (loss, expected))):
        assert torch.allclose(ours, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("names", [("class_weight",), ("z_loss",), ("label_smoothing", "z_loss")], ids=str)
def test_all_ignored(names, backend):
    """As F.cross_entropy: a mean over nothing is NaN, and its gradients are 0."""
    case = problem(9, 3, 8, 40).to(torch.float32)
    case.target.fill_(-100)
    loss = case.nll(backend=backend, **options_of(names, 9, 40, torch.float32))
    assert loss.isnan()
    loss.backward()
    assert all((gradient == 0).all() for gradient in case.gradients().values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("names", [*OPTIONS.values(), ("soft",), ("external",)], ids=str)
def test_what_is_infinite_in_ignored_tokens_stays_there(names, reduction, backend):
    """As in the plain loss."""
    if ON_GPU and names == ("softcap",) and reduction == "none":
        pytest.skip("no row is dropped, since the host would wait: 0·∞ in dE is NaN, as it is of F.cross_entropy")
    case = problem(9, 3, 8, 40).to(torch.float32)
    case.latent.data[4] = torch.inf  # the ignored token
    if names == ("soft",):
        target, options = case.target[:, None].expand(-1, 3), {"target_prob": torch.ones(9, 3)}
    else:
        target, options = case.target, {"extra_log_prob": torch.zeros(9, 1)} if names == ("external",) else None
        options = options or options_of(names, 9, 40, torch.float32)
    prior = case.prior_logits if names != ("external",) else torch.cat([case.prior_logits, torch.zeros(9, 1)], 1)
    given = case.latent, prior, case.weight, target, case.bias
    F.mos_nll_loss(*given, reduction=reduction, backend=backend, **options).sum().backward()
    assert all(gradient.isfinite().all() for gradient in case.gradients().values())


def test_the_gradient_of_a_loss_through_its_likelihoods_and_its_normalisers(backend):
    """Backward through all three outputs at once; the last two recompute the logits."""
    dtype, tolerance = EXACT[backend]
    case = problem(23, 3, 15, 131).to(dtype)
    given = case.latent, case.prior_logits, case.weight, case.target, case.bias

    def total(backend: str) -> torch.Tensor:
        loss, lse = F.mos_nll_loss(*given, z_loss=0.1, return_lse=True, backend=backend)
        return loss + (lse * torch.linspace(-1, 1, lse.numel(), dtype=dtype).view_as(lse)).sum()

    results = total(backend), total("reference")
    assert torch.allclose(*results, rtol=0, atol=10 * tolerance)
    for ours, wanted in zip(*(torch.autograd.grad(result, case.inputs()) for result in results)):
        assert torch.allclose(ours, wanted, rtol=0, atol=10 * tolerance)


def test_the_normalisers_are_those_of_logsumexp(backend):
    dtype, tolerance = EXACT[backend]
    case = problem(23, 3, 15, 131).to(dtype)
    for reduction in ("mean", "none"):
        _, lse = case.nll(reduction=reduction, return_lse=True, softcap=SOFTCAP, backend=backend)
        expected = F.mos_logsumexp(case.latent, case.weight, case.bias, softcap=SOFTCAP, backend="reference")
        assert torch.allclose(lse, expected, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------------- soft targets


def soft_targets(n: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft targets of five classes each, some ignored and some repeated, and one token without any."""
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, v, (n, 5), generator=generator, device="cpu")
    index[:, 1] = index[:, 0]
    index[n // 2, 3:], index[n // 3] = -100, -100
    probability = torch.rand(n, 5, generator=generator, device="cpu").bfloat16().to(dtype)
    return index.to(torch.get_default_device()), probability.to(torch.get_default_device())


@functools.cache
def soft_loss(reduction: str, softcap: float | None):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        dtype = torch.promote_types(p.latent.dtype, torch.float32)
        index, probability = soft_targets(len(p.latent), len(p.weight), dtype)
        options = {"reduction": reduction, "softcap": softcap, "z_loss": 0.0625, "target_prob": probability}
        function = formulas.loss if backend == "formula" else functools.partial(F.mos_nll_loss, backend=backend)
        return function(p.latent, p.prior_logits, p.weight, index, p.bias, **options)

    return compute


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets(reduction, softcap, backend):
    case, compute = problem(19, 3, 21, 90), soft_loss(reduction, softcap)
    double = case.to(torch.float64)
    assert torch.allclose(compute(double, "reference"), compute(double, "formula"), rtol=0, atol=1e-12)
    for dtype in DTYPES:
        check_forward_and_gradients(case, compute, dtype, backend, relative_slack=2**-9)


def test_soft_targets_of_one_class_are_targets(backend):
    dtype, tolerance = EXACT[backend]
    case = problem(19, 3, 21, 90).to(dtype)
    index, one = case.target[:, None], torch.ones(19, 1, dtype=dtype)
    soft = F.mos_nll_loss(
        case.latent, case.prior_logits, case.weight, index, case.bias, target_prob=one, backend=backend
    )
    assert torch.allclose(soft, case.nll(backend=backend), rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------------- external components


def external(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities from two components; those of one are often −inf."""
    generator = torch.Generator().manual_seed(4)
    result = torch.rand(n, 2, generator=generator, device="cpu").log().bfloat16().to(dtype)
    result[::2, 1] = -torch.inf
    return result.to(torch.get_default_device())


@functools.cache
def external_loss(reduction: str, names: tuple[str, ...]):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        dtype = torch.promote_types(p.latent.dtype, torch.float32)
        n, k, _ = p.latent.shape
        # the prior of the problem has K + 2 components, of which the last two are external
        options = options_of(names, n, len(p.weight), dtype) | {"extra_log_prob": external(n, dtype)}
        function = formulas.loss if backend == "formula" else functools.partial(F.mos_nll_loss, backend=backend)
        given = p.latent[:, : k - 2], p.prior_logits, p.weight, p.target, p.bias
        return function(*given, reduction=reduction, **options)

    return compute


@pytest.mark.parametrize("names", [(), ("class_weight", "z_loss", "softcap")], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_external_components(reduction, names, backend):
    case, compute = problem(19, 4, 21, 90), external_loss(reduction, names)
    double = case.to(torch.float64)
    assert torch.allclose(compute(double, "reference"), compute(double, "formula"), rtol=0, atol=1e-12)
    for dtype in DTYPES:
        check_forward_and_gradients(case, compute, dtype, backend, relative_slack=2**-9)


def test_external_components_alone_may_be_possible(backend):
    """A target with probability 0 under every expert gets it from the external components, which get all gradient."""
    case = problem(5, 3, 8, 40, ignored=False).to(torch.float32, ())
    case.bias[case.target] = -torch.inf
    extra = torch.full((5, 1), -0.5, requires_grad=True)
    prior = torch.zeros(5, 4, requires_grad=True)
    latent = case.latent.requires_grad_()
    loss = F.mos_nll_loss(latent, prior, case.weight, case.target, case.bias, extra_log_prob=extra, backend=backend)
    assert torch.allclose(loss, 0.5 + torch.tensor(4.0).log())
    loss.backward()
    assert torch.allclose(extra.grad, torch.full((5, 1), -0.2)) and (latent.grad == 0).all()
    assert torch.allclose(prior.grad, torch.tensor([0.05, 0.05, 0.05, -0.15]).expand(5, 4))


def test_external_components_that_know_nothing_change_nothing(backend):
    dtype, tolerance = EXACT[backend]
    case = problem(19, 3, 21, 90).to(dtype)
    prior = torch.cat([case.prior_logits, torch.full((19, 2), -torch.inf, dtype=dtype)], 1)
    extra = torch.full((19, 2), -torch.inf, dtype=dtype)
    loss = F.mos_nll_loss(
        case.latent, prior, case.weight, case.target, case.bias, extra_log_prob=extra, backend=backend
    )
    assert torch.allclose(loss, case.nll(backend=backend), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = {
    "softcap": (0.0, -1.0, float("nan"), float("inf"), 1e-50, 1e300, "3"),
    "label_smoothing": (-0.1, 1.5, float("nan"), None),
    "z_loss": (-1.0, float("nan"), float("inf"), None),
    "class_weight": (torch.ones(39), torch.ones(40, dtype=torch.int64), torch.full((40,), torch.nan), "none"),
    "token_weight": (torch.ones(5), torch.ones(9, 1), torch.ones(9, requires_grad=True)),
    "extra_log_prob": (torch.ones(9), torch.ones(9, 0), torch.ones(8, 1), 3.0),
    "target_prob": (torch.ones(9), torch.ones(9, 1)),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_named(name, value):
    case = problem(9, 3, 8, 40).to(torch.float32)
    with pytest.raises((ValueError, TypeError), match="target" if name == "target_prob" else name):
        case.nll(**{name: value})


def test_clashes_are_named():
    case = problem(9, 3, 8, 40).to(torch.float32)
    prior = torch.zeros(9, 4)
    given = case.latent, prior, case.weight, case.target, case.bias
    with pytest.raises(ValueError, match="label_smoothing"):
        F.mos_nll_loss(*given, extra_log_prob=torch.zeros(9, 1), label_smoothing=0.1)
    soft = case.latent, case.prior_logits, case.weight, case.target[:, None], case.bias
    for name, value in {"class_weight": torch.ones(40), "label_smoothing": 0.1}.items():
        with pytest.raises(ValueError, match=name):
            F.mos_nll_loss(*soft, target_prob=torch.ones(9, 1), **{name: value})
    with pytest.raises(ValueError, match="prior_logits"):
        F.mos_nll_loss(*given)


def test_every_input_gets_its_gradient_alone(backend):
    """Each input requires a gradient while the others do not."""
    case = problem(9, 3, 8, 40)
    options = options_of(OPTIONS["smoothing and all"], 9, 40, torch.float32)
    everything = case.to(torch.float32)
    everything.nll(backend=backend, **options).backward()
    for name in INPUTS:
        alone = case.to(torch.float32, (name,))
        alone.nll(backend=backend, **options).backward()
        assert torch.allclose(alone.gradients()[name], everything.gradients()[name], rtol=1e-5, atol=1e-7)
