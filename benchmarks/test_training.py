"""A training step of the `ptb-small` recipe, in words a second: `auto` against `reference` and against plain PyTorch.

The words are random: the time of a step does not depend on them. All three share everything but the head.
"""

import dataclasses
import statistics

import pytest
import torch
from harness import interleaved

from fused_mos.lm import AWDLSTM
from fused_mos.training.config import RECIPES

N_WORDS = 10_000  # Penn Treebank's vocabulary
ROUNDS = 10


def _published_head(head: torch.nn.Module, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mixture as the paper's published code computes it: K distributions over the vocabulary, then their mean."""
    latent, prior_logits = (x.flatten(0, 1) for x in head.mixture(hidden))
    logits = torch.nn.functional.linear(latent, head.decoder.weight, head.decoder.bias)
    prior = torch.softmax(prior_logits, -1)
    probability = (torch.softmax(logits, -1) * prior[..., None]).sum(1)
    return torch.nn.functional.nll_loss(torch.log(probability + 1e-8), target.flatten())


def _step(backend: str):
    """One step of the recipe: forward, backward, clipping and SGD."""
    config = RECIPES["ptb-small"]()
    torch.manual_seed(0)
    options = dataclasses.asdict(config.model) | {"backend": "auto" if backend == "plain PyTorch" else backend}
    model = AWDLSTM(N_WORDS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, N_WORDS, (config.optim.bptt + 1, config.optim.batch_size))
    inputs, target = tokens[:-1], tokens[1:]

    def step():
        optimizer.zero_grad()
        if backend == "plain PyTorch":
            loss = _published_head(model.head, model.features(inputs)[1], target)
        else:
            loss = model(inputs, target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()

    return step, inputs.numel()


@pytest.fixture(scope="module")
def times():
    names = ("auto", "reference", "plain PyTorch")
    return interleaved({name: _step(name)[0] for name in names}, ROUNDS)


@pytest.mark.parametrize("name", ["auto", "reference", "plain PyTorch"])
def test_ptb_small(benchmark, times, name):
    step, n_words = _step(name)
    rates = [n_words / value for value in times[name]]
    ratios = [theirs / ours for theirs, ours in zip(times[name], times["auto"])]
    benchmark.group = "ptb-small: a training step"
    benchmark.extra_info |= {
        "words per second (median, min, max)": [round(f(rates)) for f in (statistics.median, min, max)],
        "auto is faster (median, min, max)": [round(f(ratios), 2) for f in (statistics.median, min, max)],
    }
    print(f"\nptb-small {name:14} {statistics.median(rates):6,.0f} words/s; auto is {statistics.median(ratios):.2f} × as fast")
    benchmark.pedantic(step, rounds=1)
