"""Properties of single Triton kernels that are too small for the criterion for whole results."""

import math

import pytest
import torch
from backends import configurations, triton
from problem import check_forward_and_gradients, problem

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from fused_mos._backends.triton_kernels import backward, finish, workspace


def test_log_sum_exp_of_large_logits_is_exact():
    """log2(e)·reference has a rounding error of 2⁻¹² at 3,000, but the statistics kept from the forward pass are
    relative to the reference itself."""
    case = problem(40, 3, 8, 300, ignored=False).to(torch.float32, ())
    case.bias += 3_000
    _, _, _, reference, log_total, *_ = triton.nll_with_gradients(
        *case.inputs(), case.target, -100, 0.0, True, (True,) * 4
    )
    logits = case.latent @ case.weight.t() + case.bias  # as the kernels round them
    exact = torch.logsumexp(logits.double(), -1)
    error = (reference.double() + log_total.double() - exact).abs()
    assert error.max() < 2e-5, error.max()


def test_the_gradient_of_the_bias_is_both_columns_of_the_sums():
    sums = torch.randn(20, 16)
    for dtype in (torch.float32, torch.bfloat16):
        grad_weight, grad_bias = torch.empty(19, 8, dtype=dtype), torch.empty(19, dtype=dtype)
        backward.finish(sums, grad_weight, grad_bias, True, 8, unscale=torch.tensor(0.5))
        assert torch.equal(grad_weight, (sums[:19, :8] * 0.5).to(dtype))
        assert torch.equal(grad_bias, ((sums[:19, 8] + sums[:19, 9]) * 0.5).to(dtype))


def test_the_gradient_of_the_bias_of_a_frequent_class():
    """A third of 2,000 tokens has the same target. In a plain sum, the rounding errors of their terms would add up to
    many times that of the unfused gradient."""
    case = problem(2_000, 1, 8, 150, ignored=False)
    case.target[::3] = 5
    case.bias[5] = -8  # which it does not expect
    check_forward_and_gradients(
        case, lambda p, backend: p.nll(backend=backend, reduction="sum"), torch.float32, "triton", ("bias",)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_several_blocks_add_up(dtype, monkeypatch):
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 48 * 1024)
    monkeypatch.setattr(triton, "MIN_GRADIENT_ROWS", 1)
    case = problem(40, 3, 8, 200)
    assert 3 <= triton._rows_of_block(120, 3, case.weight.to(dtype), case.bias) <= 60
    check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend, reduction="sum"), dtype, "triton")


def test_a_large_embedding_takes_its_gradient_directly(monkeypatch):
    """A language model's softmax: one block of 4,096 tokens on a GPU of 80 GB leaves no room for float32
    sums of dE (2 GB), and needs none."""
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 1_700_000_000)
    weight, bias = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((128_256, 4_096), 128_256))
    assert triton._rows_of_block(4_096, 1, weight, None) == 4_096
    assert triton.gradient_in_forward_pays(4_096, 1, weight, None)
    assert triton._rows_of_block(4_096, 1, weight, bias) == 4_096  # whose gradient is then a sum of its own
    assert not triton.gradient_in_forward_pays(16_384, 1, weight, None)


@pytest.mark.parametrize("mean", [True, False])
def test_the_loss_of_more_tokens_than_a_program_reads_at_once(mean):
    losses, target, results = torch.rand(2_500), torch.randint(50, (2_500,)), torch.empty(2)
    losses[target == 7], none = 0, torch.empty(0, 8)
    result = finish.Loss(losses, target, results[0], results[1], 7)
    backward.finish(None, none, none[:, 0], False, 8, loss=result, mean=mean)
    count = target.ne(7).sum()
    assert results[1] == (count if mean else 1)
    assert torch.allclose(results[0], losses.sum() / (count if mean else 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exponentials_leave_room_for_their_products(dtype, monkeypatch):
    """A sum of 2¹¹⁴ is finite, but not its product with an embedding of 10⁵: the row's reference has to be its
    maximum."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 128, 16, 4, 1))
    case = problem(40, 3, 8, 700, ignored=False)
    case.weight *= 2.0**17
    case.latent *= 2.0**-17
    case.bias[500] += 114 * math.log(2)
    case.target[:] = torch.arange(40) * 12
    assert not case.target.eq(500).any() and triton.gradient_in_forward_pays(40, 3, case.weight.to(dtype), case.bias)
    check_forward_and_gradients(case, lambda p, backend: p.nll(backend=backend), dtype, "triton", relative_slack=2**-7)


@pytest.mark.parametrize("largest", [1e-36, 1e-34, 1e-31, 1e-29])
def test_log_probabilities_near_the_smallest_numbers(largest):
    """One expert's probability is a normal number, but 14 others' are flushed to 0: together they are as large."""
    prior = torch.full((3, 15), 1.17e-38, dtype=torch.float64)
    prior[:, 4] = largest / 10
    log_prior, zero = prior.log().float(), torch.zeros(3, 15)
    log_p = triton.log_prob(torch.zeros(3, 15, 8), log_prior, torch.ones(20, 8), None, zero, zero)
    exact = torch.logsumexp(log_prior.double(), 1)
    assert torch.allclose(log_p.double(), exact[:, None], rtol=0, atol=2e-5)


def test_one_expert_takes_all_of_the_gradient():
    """Its posterior is 1. Rounding it by the log-probability, which is a number of order 10, would make the gradient
    of the bias, a sum over thousands of tokens, ten times less exact than the unfused one."""
    case = problem(1, 1, 8, 2_000, ignored=False)
    single, grad = case.to(torch.float32, ()), torch.randn(1, 2_000)
    known = triton.normalisers(*single.inputs())
    latent, _, weight, bias = single.inputs()
    *_, grad_bias = triton.log_prob_backward(grad, latent, known[0], weight, bias, *known[1:], (True,) * 4)
    p = torch.softmax(case.latent[:, 0] @ case.weight.t() + case.bias, -1)
    exact = (grad - grad.double().sum() * p)[0]
    assert torch.allclose(grad_bias.double(), exact, rtol=2**-22, atol=2e-7)


@pytest.mark.parametrize("n_classes", [64, 61])
def test_a_target_that_is_no_class_has_no_logit(n_classes):
    """The target may be in another part of the vocabulary: in the padding of the last tile, or class 0 of the next
    part."""
    rows, weight = torch.randn(7, 8), torch.randn(n_classes, 8)
    target = torch.tensor([0, n_classes - 1, n_classes, n_classes + 1, 10 * n_classes, -1, -100])
    for needs in (True, False):  # with a bias, and without
        bias = torch.randn(n_classes) if needs else None
        *_, found = triton.row_statistics(rows, weight, bias, target)
        logits = rows @ weight.t() + (0 if bias is None else bias)
        assert torch.allclose(found[:2], logits[torch.arange(2), target[:2]], atol=1e-5)
        assert found[2:].isnan().all()
