"""Cost of each option of the loss, relative to the plain mean loss: pytest benchmarks/test_options.py --benchmark-only.

All options take turns with the plain loss in one process. Each row's extra_info has the ratio of its time to that of
the plain loss, as median, minimum and maximum, the ratio expected from its products, and the memory besides the inputs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_mos import functional as F

from .harness import Shape, clear, inputs, interleaved, memory, spread
from .test_head import DEVICE, N_ROUNDS, SHAPES, STEP

PLAIN = "mean loss"
BUDGET = 20.0
"""Seconds of a shape after which no more rounds start, once there are two."""


class Option(NamedTuple):
    compute: Callable[..., Tensor]  # (latent, prior_logits, weight, target, bias) -> a number to differentiate
    products: int  # with gradients; a mean takes 3


def _loss(**options: Any) -> Callable[..., Tensor]:
    return lambda *x: F.mos_nll_loss(*x, **options)


def _with_lse(z: Tensor, a: Tensor, e: Tensor, y: Tensor, b: Tensor, through_lse: bool) -> Tensor:
    loss, lse = F.mos_nll_loss(z, a, e, y, b, return_lse=True)
    return loss + 1e-4 * lse.square().mean() if through_lse else loss


def _external(z: Tensor, a: Tensor, e: Tensor, y: Tensor, b: Tensor) -> Tensor:
    prior = torch.cat([a, a[:, :1]], 1)
    return F.mos_nll_loss(z, prior, e, y, b, extra_log_prob=torch.full_like(a[:, :1], -3.0).detach())


def _soft(z: Tensor, a: Tensor, e: Tensor, y: Tensor, b: Tensor) -> Tensor:
    index = (y[:, None] + torch.arange(16, device=y.device)) % e.shape[0]
    return F.mos_nll_loss(z, a, e, index, b, target_prob=torch.full(index.shape, 1 / 16, device=y.device))


def _score(z: Tensor, a: Tensor, e: Tensor, y: Tensor, b: Tensor) -> Tensor:
    score = F.mos_score(z, a, e, y, b)
    return 0.01 * score.entropy.mean() - score.log_prob.mean()


def options(n_experts: int, n_tokens: int, n_classes: int) -> dict[str, Option]:
    classes = torch.rand(n_classes, device=DEVICE)
    tokens = torch.rand(n_tokens, device=DEVICE)
    smoothing, score = (3, 4) if n_experts == 1 else (5, 5)
    return {
        PLAIN: Option(_loss(), 3),
        "each token's loss": Option(lambda *x: F.mos_nll_loss(*x, reduction="none").mean(), 4),
        "softcap": Option(_loss(softcap=30.0), 3),
        "class_weight": Option(_loss(class_weight=classes), 3),
        "token_weight": Option(_loss(token_weight=tokens), 3),
        "z_loss": Option(_loss(z_loss=1e-4), 3),
        "label_smoothing": Option(_loss(label_smoothing=0.1), smoothing),
        "return_lse": Option(functools.partial(_with_lse, through_lse=False), 3),
        "return_lse, gradient through it": Option(functools.partial(_with_lse, through_lse=True), 6),
        "target_prob, 16 classes": Option(_soft, 4),
        "extra_log_prob": Option(_external, 4),
        "mos_log_prob_at": Option(lambda z, a, e, y, b: -F.mos_log_prob_at(z, a, e, y, b).mean(), 4),
        "mos_score": Option(_score, score),
    }


@functools.lru_cache(maxsize=1)
def measure(shape: Shape) -> tuple[dict[str, list[float]], dict[str, Callable[[], object]], list[Tensor]]:
    """Seconds of each option's steps, the steps, and their shared arguments."""
    arguments = inputs(*shape, device=DEVICE)

    def step(option: Option) -> None:
        clear(arguments)
        option.compute(*arguments).backward()

    n, k, _, v = shape
    calls = {name: functools.partial(step, option) for name, option in options(k, n, v).items()}
    return interleaved(calls, N_ROUNDS, DEVICE == "cuda", budget=BUDGET), calls, arguments


@pytest.mark.parametrize("name", options(2, 1, 1))
@pytest.mark.parametrize("shape", ["ptb", "softmax"])
def test_options(benchmark, shape, name):
    times, calls, arguments = measure(SHAPES[shape])
    n, k, _, v = SHAPES[shape]
    ratios = [its / plain for its, plain in zip(times[name], times[PLAIN])]
    benchmark.group = f"options, {shape}: N, K, D, V = {SHAPES[shape]}"
    benchmark.extra_info |= {
        "figure": "options",
        "case": shape,
        "operation": STEP,
        "dtype": "float32",
        "shape": SHAPES[shape],
        "contender": name,
        "times the mean loss": spread(ratios, 3),
        "by products": round(options(k, n, v)[name].products / 3, 3),
    }
    benchmark.extra_info |= memory(lambda: benchmark.pedantic(calls[name], rounds=1), arguments)
