"""The options of the loss, and the functions of given classes, of a sharded head against the unsharded one."""

import copy

import pytest
import torch
from ranks import run_on_ranks

from fused_mos import MoS, functional
from fused_mos.vocab_parallel import VocabShard, parallelize

N, K, D, V = 20, 3, 17, 507


def problem(dtype=torch.float64):
    """latent, prior_logits, weight, bias, target; the same on all ranks."""
    torch.manual_seed(7)
    tensors = torch.randn(N, K, D), torch.randn(N, K), 0.5 * torch.randn(V, D), torch.randn(V)
    target = torch.randint(V, (N,))
    target[3] = -100
    return *(t.to(dtype).requires_grad_() for t in tensors), target


def check(shard, compute, dtype=torch.float64, masked: int = 0) -> None:
    """`compute(functions, latent, prior, weight, bias, target)` -> tensors, with all gradients of their sum. The last
    `masked` classes have a bias of −inf."""
    latent, prior, weight, bias, target = problem(dtype)
    if masked:
        bias.data[-masked:] = -torch.inf
        target[target >= V - masked] = 0
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    expected = compute(functional, latent, prior, weight, bias, target)
    whole = torch.autograd.grad(_total(expected), (latent, prior, weight, bias), allow_unused=True)
    own = [shard.rows(t.detach()).clone().requires_grad_() for t in (weight, bias)]
    found = compute(shard, latent, prior, *own, target)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance, equal_nan=True)
    gradients = torch.autograd.grad(_total(found), (latent, prior, *own), allow_unused=True)
    wanted = whole[0], whole[1], shard.rows(whole[2]), shard.rows(whole[3])
    for ours, of_whole in zip(gradients, wanted):
        assert (ours is None) == (of_whole is None)
        if ours is not None:
            torch.testing.assert_close(ours, of_whole, rtol=0, atol=tolerance)


def _total(tensors) -> torch.Tensor:
    """A sum in which each number has its own weight."""
    differentiable = [t for t in tensors if t.is_floating_point()]
    weights = (torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in differentiable)
    return sum((t * w).sum() for t, w in zip(differentiable, weights))


def losses():
    shard = VocabShard(V)
    generator = torch.Generator().manual_seed(8)
    class_weight, token_weight = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (V, N))
    soft = torch.rand(N, 4, generator=generator, dtype=torch.float64)
    extra = soft[:, :2].log()
    index = torch.randint(V, (N, 4), generator=generator)
    index[2, 1] = -100
    for options in (
        {"softcap": 3.0},
        {"class_weight": class_weight, "token_weight": token_weight - 0.3, "z_loss": 0.1},
        {"label_smoothing": 0.2},
        {"label_smoothing": 0.2, "class_weight": class_weight, "softcap": 3.0, "z_loss": 0.1},
        {"target_prob": soft, "z_loss": 0.1},
        {"extra_log_prob": extra, "softcap": 3.0},
        {"return_lse": True},
    ):
        for reduction in functional.REDUCTIONS:

            def compute(functions, latent, prior, weight, bias, target, options=options, reduction=reduction):
                target = index if "target_prob" in options else target
                if "extra_log_prob" in options:
                    prior = torch.cat([prior, prior[:, :2] ** 2], 1)
                given = latent, prior, weight, target, bias
                if functions is functional:
                    result = functional.mos_nll_loss(*given, reduction=reduction, **options)
                    return result if isinstance(result, tuple) else (result,)
                _, loss, lse = functions.nll_and_loss(*given, reduction=reduction, **options)
                return (loss,) if lse is None else (loss, lse)

            check(shard, compute)


def given_classes_and_scores():
    shard = VocabShard(V)
    index = torch.randint(V, (N, 6), generator=torch.Generator().manual_seed(9))
    index[:, 1], index[4, 2] = index[:, 0], -100
    for options in ({}, {"softcap": 3.0, "temperature": 0.7}, {"mixture_temperature": 0.6}):
        for columns in (index, index[:, 0]):
            check(
                shard,
                lambda functions, z, a, e, b, y, columns=columns, options=options: (
                    functions.mos_log_prob_at(z, a, e, columns, b, **options),
                ),
            )
    for softcap in (None, 3.0):

        def score(functions, z, a, e, b, y, cap=softcap):
            return functions.mos_score(z, a, e, y, b, softcap=cap)

        def score_of_one(functions, z, a, e, b, y, cap=softcap):
            return functions.mos_score(z[:, :1], a[:, :1], e, y, b, softcap=cap)

        for dtype in (torch.float64, torch.float32):  # the portable and the native kernels
            check(shard, score, dtype)
            check(shard, score_of_one, dtype)
        check(
            shard, lambda functions, z, a, e, b, y, cap=softcap: functions.mos_expert_log_prob(z, e, y, b, softcap=cap)
        )
    # a rank that has masked classes alone
    for dtype in (torch.float64, torch.float32):
        check(
            shard,
            lambda functions, z, a, e, b, y: (
                functions.mos_log_prob_at(z, a, e, y, b, mixture_temperature=0.6),
                functions.mos_score(z, a, e, y, b).entropy,
            ),
            dtype,
            masked=V // 2 + 1,
        )
    # that of the best class is somewhere on each rank
    latent, prior, weight, bias, _ = problem()
    best = functional.mos_predict(latent, prior, weight, bias)
    own = shard.rows(weight.detach()), shard.rows(bias.detach())
    assert shard.mos_score(latent, prior, own[0], best, own[1]).is_top1.all()
    assert not shard.mos_score(latent, prior, own[0], (best + 1) % V, own[1]).is_top1.any()


def heads_with_options():
    torch.manual_seed(1)
    hidden, target = torch.randn(7, 4, 12, requires_grad=True), torch.randint(V, (7, 4))
    whole = MoS(12, V, 5, 9, softcap=2.0)
    head = copy.deepcopy(whole)
    parallelize(head)
    for m in (head, whole):
        m.double()
    hidden = hidden.double()
    for call in (
        lambda m: m(hidden, target, label_smoothing=0.1).loss[None],
        lambda m: m(hidden, target, z_loss=0.1, class_weight=torch.linspace(0, 1, V)).loss[None],
        lambda m: m.log_prob_at(hidden, target),
        lambda m: m.score(hidden, target).entropy,
        lambda m: m.log_prob(hidden).exp(),
        lambda m: m.topk(hidden, 3).values,
    ):
        torch.testing.assert_close(call(head), call(whole), rtol=0, atol=1e-10)


def restricted_samples():
    """All ranks draw the same classes, and only those that may be drawn."""
    torch.manual_seed(2)
    head = MoS(6, 23, 3, 5, softcap=4.0)
    torch.nn.init.normal_(head.decoder.bias)
    hidden = torch.randn(6).expand(4_000, 6)
    log_p = head.log_prob(hidden[0])
    sharded = copy.deepcopy(head)
    parallelize(sharded)
    torch.manual_seed(torch.distributed.get_rank())
    for limits in ({"top_k": 3}, {"top_p": 0.5}, {"mixture_temperature": 0.5}, {"temperature": 0.5}):
        drawn = sharded.sample(hidden, **limits)
        everyone = [torch.empty_like(drawn) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, drawn)
        assert all(torch.equal(drawn, other) for other in everyone)
        if "top_k" in limits:
            expected = torch.zeros(23).scatter(0, log_p.topk(3).indices, log_p.topk(3).values.exp())
        elif "top_p" in limits:
            order = log_p.argsort(descending=True)
            kept = order[: int((log_p[order].exp().cumsum(0) < 0.5).sum()) + 1]
            expected = torch.zeros(23).scatter(0, kept, log_p[kept].exp())
        elif "mixture_temperature" in limits:
            expected = (log_p / 0.5).exp()
        else:
            index = torch.arange(23).expand(1, 23)
            expected = head.log_prob_at(hidden[:1], index, temperature=0.5)[0].exp()
        expected = expected / expected.sum()
        frequency = torch.bincount(drawn, minlength=23) / len(drawn)
        assert (frequency[expected == 0] == 0).all()
        spread = (expected * (1 - expected) / len(drawn)).sqrt()
        assert ((frequency - expected).abs() <= 5 * spread).all()


@pytest.mark.parametrize("function", [losses, given_classes_and_scores, heads_with_options, restricted_samples])
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_on_ranks(n_ranks, function):
    run_on_ranks(n_ranks, function)
