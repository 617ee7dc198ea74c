"""Drawing words: each way follows the distribution that it documents."""

import math

import pytest
import torch

from fused_mos.lm import AWDLSTM
from fused_mos.lm.generate import generate, next_word

V, DRAWS = 30, 20_000


def make():
    torch.manual_seed(0)
    model = AWDLSTM(V, 6, (9, 8), "mos", 3).eval()
    torch.nn.init.normal_(model.head.decoder.bias)
    torch.nn.init.normal_(model.encoder.weight)
    return model


def _expected(model, features, temperature, top_k, top_p):
    """The distribution of one row, from the mixture's probabilities and by plain loops."""
    probability = (model.head.log_prob(features[None])[0].double() / temperature).softmax(-1)
    order = probability.argsort(descending=True).tolist()
    kept = order[: top_k or V]
    total, nucleus, reached = sum(probability[word].item() for word in kept), [], 0.0
    for word in kept:
        if reached >= top_p * total:
            break
        nucleus.append(word)
        reached += probability[word].item()
    result = torch.zeros(V, dtype=torch.float64)
    result[nucleus] = probability[nucleus]
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.6), (0.8, 8, 0.7), (1.0, 99, 1.0)]
)
@torch.no_grad()
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """A chi-square statistic within 5 standard deviations, and no word outside of what is kept."""
    model, features = make(), torch.randn(8)
    expected = _expected(model, features, temperature, top_k, top_p)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "generator": torch.Generator().manual_seed(4),
    }
    counts = torch.bincount(next_word(model, features.expand(DRAWS, -1), **options), minlength=V)
    assert counts[expected == 0].sum() == 0
    wanted = expected[expected > 0] * DRAWS
    chi_square = ((counts[expected > 0] - wanted).square() / wanted).sum().item()
    freedom = max(len(wanted) - 1, 1)
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom + (1 / wanted).sum().item())


@torch.no_grad()
def test_the_smallest_nucleus_is_the_most_probable_word():
    """Also one that float32 rounds to 0."""
    model, features = make(), torch.randn(50, 8)
    best = model.head.predict(features)
    for options in ({"top_p": 1e-300}, {"top_p": 5e-324, "top_k": 4}, {"top_p": 1e-6}):
        assert torch.equal(next_word(model, features, **options), best)


def test_text_continues_with_what_was_drawn():
    """With one word kept each word is the most probable after all before it."""
    model, prompt = make(), torch.randint(0, V, (4, 2))
    words = torch.stack(list(generate(model, prompt, 6, top_k=1)))
    text = torch.cat([prompt, words])
    with torch.no_grad():
        assert torch.equal(model.log_prob(text[:-1])[3:].argmax(-1), words)
