"""Text from a language model, one word at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .awd_lstm import AWDLSTM


def next_word(
    model: AWDLSTM,
    features: Tensor,  # (B, width), the last layer's output
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """Draw the next word of each row.

    Without truncation, an expert is drawn from the prior and then a word from that expert alone, at the cost of one
    softmax. `temperature` divides that expert's logits. With `top_k` or `top_p`, `temperature` divides the mixture's
    log-probabilities. The `top_k` most probable words are kept, and of these the fewest whose probabilities reach
    `top_p` (nucleus sampling, Holtzman et al. 2020).
    """
    if not top_k and top_p >= 1:
        return model.head.sample(features, temperature=temperature, generator=generator)
    most = min(top_k, model.head.n_classes) or None
    return model.head.sample(features, generator=generator, mixture_temperature=temperature, top_k=most, top_p=top_p)


@torch.no_grad()
def generate(
    model: AWDLSTM, prompt: Tensor, n_words: int, generator: torch.Generator | None = None, **options
) -> Iterator[Tensor]:
    """Yield the next word of each column, (B,), n_words times after prompt (T, B), T ≥ 1. `options` are those of
    `next_word`."""
    model.eval()
    tokens, hidden = prompt, None
    for _ in range(n_words):
        _, features, hidden = model.features(tokens, hidden)
        word = next_word(model, features[-1], generator=generator, **options)
        yield word
        tokens = word[None]
