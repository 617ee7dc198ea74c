"""Time a training step of the paper's recipes in words per second, with our head and with the published code's head in
plain PyTorch.

The models differ only in the head and run in float32. The words are random: the time of a step does not depend on them.
(experiments/published.py runs the published code itself.)
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch

from fused_mos.lm import AWDLSTM
from fused_mos.training.config import RECIPES

from .harness import interleaved, lacking, memory, spread
from .peers import materialised, published
from .tables import OURS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE_WORDS = {"ptb": 10_000, "wikitext2": 33_278}
CONTENDERS = (OURS, "published head")
N_ROUNDS = {"cpu": 3, "cuda": 20}[DEVICE.type]
BUDGET = 15.0
"""Seconds after which no more rounds start, once there are two."""


class Step(NamedTuple):
    run: Callable[[], None]
    part: Callable[[], None]  # has the same peak memory as a step, which takes up to half a minute on a CPU
    parameters: list[torch.Tensor]
    n_words: int


def _step(recipe: str, contender: str) -> Step:
    """A step of forward, backward, clipping and SGD, in micro-batches of columns like the recipe's."""
    config, n_words = RECIPES[recipe](), RECIPE_WORDS[recipe]
    torch.manual_seed(0)
    model = AWDLSTM(n_words, **vars(config.model)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, n_words, (config.optim.bptt + 1, config.optim.batch_size), device=DEVICE)
    parts = tokens.split(config.optim.batch_size // config.optim.micro_batches, 1)

    def loss(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if contender == OURS:
            return model(inputs, target).loss
        latent, prior_logits = (x.flatten(0, 1) for x in model.head.mixture(model.features(inputs)[1]))
        return published(latent, prior_logits, model.head.decoder.weight, target.flatten(), model.head.decoder.bias)

    def run(parts: Sequence[torch.Tensor] = parts) -> None:
        optimizer.zero_grad()
        for part in parts:
            (loss(part[:-1], part[1:]) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()

    return Step(run, functools.partial(run, parts[:1]), list(model.parameters()), tokens[1:].numel())


def _needed(recipe: str) -> int:
    """Bytes of the distributions that the published code's head holds."""
    config = RECIPES[recipe]()
    columns = config.optim.batch_size // config.optim.micro_batches
    return (
        materialised("published code", DEVICE.type)
        * 4
        * columns
        * config.optim.bptt
        * config.model.n_experts
        * RECIPE_WORDS[recipe]
    )


@functools.lru_cache(maxsize=1)
def measure(recipe: str) -> tuple[dict[str, dict], dict[str, Step]]:
    steps, rows = {}, {}
    for name in CONTENDERS:
        if name != OURS and (failure := lacking(_needed(recipe), DEVICE.type)):
            rows[name] = {"failed": failure}
        else:
            steps[name] = _step(recipe, name)
            steps[name].part()
    times = interleaved(
        {name: step.run for name, step in steps.items()},
        N_ROUNDS,
        DEVICE.type == "cuda",
        warm_up=DEVICE.type == "cuda",
        budget=BUDGET,
    )
    for name, values in times.items():
        rows[name] = {
            "words a second": spread((steps[name].n_words / t for t in values), 1),
            "times ours": spread((theirs / ours for theirs, ours in zip(values, times[OURS])), 3),
            "rounds": len(values),
        }
    return rows, steps


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("recipe", RECIPE_WORDS)
def test_training(benchmark, recipe, name):
    rows, steps = measure(recipe)
    row = rows[name]
    benchmark.extra_info |= {
        "figure": "training",
        "case": recipe,
        "operation": "training step",
        "dtype": "float32",
        "contender": name,
    } | row
    benchmark.group = f"{recipe}: a training step"
    if "failed" in row:
        benchmark.pedantic(lambda: None)
        return
    benchmark.extra_info |= memory(lambda: benchmark.pedantic(steps[name].part, rounds=1), steps[name].parameters)
