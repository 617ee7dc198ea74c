"""The fused functions on extreme values: huge logits, masked classes, ignored targets, cold samples, and inputs that
define no distribution.
"""

import math

import pytest
import torch
from problem import EXACT, INPUTS, Problem, assert_meets_criterion, check_forward_and_gradients, log_prob, nll, problem

from fused_mos import functional as F
from fused_mos._backends import reference


@pytest.mark.parametrize("compute", [nll("mean"), nll("none"), log_prob], ids=["mean", "none", "log_prob"])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits(compute, scale, workspace, backend):
    case = problem(11, 3, 12, 200, scale=scale)
    assert case.to(torch.float64).latent.matmul(case.weight.t()).abs().max() > scale
    # logits in the hundreds round differently in other products than the unfused one: the interpreter multiplies with
    # NumPy, and tiled's tiles have other shapes
    slack = scale * 2**-23 if backend in ("tiled", "triton") and scale == 100 else 0.0
    slack += 2**-24 if backend == "triton" else 0.0  # a mean's gradients are rounded once more, in the backward pass
    check_forward_and_gradients(case, compute, torch.float32, backend, relative_slack=slack)


@pytest.mark.parametrize("compute", [nll("mean"), nll("none"), log_prob], ids=["mean", "none", "log_prob"])
def test_logits_far_below_zero(compute, workspace, backend):
    """The padding of the last tile must not count as the largest logit: relative to it, e⁻¹²⁸ underflows."""
    case = problem(11, 3, 12, 203)
    case.bias -= 128
    check_forward_and_gradients(case, compute, torch.float32, backend, relative_slack=2**-16)


@pytest.mark.parametrize("compute", [nll("mean"), nll("none"), log_prob], ids=["mean", "none", "log_prob"])
def test_one_hot_prior(compute, workspace, backend):
    """A prior of exactly one expert, by −inf and by a large logit."""
    case = problem(11, 3, 12, 200)
    case.prior_logits[:5, 1:] = -math.inf
    case.prior_logits[5:, 2] = 1e4
    check_forward_and_gradients(case, compute, torch.float32, backend, requires_grad=("latent", "weight", "bias"))
    only = Problem(case.latent[:5, :1], torch.zeros(5, 1, dtype=torch.float64), case.weight, case.bias, case.target[:5])
    mixed = Problem(case.latent[:5], case.prior_logits[:5], case.weight, case.bias, case.target[:5])
    assert torch.allclose(
        compute(mixed.to(torch.float32, ()), backend), compute(only.to(torch.float32, ()), backend), atol=1e-6
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_classes(reduction, workspace, backend):
    """Classes masked by a bias of −inf have log-probability −inf, get no gradient and do not affect other classes. (The
    reference, being plain torch, has NaN gradients there.)"""
    dtype, tolerance = EXACT[backend]
    case = problem(11, 3, 12, 200, ignored=False)
    allowed = torch.ones(200, dtype=torch.bool)
    allowed[::3] = False
    case.target = torch.where(allowed[case.target], case.target, 1)
    masked, without = case.to(dtype), case.to(torch.float64)
    with torch.no_grad():
        masked.bias[~allowed] = -math.inf
    renumbered = allowed.cumsum(0) - 1
    only = Problem(
        without.latent, without.prior_logits, without.weight[allowed], without.bias[allowed], renumbered[case.target]
    )
    log_p = F.mos_log_prob(*masked.inputs(), backend=backend)
    assert log_p[:, ~allowed].eq(-math.inf).all()
    scale = torch.linspace(-1, 1, 11, dtype=dtype)[:, None]
    (masked.nll(reduction=reduction, backend=backend).sum() + (log_p[:, allowed] * scale).sum()).backward()
    expected = F.mos_log_prob(*only.inputs(), backend="reference")
    assert torch.allclose(log_p[:, allowed].double(), expected, rtol=0, atol=tolerance)
    (only.nll(reduction=reduction, backend="reference").sum() + (expected * scale).sum()).backward()
    for name in INPUTS:
        assert torch.allclose(masked.gradients()[name].double(), without.gradients()[name], rtol=0, atol=tolerance), (
            name
        )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_targets_ignored(reduction, workspace, backend):
    case = problem(6, 3, 4, 11).to(torch.float32)
    case.target.fill_(7)
    loss = case.nll(ignore_index=7, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert loss.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in case.gradients().values())
    assert len(case.gradients()) == 4
    assert case.nll(ignore_index=7, backend=backend).isnan()


def test_a_mean_over_nothing_is_nan_with_gradients_0(workspace, backend):
    """As in F.cross_entropy: one masked micro-batch must not ruin a model."""
    case = problem(6, 3, 4, 11).to(torch.float32)
    case.target.fill_(-100)
    loss = case.nll(backend=backend)
    loss.backward()
    assert loss.isnan() and len(case.gradients()) == 4
    assert all(gradient.eq(0).all() for gradient in case.gradients().values())


def test_ignored_token_with_infinite_loss_gives_no_gradient(workspace, backend):
    """The weight of an ignored token is 0 even where 0·inf would be NaN."""
    case = problem(4, 2, 5, 50, ignored=False)
    case.target[1] = 0
    case.bias[0] = -math.inf
    for reduction in ("sum", "none"):
        p = case.to(torch.float32)
        p.nll(ignore_index=0, reduction=reduction, backend=backend).sum().backward()
        assert all(gradient.isfinite().all() for gradient in p.gradients().values())


def test_mixture_survives_underflow_of_all_but_the_log(workspace, backend):
    """A class whose probability is e⁻³⁰⁰ under every expert keeps an exact log-probability in float32."""
    case = problem(4, 3, 5, 50, ignored=False)
    case.bias[7] = -300.0
    ours = F.mos_log_prob(*case.to(torch.float32, ()).inputs(), backend=backend)
    oracle = reference.log_prob(*case.inputs())
    assert oracle[:, 7].max() < -250
    assert_meets_criterion(
        ours, reference.log_prob(*case.to(torch.float32, ()).inputs()), oracle, 2, torch.float32, "log_prob"
    )


def _without_a_class(what: str):
    """Inputs of which token 1 has nothing to draw."""
    case = problem(4, 3, 8, 90, ignored=False).to(torch.float32, ())
    z, a, w, b = (tensor.clone() for tensor in case.inputs())
    if what == "prior":
        a[1] = -torch.inf
    else:  # every logit is −inf, of every expert
        z[1], z[[0, 2, 3], :, 0] = 0, 0
        z[1, :, 0], w[:, 0] = -torch.inf, 1
    return z, a, w, b


@pytest.mark.parametrize("what", ["prior", "logits"])
def test_a_token_without_a_class_to_draw_is_named(what, backend):
    inputs = _without_a_class(what)
    if inputs[0].is_cuda:  # whose values are not read back
        assert (F.mos_sample(*inputs, backend=backend) == -1).tolist() == [False, True, False, False]
    else:
        message = "token 1 has no class to draw: its prior or all of its logits are −inf or NaN"
        with pytest.raises(ValueError, match=message):
            F.mos_sample(*inputs, backend=backend)
    fine = (tensor[[0, 2, 3]] if i < 2 else tensor for i, tensor in enumerate(inputs))
    assert (F.mos_sample(*fine, backend=backend) >= 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-10, 1e-320])
def test_cold_samples_are_the_best_class(temperature, backend):
    torch.manual_seed(0)
    z, a, w = torch.randn(50, 1, 64), torch.zeros(50, 1), torch.randn(2_000, 64)
    assert torch.equal(
        F.mos_sample(z, a, w, temperature=temperature, backend=backend), F.mos_predict(z, a, w, backend="reference")
    )


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e12])
def test_losses_of_huge_logits_are_finite(scale, backend):
    torch.manual_seed(0)
    z, a, w = scale * torch.randn(8, 2, 64), torch.zeros(8, 2), torch.randn(500, 64)
    inputs = [tensor.requires_grad_() for tensor in (z, a, w)]
    loss = F.mos_nll_loss(*inputs, torch.arange(8), backend=backend)
    exact = F.mos_nll_loss(*(tensor.double() for tensor in inputs), torch.arange(8), backend="reference")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    gradients = torch.autograd.grad(loss, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_small_gradients_of_float16_survive_a_loss_scale():
    """They are rounded only after the loss scale has enlarged them."""
    torch.manual_seed(0)
    n, k, d, v, scale = 2_048, 2, 64, 500, 65_536.0
    w, target, prior = 0.02 * torch.randn(v, d), torch.randint(v, (n,)), torch.randn(n, k)
    latent = (w[target] * 8 / (0.02**2 * d))[:, None] + torch.randn(n, k, d) / 2

    def gradient(dtype, backend, scale):
        z = latent.to(dtype).requires_grad_()
        loss = F.mos_nll_loss(
            z, prior.to(torch.promote_types(dtype, torch.float32)), w.to(dtype), target, backend=backend
        )
        return torch.autograd.grad(loss * scale, z)[0].double() / scale

    exact, scaled = gradient(torch.float64, "reference", 1), gradient(torch.float16, "tiled", scale)
    assert (scaled - exact).norm() < 2e-3 * exact.norm()
    assert (scaled == 0).double().mean() < 1e-3


@pytest.mark.parametrize("what", ["prior inf", "prior all -inf", "latent inf", "bias inf", "weight inf"])
def test_what_is_no_distribution_is_nan(what, backend):
    """The results are NaN for the affected tokens only, on every backend."""
    case = problem(4, 3, 8, 90, ignored=False).to(torch.float32, ())
    z, a, w, b = (tensor.clone() for tensor in case.inputs())
    if what == "prior inf":
        a[1, 0] = torch.inf
    elif what == "prior all -inf":
        a[1] = -torch.inf
    elif what == "latent inf":
        z[1, 0, 0] = torch.inf
    elif what == "bias inf":
        b[5] = torch.inf
    else:
        w[7, 0], z = torch.inf, z.abs()
    bad = torch.tensor([False, True, False, False]) if what[:4] in ("prio", "late") else torch.ones(4, dtype=torch.bool)
    losses = F.mos_nll_loss(z, a, w, case.target, b, reduction="none", backend=backend)
    assert torch.equal(losses.isnan(), bad)
    log_prob = F.mos_log_prob(z, a, w, b, backend=backend)
    assert log_prob[bad].isnan().all() and log_prob[~bad].isfinite().all()
    assert (F.mos_predict(z, a, w, b, backend=backend)[bad] == 0).all()
    inputs = [tensor.requires_grad_() for tensor in (z, a, w, b)]
    mean = F.mos_nll_loss(*inputs[:3], case.target, inputs[3], backend=backend)
    assert mean.isnan() and all(gradient.isnan().any() for gradient in torch.autograd.grad(mean, inputs))
