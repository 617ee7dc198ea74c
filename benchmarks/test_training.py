"""A training step of the paper's recipes, in words a second, beside the same model with the published code's head in plain PyTorch.

The words are random: the time of a step does not depend on them. Both share everything but the head; float32. (published.py runs the
published code itself.)
"""

import functools
from collections.abc import Callable

import pytest
import torch
from harness import available_bytes, interleaved, spread
from peers import materialised, published

from fused_mos.lm import AWDLSTM
from fused_mos.training.config import RECIPES
from fused_mos.training.device import peak_memory_mib

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE_WORDS = {"ptb": 10_000, "wikitext2": 33_278}
CONTENDERS = ("fused_mos", "published head")
N_ROUNDS = {"cpu": 3, "cuda": 20}[DEVICE.type]
BUDGET = 15.0
"""Seconds after which there are no more rounds than two."""


def _step(recipe: str, contender: str) -> tuple[Callable[[], None], int]:
    """Forward, backward, clipping and SGD, in parts of columns as the recipe has it; and its words."""
    config, n_words = RECIPES[recipe](), RECIPE_WORDS[recipe]
    torch.manual_seed(0)
    model = AWDLSTM(n_words, **vars(config.model)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, n_words, (config.optim.bptt + 1, config.optim.batch_size), device=DEVICE)
    parts = tokens.split(config.optim.small_batch_size or config.optim.batch_size, 1)

    def loss(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if contender == "fused_mos":
            return model(inputs, target).loss
        latent, prior_logits = (x.flatten(0, 1) for x in model.head.mixture(model.features(inputs)[1]))
        return published(latent, prior_logits, model.head.decoder.weight, target.flatten(), model.head.decoder.bias)

    def step() -> None:
        optimizer.zero_grad()
        for part in parts:
            (loss(part[:-1], part[1:]) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()

    return step, tokens[1:].numel()


def _needed(recipe: str) -> int:
    """Bytes of the distributions that the published head holds."""
    config = RECIPES[recipe]()
    columns = config.optim.small_batch_size or config.optim.batch_size
    return materialised("published code") * 4 * columns * config.optim.bptt * config.model.n_experts * RECIPE_WORDS[recipe]


@functools.lru_cache(maxsize=1)
def measure(recipe: str) -> tuple[dict[str, dict], dict[str, Callable[[], None]]]:
    calls, words = {}, 0
    for name in CONTENDERS:
        if name == "fused_mos" or _needed(recipe) < available_bytes(DEVICE.type):
            calls[name], words = _step(recipe, name)
    times = interleaved(calls, N_ROUNDS, DEVICE.type == "cuda", warm_up=DEVICE.type == "cuda", budget=BUDGET)
    rows = {
        name: {
            "words a second": spread((words / t for t in values), 1),
            "times ours": spread((theirs / ours for theirs, ours in zip(values, times["fused_mos"])), 3),
            "rounds": len(values),
        }
        for name, values in times.items()
    }
    failure = {"failed": f"needs {_needed(recipe) / 2**30:.1f} GiB, {available_bytes(DEVICE.type) / 2**30:.1f} are free"}
    return {name: rows.get(name, failure) for name in CONTENDERS}, calls


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("recipe", RECIPE_WORDS)
def test_training(benchmark, recipe, name):
    rows, calls = measure(recipe)
    row = rows[name]
    benchmark.extra_info |= {"figure": "training", "case": recipe, "operation": "training step", "dtype": "float32", "contender": name} | row
    benchmark.group = f"{recipe}: a training step"
    if "failed" in row:
        print(f"\n{recipe:10} {name:16} {row['failed']}")
        benchmark.pedantic(lambda: None)
        return
    median, least, most = row["times ours"]
    print(f"\n{recipe:10} {name:16} {row['words a second'][0]:8,.0f} words/s, a step {median:.2f} × as long as ours ({least:.2f}–{most:.2f})")
    benchmark.pedantic(calls[name], rounds=1)
    benchmark.extra_info["process peak MiB"] = round(peak_memory_mib(DEVICE))
