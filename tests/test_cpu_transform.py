"""The native CPU kernels with a soft cap, a temperature and weights of the loss's terms, against autograd through the
same formulas in float64."""

import itertools

import pytest
import torch
from problem import Problem, assert_meets_criterion, problem
from torch import Tensor

_cpu = pytest.importorskip("fused_mos._cpu")

from fused_mos._backends import Transform, cpu
from fused_mos._backends.random_numbers import generator_of
from fused_mos._backends.reference import accumulation_dtype

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# logits of these problems are of order 3: the caps leave most alone, bend them, and flatten them
TRANSFORMS = [
    Transform(),
    Transform(0.0, 0.7),
    Transform(30.0),
    Transform(2.0),
    Transform(3.0, 1.7),
    Transform(0.4, 0.25),
]

# one class fewer or more than a tile, a panel or four of them; one row, and more than one block of them
SHAPES = [(1, 1, 5, 2), (2, 3, 1, 3), (19, 1, 17, 129), (11, 3, 13, 507)]


def logits(latent: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    plain = torch.nn.functional.linear(latent, weight, bias).to(accumulation_dtype(latent.dtype))
    capped = transform.softcap * torch.tanh(plain / transform.softcap) if transform.softcap else plain
    return capped / transform.temperature


def weights_like(tensor: Tensor, seed: int) -> Tensor:
    """Random numbers of both signs, the same for every dtype of the tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def target_of_rows(case: Problem) -> Tensor:
    return case.target.clamp_min(0).repeat_interleave(case.latent.shape[1])


def kept_by_gradients(case: Problem, **outputs: Tensor) -> dict[str, Tensor]:
    return {name: output.detach() for name, output in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in case.gradients().items()
    }


# what torch computes, in the dtype of the case


def expected_of_rows(case: Problem, transform: Transform) -> dict[str, Tensor]:
    """Statistics of all rows, and the gradients of a weighted sum of them."""
    n, k, d = case.latent.shape
    rows = logits(case.latent.view(n * k, d), case.weight, case.bias, transform)
    lse, picked = rows.logsumexp(1), rows.gather(1, target_of_rows(case)[:, None]).squeeze(1)
    (weights_like(lse, 1) * lse - weights_like(lse, 2) * picked).sum().backward()
    return kept_by_gradients(case, lse=lse, target_logit=picked)


def log_prob_of(case: Problem, transform: Transform) -> Tensor:
    log_softmax = logits(case.latent, case.weight, case.bias, transform).log_softmax(-1)
    log_prior = case.prior_logits.log_softmax(-1, dtype=log_softmax.dtype)
    return torch.logsumexp(log_prior[..., None] + log_softmax, dim=1)


def expected_of_loss(case: Problem, transform: Transform) -> dict[str, Tensor]:
    nll = torch.nn.functional.nll_loss(log_prob_of(case, transform), case.target, reduction="none")
    loss = nll.sum() / (case.target >= 0).sum()
    loss.backward()
    return kept_by_gradients(case, loss=loss, nll=nll)


def expected_of_log_prob(case: Problem, transform: Transform) -> dict[str, Tensor]:
    log_p = log_prob_of(case, transform)
    (weights_like(log_p, 3) * log_p).sum().backward()
    return kept_by_gradients(case, log_p=log_p)


# what the kernels compute


def ours_of_rows(case: Problem, transform: Transform) -> dict[str, Tensor]:
    n, k, d = case.latent.shape
    operands, target = (case.latent.view(n * k, d), case.weight, case.bias), target_of_rows(case)
    maximum, log_total, target_logit = cpu.row_statistics(*operands, target, transform)
    grad_lse, grad_target = weights_like(maximum, 1), weights_like(maximum, 2)
    gradients = cpu.rows_backward(
        *operands, target, maximum, log_total, grad_lse, grad_target, (True, True, case.bias is not None), transform
    )
    results = {"lse": maximum.double() + log_total, "target_logit": target_logit}
    return results | named(case, gradients[0].view(n, k, d), None, *gradients[1:])


def ours_of_loss(case: Problem, transform: Transform) -> dict[str, Tensor]:
    needs = (True, True, True, case.bias is not None)
    loss, divisor, nll, *_, grad_latent, grad_prior, grad_weight, grad_bias = cpu.nll_with_gradients(
        *case.inputs(), case.target, -100, 0.0, True, needs, transform
    )
    assert divisor == 1
    return {"loss": loss, "nll": nll} | named(case, grad_latent, grad_prior, grad_weight, grad_bias)


def ours_of_log_prob(case: Problem, transform: Transform) -> dict[str, Tensor]:
    log_prior, maximum, log_total = cpu.normalisers(*case.inputs(), transform)
    given = case.latent, log_prior, case.weight, case.bias, maximum, log_total
    log_p = cpu.log_prob(*given, transform)
    needs = (True, True, True, case.bias is not None)
    grad_latent, grad_prior, *others = cpu.log_prob_backward(weights_like(log_p, 3), *given, needs, transform)
    return {"log_p": log_p} | named(case, grad_latent, grad_prior.to(log_p.dtype), *others)


def loss_weights_of(case: Problem) -> Tensor:
    """c, λ and ζ of each token, (3, N), of both signs: all 0 for some tokens, and for others any one or two of them.
    Those of ignored tokens are 0, as `Kernels` promises."""
    n = case.latent.shape[0]
    present = torch.arange(n)[None] // torch.tensor([[1], [2], [4]]) % 2
    present[:, case.target < 0], present[:, 0] = 0, 1
    return weights_like(torch.empty(3, n), 4) * torch.tensor([[1.0], [0.5], [0.1]]) * present


def expected_of_weighted_loss(case: Problem, transform: Transform) -> dict[str, Tensor]:
    nll = torch.nn.functional.nll_loss(log_prob_of(case, transform), case.target, reduction="none")
    lse = logits(case.latent, case.weight, case.bias, transform).logsumexp(-1)
    prior = case.prior_logits.softmax(-1, dtype=lse.dtype)
    c, lse_weight, square_weight = loss_weights_of(case).to(lse.dtype) * (case.target >= 0)
    loss = (c * nll + lse_weight * (prior * lse).sum(1) + square_weight * (prior * lse**2).sum(1)).sum()
    loss.backward()
    return kept_by_gradients(case, loss=loss, nll=nll)


def ours_of_weighted_loss(case: Problem, transform: Transform) -> dict[str, Tensor]:
    """Nothing is filtered, whatever `filter_eps` is."""
    needs = (True, True, True, case.bias is not None)
    loss, divisor, nll, *_, grad_latent, grad_prior, grad_weight, grad_bias = cpu.nll_with_gradients(
        *case.inputs(), case.target, -100, 0.9, False, needs, transform, loss_weights_of(case)
    )
    assert divisor == 1
    return {"loss": loss, "nll": nll} | named(case, grad_latent, grad_prior, grad_weight, grad_bias)


def named(
    case: Problem, latent: Tensor, prior_logits: Tensor | None, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    gradients = {"latent": latent, "prior_logits": prior_logits, "weight": weight}
    if case.bias is not None:
        gradients["bias"] = bias
    return {f"gradient of {name}": tensor for name, tensor in gradients.items() if tensor is not None}


COMPUTATIONS = [
    (ours_of_rows, expected_of_rows),
    (ours_of_loss, expected_of_loss),
    (ours_of_weighted_loss, expected_of_weighted_loss),
    (ours_of_log_prob, expected_of_log_prob),
]
NAMES = ["rows", "loss", "weighted loss", "log_prob"]


def check(case: Problem, dtype: torch.dtype, ours, expected, *options) -> None:
    """The criterion of every backend. Its slack is for small problems, where the unfused error is small by chance."""
    results = ours(case.to(dtype, ()), *options)
    unfused, oracle = expected(case.to(dtype), *options), expected(case.to(torch.float64), *options)
    assert results.keys() == oracle.keys()
    for name, result in results.items():
        factor, slack = (3, 4) if name.startswith("gradient") else (2, 0)
        slack *= torch.finfo(dtype).eps * oracle[name].abs().max().item()
        assert_meets_criterion(result, unfused[name], oracle[name], factor, dtype, name, slack)


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("ours", "expected"), COMPUTATIONS, ids=NAMES)
def test_values_and_gradients(ours, expected, bias, dtype, instruction_set, workspace):
    for shape, transform in itertools.product(SHAPES, TRANSFORMS):
        check(problem(*shape, bias=bias, scale=3.0), dtype, ours, expected, transform)


@DTYPES
@pytest.mark.parametrize(("ours", "expected"), COMPUTATIONS, ids=NAMES)
def test_several_blocks(ours, expected, dtype, instruction_set, workspace):
    check(problem(150, 4, 33, 300, scale=3.0), dtype, ours, expected, Transform(2.5, 0.8))


@pytest.mark.parametrize(("ours", "expected"), COMPUTATIONS, ids=NAMES)
def test_logits_far_beyond_the_cap(ours, expected, instruction_set):
    """Their derivative is 0 as far as float32 can tell, at either end."""
    check(problem(11, 3, 12, 203, scale=1e4), torch.float32, ours, expected, Transform(30.0, 0.9))


@pytest.mark.parametrize(("ours", "expected"), COMPUTATIONS, ids=NAMES)
def test_a_masked_class_is_capped_as_any_other(ours, expected, instruction_set):
    """A bias of −inf gives the logit −c / T, as the formula says."""
    case = problem(11, 3, 12, 203, scale=3.0)
    case.bias[::5] = -torch.inf
    check(case, torch.float32, ours, expected, Transform(2.0, 0.5))


def test_masked_classes_stay_masked_at_any_temperature(instruction_set):
    case = problem(11, 3, 12, 203, scale=3.0).to(torch.float32, ())
    case.bias[::5] = -torch.inf
    case.target = torch.where(case.target % 5 == 0, 1, case.target)
    transform = Transform(0.0, 0.5)
    assert ours_of_log_prob(case, transform)["log_p"][:, ::5].eq(-torch.inf).all()
    for ours, _ in COMPUTATIONS:
        gradient = ours(case, transform)["gradient of weight"]
        assert gradient.isfinite().all() and gradient[::5].eq(0).all()


@DTYPES
def test_predict(dtype, instruction_set, workspace):
    for transform in TRANSFORMS:
        case = problem(70, 3, 13, 507, scale=3.0)
        single = case.to(dtype, ())
        log_prior, maximum, log_total = cpu.normalisers(*single.inputs(), transform)
        best = cpu.predict(single.latent, log_prior, single.weight, single.bias, maximum, log_total, transform)
        log_p = log_prob_of(case, transform)
        assert (log_p.amax(1) - log_p.gather(1, best[:, None]).squeeze(1)).max() < 1e-5


@DTYPES
def test_sample(dtype, instruction_set, workspace):
    """The class at which the distribution, summed class by class, exceeds the row's uniform number."""
    for transform in TRANSFORMS:
        case, seed = problem(300, 1, 13, 507, scale=3.0), torch.tensor([5])
        drawn = cpu.sample(*[x.to(dtype) for x in (case.latent.squeeze(1), case.weight, case.bias)], transform, seed)
        uniform = torch.rand(300, dtype=torch.float64, generator=generator_of(seed, "classes"))
        cumulative = logits(case.latent.squeeze(1), case.weight, case.bias, transform).softmax(1).cumsum(1)
        edges = torch.nn.functional.pad(cumulative, (1, 0))
        low, high = edges.gather(1, drawn[:, None]).squeeze(1), edges.gather(1, drawn[:, None] + 1).squeeze(1)
        assert ((low - 1e-5 <= uniform) & (uniform <= high + 1e-5)).all()
        assert len(drawn.unique()) > 30


def test_what_is_not_a_number_stays_so(instruction_set):
    for transform in (Transform(), Transform(2.0), Transform(0.0, 0.5)):
        case = problem(5, 2, 4, 30).to(torch.float32, ())
        case.latent[1, 0, 2] = torch.nan
        _, log_total, _ = cpu.row_statistics(case.latent.view(10, 4), case.weight, case.bias, None, transform)
        assert log_total.isnan().tolist() == [row == 2 for row in range(10)]
        log_p = ours_of_log_prob(case, transform)["log_p"]
        assert log_p.isnan().any(1).tolist() == [token == 1 for token in range(5)]


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype, instruction_set, workspace):
    case, transform = problem(70, 3, 37, 900, scale=3.0).to(dtype, ()), Transform(3.0, 1.7)
    before, runs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            runs.append([tensor for ours, _ in COMPUTATIONS for tensor in ours(case, transform).values()])
            runs[-1].append(
                cpu.sample(case.latent[:, 0].contiguous(), case.weight, case.bias, transform, torch.tensor([3]))
            )
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@DTYPES
def test_tokens_that_weigh_nothing(dtype, instruction_set, workspace):
    """They take no gradient, even where their numbers are none; and a token that no target counts for still has its
    normalisers."""
    case = problem(40, 3, 13, 300, scale=3.0).to(dtype, ())
    weights = loss_weights_of(case)
    weights[:, 7], weights[:, 9] = 0, torch.tensor([0.0, 0.3, 0.0])
    case.latent[7, 1, 0] = torch.nan
    loss, _, _, _, _, _, *gradients = cpu.nll_with_gradients(
        *case.inputs(), case.target, -100, 0.0, False, (True,) * 4, Transform(2.0), weights
    )
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    grad_latent, grad_prior = gradients[:2]
    for nothing in (7, 8, 20):  # 20 is ignored
        assert grad_latent[nothing].eq(0).all() and grad_prior[nothing].eq(0).all()
    assert grad_latent[9].ne(0).any() and grad_prior[9].ne(0).any()
