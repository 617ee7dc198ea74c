"""Time text generation by the paper's models in words per second, with our head and with a head in plain PyTorch.

The models differ only in the head and run in float32; their weights are random. The plain head computes the whole
mixture for each word, as the published code does, and draws from it.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_mos.lm import AWDLSTM
from fused_mos.lm.generate import generate
from fused_mos.training.config import RECIPES

from .harness import interleaved, spread
from .peers import published_probabilities
from .tables import OURS
from .test_training import DEVICE, RECIPE_WORDS

COLUMNS = (1, 8)
"""Texts that are generated at once."""
TOP_P = {"all words": 1.0, "top_p = 0.9": 0.9}
CONTENDERS = (OURS, "plain PyTorch")
N_WORDS = 20
"""Words of each text in a round. The first of them reads the prompt, a single word."""
N_ROUNDS = 7


def _plain_words(model: AWDLSTM, columns: int, top_p: float) -> None:
    """Generate with the whole distribution of each word, truncated by sorting it."""
    tokens, hidden = torch.zeros(1, columns, dtype=torch.long, device=DEVICE), None
    decoder = model.head.decoder
    for _ in range(N_WORDS):
        _, features, hidden = model.features(tokens, hidden)
        latent, prior_logits = model.head.mixture(features[-1])
        tokens = _draw(published_probabilities(latent, prior_logits, decoder.weight, decoder.bias), top_p)[None]


def _draw(probability: Tensor, top_p: float) -> Tensor:
    if top_p == 1:
        return torch.multinomial(probability, 1)[:, 0]
    ordered, words = probability.sort(descending=True)
    kept = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 0)
    return words.gather(1, torch.multinomial(kept, 1))[:, 0]


def _our_words(model: AWDLSTM, columns: int, top_p: float) -> None:
    for _ in generate(model, torch.zeros(1, columns, dtype=torch.long, device=DEVICE), N_WORDS, top_p=top_p):
        pass


@functools.lru_cache(maxsize=1)
def _model(recipe: str) -> AWDLSTM:
    torch.manual_seed(0)
    return AWDLSTM(RECIPE_WORDS[recipe], **vars(RECIPES[recipe]().model)).to(DEVICE).eval()


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def measure(recipe: str, columns: int, operation: str) -> dict[str, dict]:
    model, top_p = _model(recipe), TOP_P[operation]
    words: dict[str, Callable[[AWDLSTM, int, float], None]] = dict(zip(CONTENDERS, (_our_words, _plain_words)))
    calls = {name: functools.partial(call, model, columns, top_p) for name, call in words.items()}
    times = interleaved(calls, N_ROUNDS, DEVICE.type == "cuda")
    return {
        name: {
            "words a second": spread((columns * N_WORDS / t for t in values), 1),
            "times ours": spread((theirs / ours for theirs, ours in zip(values, times[OURS])), 3),
        }
        for name, values in times.items()
    }


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("operation", TOP_P)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("recipe", RECIPE_WORDS)
def test_generation(benchmark, recipe, columns, operation, name):
    texts = "one text" if columns == 1 else f"{columns} texts"
    benchmark.extra_info |= {
        "figure": "generation",
        "case": f"{recipe}, {texts}",
        "operation": operation,
        "dtype": "float32",
        "contender": name,
    } | measure(recipe, columns, operation)[name]
    benchmark.group = f"{recipe}: {texts}, {operation}"
    benchmark.pedantic(lambda: None)  # measured in turns
