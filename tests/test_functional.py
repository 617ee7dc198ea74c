"""The fused functions against the float64 reference, with the criterion of problem.py."""

import math

import pytest
import torch
from backends import INSTRUCTION_SETS, ON_GPU, TRITON, configurations, use_instruction_set
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import EXACT, INPUTS, Problem, check_forward_and_gradients, log_prob, logsumexp, nll, problem

from fused_mos import _local, ops
from fused_mos import functional as F
from fused_mos._backends import reference, tiled, tiled_products

# V: two words to WikiText-2's vocabulary, with odd ones; K: one softmax, the paper's 10 and 15; D odd and above 256,
# with biases of order 1 (a kernel that adds the bias once per slice of D passes small cases)
SHAPES = [
    (5, 1, 3, 2),
    (7, 3, 17, 3),
    (37, 3, 33, 507),
    (9, 10, 291, 507),
    (6, 15, 35, 10_000),
    (3, 15, 20, 33_278),
    (1, 4, 16, 123),
]
DTYPES = [torch.float32, torch.bfloat16]


def skip_minutes_in_the_interpreter(backend: str, workspace: str, n_classes: int, dtype: torch.dtype) -> None:
    """The interpreter's time goes with the vocabulary. Several tiles of a large one exist in both workspaces."""
    most = 10_000 if workspace == "one tile" and dtype == torch.float32 else 1_000
    if backend == "triton" and not ON_GPU and n_classes > most:
        pytest.skip("takes long in Triton's interpreter, on the path of a smaller vocabulary")


# a sum takes the path of a mean, with another scale
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("reduction", "shape"),
    [*((reduction, shape) for reduction in ("mean", "none") for shape in SHAPES), ("sum", SHAPES[2])],
    ids=str,
)
def test_nll(shape, dtype, reduction, workspace, backend):
    skip_minutes_in_the_interpreter(backend, workspace, shape[3], dtype)
    # of three numbers, such as the bias's gradient of three classes, all can be rounded luckily in the unfused
    # computation
    lucky = shape[3] == 3 and dtype == torch.bfloat16
    check_forward_and_gradients(problem(*shape), nll(reduction), dtype, backend, relative_slack=2**-9 if lucky else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_prob(shape, dtype, workspace, backend):
    skip_minutes_in_the_interpreter(backend, workspace, shape[3], dtype)
    check_forward_and_gradients(problem(*shape), log_prob, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logsumexp(shape, dtype, workspace, backend):
    skip_minutes_in_the_interpreter(backend, workspace, shape[3], dtype)
    check_forward_and_gradients(problem(*shape), logsumexp, dtype, backend, requires_grad=("latent", "weight", "bias"))


@pytest.mark.parametrize("compute", [nll("mean"), nll("none"), log_prob], ids=["mean", "none", "log_prob"])
def test_without_bias(compute, workspace, backend):
    check_forward_and_gradients(problem(11, 3, 12, 200, bias=False), compute, torch.float32, backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("k", [1, 3])
def test_one_expert_or_equal_experts_are_cross_entropy(k, reduction, workspace, backend):
    """K = 1 is F.cross_entropy, and with equal experts the prior does not matter."""
    dtype, tolerance = EXACT[backend]
    case = problem(23, 1, 15, 507).to(dtype)
    expected = torch.nn.functional.cross_entropy(
        case.latent[:, 0] @ case.weight.t() + case.bias, case.target, reduction=reduction
    )
    expanded = case.latent.expand(-1, k, -1)  # stride 0: also a non-contiguous input
    prior = torch.randn(23, k, dtype=dtype)
    loss = F.mos_nll_loss(expanded, prior, case.weight, case.target, case.bias, reduction=reduction, backend=backend)
    assert torch.allclose(loss, expected, rtol=0, atol=tolerance)
    grads = torch.autograd.grad(loss.sum(), (case.latent, case.weight, case.bias), retain_graph=True)
    for gradient, wanted in zip(grads, torch.autograd.grad(expected.sum(), (case.latent, case.weight, case.bias))):
        assert torch.allclose(gradient, wanted, rtol=0, atol=tolerance)


def test_permuting_experts_changes_nothing(workspace, backend):
    dtype, tolerance = EXACT[backend]
    case = problem(23, 5, 15, 507).to(dtype, ())
    order = torch.tensor([3, 1, 4, 0, 2])
    a = case.nll(reduction="none", backend=backend)
    b = F.mos_nll_loss(
        case.latent[:, order],
        case.prior_logits[:, order],
        case.weight,
        case.target,
        case.bias,
        reduction="none",
        backend=backend,
    )
    assert torch.allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_sum_to_one(dtype, workspace, backend):
    skip_minutes_in_the_interpreter(backend, workspace, 10_000, dtype)
    case = problem(6, 10, 33, 10_000).to(dtype, ())
    total = F.mos_log_prob(*case.inputs(), backend=backend).double().exp().sum(-1)
    assert (total - 1).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-4)


def test_log_prob_agrees_with_nll():
    case = problem(23, 5, 15, 507, ignored=False)
    log_p = F.mos_log_prob(*case.inputs())
    assert torch.allclose(-log_p.gather(1, case.target[:, None])[:, 0], case.nll(reduction="none"), rtol=0, atol=1e-12)


def test_no_tokens(workspace, backend):
    """Like F.cross_entropy: no loss, no gradient; a mean over nothing is NaN."""
    case = problem(0, 3, 4, 11).to(torch.float32)
    assert case.nll(reduction="none", backend=backend).shape == (0,)
    assert F.mos_log_prob(*case.inputs(), backend=backend).shape == (0, 11)
    assert F.mos_logsumexp(case.latent, case.weight, case.bias, backend=backend).shape == (0, 3)
    assert F.mos_predict(*case.inputs(), backend=backend).shape == (0,)
    assert F.mos_topk(*case.inputs(), k=4, backend=backend).indices.shape == (0, 4)
    assert F.mos_sample(*case.inputs(), backend=backend).shape == (0,)
    total = case.nll(reduction="sum", backend=backend)
    total.backward()
    assert total.item() == 0 and case.weight.grad.eq(0).all()
    assert case.nll(backend=backend).isnan()


@pytest.mark.parametrize("compute", [nll("mean"), nll("none"), log_prob], ids=["mean", "none", "log_prob"])
@pytest.mark.parametrize(
    "requires_grad", [(name,) for name in INPUTS] + [("latent", "weight"), ("prior_logits", "bias"), ()], ids=str
)
def test_only_some_inputs_require_grad(compute, requires_grad, workspace, backend):
    check_forward_and_gradients(problem(11, 3, 12, 200), compute, torch.float32, backend, requires_grad=requires_grad)


def test_non_contiguous_inputs(workspace, backend):
    dtype, tolerance = EXACT[backend]
    case = problem(11, 3, 12, 200).to(dtype, ())
    strided = Problem(
        latent=case.latent.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        prior_logits=case.prior_logits.t().contiguous().t(),
        weight=case.weight.repeat_interleave(2, 1)[:, ::2],
        bias=case.bias.repeat_interleave(2)[::2],
        target=case.target.repeat_interleave(2)[::2],
    )
    assert (
        not strided.latent.is_contiguous() and not strided.weight.is_contiguous() and not strided.bias.is_contiguous()
    )
    for compute in (nll("mean"), nll("none"), log_prob, logsumexp):
        leaves = [tensor.requires_grad_() for tensor in strided.inputs()]
        ours = torch.autograd.grad(compute(strided, backend).sum(), leaves, allow_unused=True)
        wanted = torch.autograd.grad(compute(strided, "reference").sum(), leaves, allow_unused=True)
        for a, b in zip(ours, wanted):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=0, atol=10 * tolerance)


def test_second_call_after_in_place_change(workspace, backend):
    """Nothing is cached between calls, and a change between forward and backward is refused by autograd."""
    dtype, tolerance = EXACT[backend]
    case = problem(11, 3, 12, 200).to(dtype)
    first = case.nll(backend=backend)
    with torch.no_grad():
        case.weight.mul_(2)
    assert torch.allclose(case.nll(backend=backend), case.nll(backend="reference"), rtol=0, atol=tolerance)
    assert not torch.allclose(case.nll(backend=backend), first)
    loss = case.nll(reduction="none", backend=backend).sum()
    with torch.no_grad():
        case.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_through_both_the_tokens_and_the_loss(workspace, backend):
    """nll_and_loss forms the gradient of the mean in the forward pass; gradients of single tokens add to it."""
    dtype, tolerance = EXACT[backend]
    case = problem(11, 3, 12, 200)
    grads = []
    for each in (backend, "reference"):
        p = case.to(dtype)
        result = _local.LOCAL.nll_and_loss(*p.inputs()[:3], p.target, p.bias, reduction="mean", backend=each)
        (3 * result.loss + (result.nll * torch.linspace(0, 1, 11, dtype=dtype)).sum()).backward()
        grads.append(p.gradients())
    for name in INPUTS:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_three_times_with_retained_graph(reduction, workspace, backend):
    """Accumulation into .grad must not reach the gradients that the graph keeps."""
    dtype, tolerance = EXACT[backend]
    case = problem(11, 3, 12, 200).to(dtype)
    loss = case.nll(backend=backend, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = case.weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.allclose(case.weight.grad, 3 * once, rtol=0, atol=tolerance)


def test_double_backward_is_refused():
    case = problem(5, 2, 4, 20).to(torch.float64)
    for reduction in ("mean", "none"):
        with pytest.raises(RuntimeError, match="reference"):
            torch.autograd.grad(case.nll(reduction=reduction).sum(), case.latent, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_filter_error_is_bounded(reduction, workspace, backend):
    """Each token loses at most K·eps of its weight: the gradient of the loss moves by no more than that times
    the largest gradient that a row of weight 1 can have."""
    dtype, tolerance = EXACT[backend]
    n, k = 24 if backend == "triton" else 64, 8
    case = problem(n, k, 12, 300)
    case.prior_logits.mul_(4)  # so that some experts matter and others do not
    exact = case.to(dtype)
    exact.nll(reduction=reduction, backend=backend).sum().backward()
    scale = 1 / (case.target != -100).sum().item() if reduction == "mean" else 1
    responsibility = _responsibility(case)
    for eps in (1e-3, 1e-2, 0.2):
        filtered = case.to(dtype)
        filtered.nll(reduction=reduction, grad_filter_eps=eps, backend=backend).sum().backward()
        dropped = (responsibility < eps) & (case.target != -100)[:, None]
        assert 0 < dropped.sum() < dropped.numel()
        assert filtered.latent.grad[dropped].eq(0).all(), "the filter dropped nothing"
        kept = ~dropped
        assert torch.allclose(filtered.latent.grad[kept], exact.latent.grad[kept], rtol=0, atol=tolerance)
        lost = (responsibility * dropped).sum()
        assert lost <= n * k * eps
        # a row's dl has an L1 norm of at most 2
        assert (filtered.bias.grad - exact.bias.grad).abs().sum() <= 2 * scale * lost + tolerance
        assert (filtered.weight.grad - exact.weight.grad).abs().max() <= 2 * scale * lost + tolerance
        assert torch.equal(filtered.prior_logits.grad, exact.prior_logits.grad)


def _responsibility(case: Problem) -> torch.Tensor:
    log_softmax = torch.log_softmax(case.latent @ case.weight.t() + case.bias, -1)
    at_target = log_softmax.gather(2, case.target.clamp_min(0)[:, None, None].expand(-1, log_softmax.shape[1], 1))[
        ..., 0
    ]
    return torch.softmax(torch.log_softmax(case.prior_logits, -1) + at_target, -1)


def test_predict(workspace, backend):
    case = problem(37, 3, 33, 507).to(torch.float32, ())
    assert torch.equal(F.mos_predict(*case.inputs(), backend=backend), reference.log_prob(*case.inputs()).argmax(-1))
    n = 256  # so many that the classes that tie are in several tiles, also of one split of the vocabulary
    tie = Problem(torch.zeros(n, 1, 4), torch.zeros(n, 1), torch.zeros(300, 4), None, torch.zeros(n, dtype=torch.int64))
    assert F.mos_predict(*tie.inputs(), backend=backend).tolist() == [0] * n


@pytest.mark.parametrize("k", [1, 5, 507])
def test_topk(k, workspace, backend, monkeypatch):
    """The values of the most probable classes, and classes that have them, from one span of the vocabulary and from
    several."""
    if workspace == "many tiles":
        monkeypatch.setattr(ops.distribution, "TOPK_BYTES", 1)
    case = problem(37, 3, 33, 507).to(torch.float32, ())
    log_p = reference.log_prob(*case.inputs())
    values, indices = F.mos_topk(*case.inputs(), k=k, backend=backend)
    assert torch.allclose(values, log_p.topk(k).values, rtol=0, atol=2e-5)
    assert torch.allclose(values, log_p.gather(1, indices), rtol=0, atol=2e-5)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("sampler", ["reference", "tiled", TRITON, *INSTRUCTION_SETS])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sample_follows_the_distribution(sampler, temperature, monkeypatch, workspace):
    """A chi-square statistic of thousands of draws of a 150-class mixture (two tiles and more), within 5 standard
    deviations."""
    backend = sampler if sampler in ("reference", "tiled", "triton") else "cpu"
    if backend == "cpu":
        use_instruction_set(sampler, monkeypatch)
    if backend == "triton":  # few programs, since the interpreter's time goes with their number
        if workspace == "one tile" and not ON_GPU:
            pytest.skip("the same with the tile that is set here")
        monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(1024, 64, 16, 4, 1))
    draws, v = 2_500 if backend == "triton" and not ON_GPU else 20_000, 150
    case = problem(1, 3, 6, v)
    probability = (
        torch.softmax(case.prior_logits, -1)[..., None]
        * torch.softmax((case.latent @ case.weight.t() + case.bias) / temperature, -1)
    ).sum(1)[0]
    repeated = case.latent.expand(draws, -1, -1), case.prior_logits.expand(draws, -1), case.weight, case.bias
    if backend in ("cpu", "triton"):
        repeated = tuple(tensor.float() for tensor in repeated)
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    samples = F.mos_sample(*repeated, temperature=temperature, generator=generator, backend=backend)
    counts = torch.bincount(samples, minlength=v).double()
    expected = probability * draws
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - (v - 1)) < 5 * math.sqrt(2 * (v - 1) + (1 / expected).sum().item())
    again = F.mos_sample(*repeated, temperature=temperature, generator=generator.manual_seed(3), backend=backend)
    assert torch.equal(samples, again)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 6),
    d=st.integers(1, 40),
    v=st.integers(1, 300),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
    bytes=st.sampled_from([1, 4096, 2**20]),
)
def test_any_shape(n, k, d, v, scale, seed, bytes):
    """Random shapes, magnitudes and workspaces, in float64, where nothing but rounding may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled_products.WORKSPACE_BYTES, "cpu", bytes)
        patch.setattr(tiled_products, "MAX_ROWS", 7)
        patch.setattr(tiled, "MIN_GRADIENT_ROWS", 1 if seed % 2 else 128)
        case = problem(n, k, d, v, scale=scale, seed=seed)
        for compute in (nll("sum"), nll("none"), log_prob):
            ours, wanted = case.to(torch.float64), case.to(torch.float64)
            a, b = compute(ours, "tiled"), compute(wanted, "reference")
            tolerance = 1e-13 * (10 + scale)
            assert torch.allclose(a, b, rtol=1e-13, atol=tolerance * n)
            a.sum().backward()
            b.sum().backward()
            for name, gradient in ours.gradients().items():
                largest = max(wanted.gradients()[name].abs().max().item(), n)
                assert torch.allclose(gradient, wanted.gradients()[name], rtol=0, atol=10 * tolerance * largest), name
