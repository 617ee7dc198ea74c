"""torch.utils.flop_counter counts the FLOPs of the fused ops."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_mos
from fused_mos import functional as F
from fused_mos._flops import FORMULAS

N, K, D, V = 6, 3, 5, 11
PRODUCT = 2 * N * K * D * V


def inputs(**needed):
    shapes = {"latent": (N, K, D), "prior": (N, K), "weight": (V, D), "bias": (V,)}
    return [torch.randn(shape, requires_grad=needed.get(name, True)) for name, shape in shapes.items()]


def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("needed", "mean", "none"),
    [
        ({}, 3, 4),
        ({"weight": False}, 2, 3),
        ({"latent": False}, 2, 3),
        ({"latent": False, "weight": False, "bias": False}, 1, 1),
    ],
    ids=str,
)
def test_losses(needed, mean, none):
    latent, prior, weight, bias = inputs(**needed)
    target = torch.randint(V, (N,))
    for reduction, products in (("mean", mean), ("none", none)):

        def step(reduction=reduction):
            F.mos_nll_loss(latent, prior, weight, target, bias, reduction=reduction, backend="tiled").sum().backward()

        assert counted(step) == products * PRODUCT


def test_what_the_formulas_promise():
    latent, prior, weight, bias = inputs()
    target = torch.randint(V, (N,))
    ops = torch.ops.fused_mos
    loss = (latent, prior, weight, bias, target, -100, 0.0)
    needs = [True, True, True, True]
    statistics = [torch.zeros(N, K)] * 3
    with torch.no_grad():
        assert counted(lambda: ops.nll(*loss, "tiled")) == PRODUCT
        assert counted(lambda: ops.nll_with_gradients(*loss, True, needs, "tiled")) == 3 * PRODUCT
        assert counted(lambda: ops.nll_with_gradients(*loss, True, [False] * 4, "tiled")) == PRODUCT
        backward = lambda needs: ops.nll_backward(
            torch.ones(N), latent, prior, weight, bias, target, *statistics, -100, 0.0, needs, "tiled"
        )
        assert counted(lambda: backward(needs)) == 3 * PRODUCT
        assert counted(lambda: backward([False, True, False, False])) == 0
        assert counted(lambda: backward([False, False, False, True])) == PRODUCT
    assert counted(lambda: F.mos_logsumexp(latent, weight, bias, backend="tiled").sum().backward()) == 4 * PRODUCT
    assert counted(lambda: F.mos_log_prob(latent, prior, weight, bias, backend="tiled").sum().backward()) == 6 * PRODUCT


def test_generation():
    latent, prior, weight, bias = inputs()
    assert counted(lambda: F.mos_predict(latent, prior, weight, bias, backend="tiled")) == 2 * PRODUCT
    assert counted(lambda: F.mos_topk(latent, prior, weight, bias, k=3, backend="tiled")) == 2 * PRODUCT
    assert counted(lambda: F.mos_sample(latent, prior, weight, bias, backend="tiled")) == PRODUCT // K


def test_in_one_sweep_where_the_backend_can():
    """The CPU kernels find the normalisers and the mixture in one product, where a block's exponentials fit."""
    cpu_one_sweep = pytest.importorskip("fused_mos._backends.cpu_one_sweep")
    inputs_ = inputs()
    functions = F.mos_log_prob, F.mos_predict, lambda *given, **options: F.mos_topk(*given, k=3, **options)
    with torch.no_grad():
        for function in functions:
            assert counted(lambda f=function: f(*inputs_, backend="cpu")) == PRODUCT
    assert counted(lambda: F.mos_log_prob(*inputs_, backend="cpu").sum().backward()) == 5 * PRODUCT
    assert cpu_one_sweep.one_sweep_pays(210, 15, 10_000, 280) and cpu_one_sweep.one_sweep_pays(1, 7, 793_471, 1_024)
    assert not cpu_one_sweep.one_sweep_pays(2_560, 7, 793_471, 1_024)


def test_every_op_of_products_has_a_formula():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_mos::")}
    assert names - {"scaled"} == set(FORMULAS)


@pytest.mark.parametrize("first", ["fused_mos", "torch.utils.flop_counter"])
def test_in_either_order_of_imports(first):
    """The counter, which would bring triton, is not imported by the package."""
    second = ({"fused_mos", "torch.utils.flop_counter"} - {first}).pop()
    program = f"""
import sys, {first}
assert {first!r} != "fused_mos" or "torch.utils.flop_counter" not in sys.modules
import {second}, torch
head = fused_mos.MoS(4, 10, 3, 5, backend="tiled")
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    head(torch.randn(6, 4), torch.arange(6)).loss.backward()
counts = counter.get_flop_counts()["Global"]
assert any("fused_mos" in str(op) for op in counts), counts
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_head_is_counted_by_its_name():
    head = fused_mos.MoS(4, V, K, D, backend="tiled")
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(N, 4), torch.randint(V, (N,))).loss.backward()
    counts = counter.get_flop_counts()
    assert counts["MoS"] and sum(counts["MoS"].values()) >= 3 * PRODUCT


def test_latent_vectors_of_low_rank_are_counted_as_their_two_products():
    h, width, rank = torch.randn(N, 4), 4, 2
    whole, products = fused_mos.MoS(width, V, K, D), fused_mos.MoS(width, V, K, D, rank=rank, latent_norm=True)
    with torch.no_grad():
        assert counted(lambda: whole.latent(h)) == 2 * N * K * width * D
        assert counted(lambda: products.latent(h)) == 2 * N * K * rank * (width + D)
