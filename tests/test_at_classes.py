"""Log-probabilities of given classes, scores, per-expert results, soft caps, and restricted samples, on every
backend."""

import functools

import formulas
import pytest
import torch
from backends import CPU, ON_GPU, TRITON
from problem import EXACT, Problem, check_forward_and_gradients, problem

from fused_mos import functional as F
from fused_mos._backends import gather

SHAPES = [(5, 1, 3, 2), (7, 3, 17, 3), (23, 3, 33, 131), (1, 4, 16, 123)]
DTYPES = [torch.float32, torch.bfloat16]
SOFTCAP = 2.5


@pytest.fixture(params=["tiled", CPU, TRITON])
def backend(request):
    return request.param


def classes(n: int, v: int, m: int | None) -> torch.Tensor:
    """Random classes, some ignored and some repeated."""
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, v, (n, m or 1), generator=generator, device="cpu").to(torch.get_default_device())
    index[n // 2 :, -1] = index[n // 2 :, 0]
    index[n // 3, 0] = -100
    return index if m else index[:, 0]


@functools.cache
def log_prob_at(m: int | None, softcap: float | None, temperature: float, mixture_temperature: float):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        index = classes(len(p.latent), len(p.weight), m)
        options = {"softcap": softcap, "temperature": temperature, "mixture_temperature": mixture_temperature}
        given = p.latent, p.prior_logits, p.weight
        if backend == "formula":
            columns = index[:, None] if m is None else index
            found = formulas.log_prob(*given, p.bias, **options).gather(1, columns.clamp_min(0))
            return torch.where(columns >= 0, found, 0).view(index.shape)
        return F.mos_log_prob_at(*given, index, p.bias, backend=backend, **options)

    return compute


@pytest.mark.parametrize(
    ("m", "softcap", "temperature", "mixture_temperature"),
    [
        (None, None, 1.0, 1.0),
        (None, SOFTCAP, 0.7, 1.0),
        (4, None, 1.0, 1.0),
        (4, SOFTCAP, 1.0, 1.0),
        (4, None, 1.5, 1.0),
        (None, None, 1.0, 0.7),
        (3, SOFTCAP, 0.8, 1.6),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_prob_at(shape, m, softcap, temperature, mixture_temperature, backend):
    compute, case = log_prob_at(m, softcap, temperature, mixture_temperature), problem(*shape)
    double = case.to(torch.float64)
    assert torch.allclose(compute(double, "reference"), compute(double, "formula"), rtol=0, atol=1e-12)
    for dtype in DTYPES:
        check_forward_and_gradients(case, compute, dtype, backend, relative_slack=2**-9)


def test_the_two_temperatures_differ_for_a_mixture_alone():
    for k, same in ((1, True), (3, False)):
        case = problem(9, k, 8, 40, scale=4).to(torch.float64, ())
        index = torch.arange(9)
        given = case.latent, case.prior_logits, case.weight, index, case.bias
        of_experts, of_mixture = (
            F.mos_log_prob_at(*given, temperature=0.7),
            F.mos_log_prob_at(*given, mixture_temperature=0.7),
        )
        assert torch.allclose(of_experts, of_mixture, rtol=0, atol=1e-12) == same


def test_rows_are_gathered_in_blocks(backend, monkeypatch):
    """Includes blocks of one token, and a class that occurs in two blocks."""
    monkeypatch.setattr(gather, "BYTES", 1)
    check_forward_and_gradients(problem(23, 3, 33, 5), log_prob_at(4, SOFTCAP, 1.0, 1.0), torch.float32, backend)


def test_duplicates_add_up_in_one_order(backend):
    """Equal calls give equal bits, whatever torch's setting for determinism is, with several threads, too."""
    torch.use_deterministic_algorithms(False)
    case = problem(300, 2, 32, 7).to(torch.float32)
    index = torch.randint(0, 7, (300, 50))
    gradients = []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    for _ in range(2):
        p = case.to(torch.float32)
        F.mos_log_prob_at(p.latent, p.prior_logits, p.weight, index, p.bias, backend=backend).sum().backward()
        gradients.append(p.gradients())
    torch.set_num_threads(n_threads)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@functools.cache
def score(softcap: float | None):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        if backend == "formula":
            log_p = formulas.log_prob(*p.inputs(), softcap=softcap)
            valid = p.target != -100
            likelihood = log_p.gather(1, p.target.clamp_min(0)[:, None])[:, 0]
            entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0).sum(1)
            return torch.stack([torch.where(valid, likelihood, 0), torch.where(valid, entropy, 0)])
        given = p.latent, p.prior_logits, p.weight, p.target, p.bias
        return torch.stack(F.mos_score(*given, softcap=softcap, backend=backend)[:2])

    return compute


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score(shape, softcap, backend):
    case = problem(*shape)
    double = case.to(torch.float64)
    ours, formula = (score(softcap)(double, name) for name in ("reference", "formula"))
    assert torch.allclose(ours, formula, rtol=0, atol=1e-12)
    for dtype in DTYPES:
        check_forward_and_gradients(case, score(softcap), dtype, backend, relative_slack=2**-9)


def test_score_in_many_tiles(workspace, backend):
    check_forward_and_gradients(problem(37, 3, 20, 507), score(None), torch.float32, backend)


def test_the_best_class_of_a_score(backend):
    case = problem(40, 3, 16, 60, ignored=False).to(torch.float32, ())
    best = F.mos_predict(*case.inputs(), backend=backend)
    target = torch.where(torch.arange(40) % 2 == 0, best, (best + 1) % 60)
    target[7] = -100
    top1 = F.mos_score(case.latent, case.prior_logits, case.weight, target, case.bias, backend=backend).is_top1
    assert torch.equal(top1, (target == best) & (torch.arange(40) != 7))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
def test_classes_that_tie_are_all_best(k, backend):
    """A cap makes logits equal up to rounding: all of them, and the predicted one, count as best."""
    case = problem(3, k, 8, 40, ignored=False).to(torch.float32, ())
    given = torch.zeros_like(case.latent), case.prior_logits, case.weight
    assert F.mos_score(*given, torch.tensor([0, 3, 39]), backend=backend).is_top1.all()
    case = problem(60, k, 8, 40, scale=60, ignored=False).to(torch.float32, ())
    best = F.mos_predict(*case.inputs(), softcap=1.0, backend=backend)
    given = case.latent, case.prior_logits, case.weight, best, case.bias
    assert F.mos_score(*given, softcap=1.0, backend=backend).is_top1.all()


@pytest.mark.parametrize("call", ["score", "log_prob_at", "several"])
def test_what_is_infinite_in_ignored_tokens_stays_there(call, backend):
    case = problem(9, 3, 8, 40).to(torch.float32)
    case.latent.data[4], case.prior_logits.data[4] = torch.inf, torch.inf  # the ignored token
    given = case.latent, case.prior_logits, case.weight
    if call == "score":
        result = sum(part.sum() for part in F.mos_score(*given, case.target, case.bias, backend=backend)[:2])
    else:
        index = case.target if call == "log_prob_at" else case.target[:, None].expand(-1, 4)
        result = F.mos_log_prob_at(*given, index, case.bias, backend=backend).sum()
    result.backward()
    assert result.isfinite() and all(gradient.isfinite().all() for gradient in case.gradients().values())


@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
def test_a_masked_class_has_no_entropy(backend):
    """0·log 0 is 0, and has no gradient."""
    case = problem(5, 2, 8, 40, ignored=False).to(torch.float32)
    bias = case.bias.detach().clone()
    bias[5:] = -torch.inf
    target = torch.arange(5)
    few = F.mos_score(case.latent, case.prior_logits, case.weight[:5], target, bias[:5], backend="reference")
    found = F.mos_score(case.latent, case.prior_logits, case.weight, target, bias, backend=backend)
    assert torch.allclose(found.entropy, few.entropy, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(found.entropy.sum(), (case.latent, case.weight))
    wanted = torch.autograd.grad(few.entropy.sum(), (case.latent, case.weight))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(gradients, wanted))


@functools.cache
def experts(softcap: float | None):
    def compute(p: Problem, backend: str) -> torch.Tensor:
        if backend == "formula":
            logits = formulas.logits(p.latent, p.weight, p.bias, softcap)
            valid = (p.target != -100)[:, None]
            index = p.target.clamp_min(0)[:, None, None].expand(-1, p.latent.shape[1], 1)
            found = logits.log_softmax(-1).gather(2, index)[..., 0]
            return torch.stack([torch.where(valid, found, 0), logits.logsumexp(-1)])
        return torch.stack(
            F.mos_expert_log_prob(p.latent, p.weight, p.target, p.bias, softcap=softcap, backend=backend)
        )

    return compute


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_by_themselves(shape, softcap, backend):
    case = problem(*shape)
    double = case.to(torch.float64)
    ours, formula = (experts(softcap)(double, name) for name in ("reference", "formula"))
    assert torch.allclose(ours, formula, rtol=0, atol=1e-12)
    for dtype in DTYPES:
        check_forward_and_gradients(
            case, experts(softcap), dtype, backend, ("latent", "weight", "bias"), relative_slack=2**-9
        )


# ------------------------------------------------------------------------------------------------------------ soft caps


def capped_log_prob(p, backend):
    if backend == "formula":
        return formulas.log_prob(*p.inputs(), softcap=SOFTCAP)
    return F.mos_log_prob(*p.inputs(), softcap=SOFTCAP, backend=backend)


def capped_logsumexp(p, backend):
    if backend == "formula":
        return formulas.logits(p.latent, p.weight, p.bias, SOFTCAP).logsumexp(-1)
    return F.mos_logsumexp(p.latent, p.weight, p.bias, softcap=SOFTCAP, backend=backend)


@pytest.mark.parametrize("compute", [capped_log_prob, capped_logsumexp])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_capped_distributions(shape, compute, backend):
    requires_grad = ("latent", "weight", "bias") + (("prior_logits",) if compute is capped_log_prob else ())
    for bias in (True, False):
        case = problem(*shape, bias=bias)
        double = case.to(torch.float64)
        assert torch.allclose(compute(double, "reference"), compute(double, "formula"), rtol=0, atol=1e-12)
        for dtype in DTYPES:
            check_forward_and_gradients(case, compute, dtype, backend, requires_grad, relative_slack=2**-9)


def test_capped_predictions(workspace, backend):
    case = problem(37, 3, 20, 507, scale=8).to(torch.float32, ())
    log_p = formulas.log_prob(*case.to(torch.float64, ()).inputs(), softcap=SOFTCAP)
    best = F.mos_predict(*case.inputs(), softcap=SOFTCAP, backend=backend)
    assert torch.allclose(log_p.gather(1, best[:, None])[:, 0], log_p.amax(1), rtol=0, atol=1e-5)
    top = F.mos_topk(*case.inputs(), k=5, softcap=SOFTCAP, backend=backend)
    assert torch.allclose(top.values.double(), log_p.topk(5).values, rtol=0, atol=1e-5)
    assert torch.allclose(log_p.gather(1, top.indices), log_p.topk(5).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_a_cap_far_from_the_logits(scale, backend):
    """Tiny logits pass unchanged. Of huge ones only the sign is left, and they get no gradient."""
    dtype, tolerance = EXACT[backend]
    case = problem(9, 3, 8, 40, bias=scale == 0, scale=scale or 1e-3).to(dtype)
    if not scale:
        case.bias.data.mul_(1e-3)
    loss = case.nll(softcap=10.0, backend=backend)
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in case.gradients().values())
    if not scale:
        # l³/(3c²) is what the cap takes
        assert torch.allclose(loss, case.nll(backend=backend), rtol=0, atol=tolerance + 1e-8)


# -------------------------------------------------------------------------------------------------------------- samples


LIMITS = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 5, "top_p": 0.7},
    {"mixture_temperature": 0.5},
    {"temperature": 0.7, "mixture_temperature": 1.4, "top_k": 6, "top_p": 0.9},
    {"top_p": 0.5, "softcap": SOFTCAP},
]


def limited(log_p: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:  # (N, V) -> (N, V)
    """Apply top_k, then top_p, renormalising after each."""
    probability = log_p.exp()
    if top_k:
        probability = probability.masked_fill(probability < probability.topk(top_k).values[:, -1:], 0)
        probability = probability / probability.sum(1, keepdim=True)
    for row in probability:
        order = row.argsort(descending=True)
        kept = int((row[order].cumsum(0) < top_p).sum()) + 1
        row[order[kept:]] = 0
    return probability / probability.sum(1, keepdim=True)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "tiled", CPU, TRITON])
def test_restricted_samples_have_their_frequencies(limits, backend):
    case = problem(2, 3, 8, 20, scale=3, ignored=False).to(torch.float32, ())
    exact = case.to(torch.float64, ())
    transform = {name: limits[name] for name in ("temperature", "mixture_temperature", "softcap") if name in limits}
    expected = limited(formulas.log_prob(*exact.inputs(), **transform), limits.get("top_k"), limits.get("top_p", 1.0))
    draws = 800 if backend == "triton" and not ON_GPU else 2_000
    latent, prior = case.latent.repeat(draws, 1, 1), case.prior_logits.repeat(draws, 1)
    drawn = F.mos_sample(latent, prior, case.weight, case.bias, backend=backend, **limits).view(draws, 2)
    for token in range(2):
        frequency = torch.bincount(drawn[:, token], minlength=20).double() / draws
        assert (frequency[expected[token] == 0] == 0).all()
        spread = (expected[token] * (1 - expected[token]) / draws).sqrt()
        assert ((frequency - expected[token]).abs() <= 5 * spread + 1e-12).all()


def test_a_cold_mixture_draws_its_best_class(backend):
    case = problem(40, 3, 16, 60, scale=3).to(torch.float32, ())
    cold = F.mos_sample(*case.inputs(), mixture_temperature=1e-7, backend=backend)
    first = F.mos_sample(*case.inputs(), top_k=1, backend=backend)
    least = F.mos_sample(*case.inputs(), top_p=1e-300, backend=backend)
    best = F.mos_predict(*case.inputs(), backend=backend)
    assert torch.equal(cold, best) and torch.equal(first, best) and torch.equal(least, best)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("top_k", 41),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("mixture_temperature", 0.0),
        ("temperature", None),
    ],
)
def test_bad_limits_are_named(name, value):
    case = problem(5, 3, 8, 40).to(torch.float32, ())
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        F.mos_sample(*case.inputs(), **{name: value})


def test_no_tokens(backend):
    case = problem(0, 3, 8, 40).to(torch.float32)
    given = case.latent, case.prior_logits, case.weight
    assert F.mos_log_prob_at(*given, torch.empty(0, 4, dtype=torch.int64), case.bias, backend=backend).shape == (0, 4)
    assert F.mos_score(*given, case.target, case.bias, backend=backend).entropy.shape == (0,)
    assert F.mos_sample(*given, case.bias, top_p=0.5, backend=backend).shape == (0,)
    F.mos_log_prob_at(*given, case.target, case.bias, mixture_temperature=2.0, backend=backend).sum().backward()
    assert all((gradient == 0).all() for gradient in case.gradients().values())


@pytest.mark.parametrize("index", [torch.zeros(4, dtype=torch.int64), torch.full((5, 2), 40), torch.zeros(5), "no"])
def test_bad_classes_are_named(index):
    case = problem(5, 3, 8, 40).to(torch.float32)
    with pytest.raises((ValueError, TypeError, IndexError), match="index"):
        F.mos_log_prob_at(case.latent, case.prior_logits, case.weight, index, case.bias)
