"""Evaluation of a run with a continuous cache (lm/cache.py), and the search for its numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import batchify, segment
from ..lm.awd_lstm import carry_on
from ..lm.cache import ContinuousCache, interpolated
from ..runtime.progress import bar, say
from .metrics import perplexity
from .run import Run
from .settings import NOT_NEGATIVE, SHARE, SIZE, setting

THETAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)
LAMBDAS = (0.0, 0.01, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""The grid of the search, to which the numbers given are added. λ = 0 is the model alone. The published runs have a θ
of 1 or less; narrow layers, whose vectors are short, want one of several."""


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """How a cache predicts. In AWD-LSTM's published runs 500, 1.0 and 0.1 on Penn Treebank, 3785, 0.6625523432485668
    and 0.12785920428335693 on WikiText-2."""

    window: int = setting(2000, SIZE)
    """Words that the cache holds (pointer window length)."""
    theta: float = setting(0.3, NOT_NEGATIVE)
    """Sharpness of the cache's softmax over the previous words (θ); 0: their relative frequencies."""
    lambdasm: float = setting(0.1, SHARE)
    """Share of the cache in the mix (λ); 0: the model alone."""


class Reading(NamedTuple):
    """A text as model and cache predicted it: 8·(1 + number of thetas) bytes a word."""

    model: Tensor  # (N,) float64, log p_model of each word after the first
    cache: Tensor  # (θ, N) float64, log p_cache

    def loss(self, theta_index: int, lambdasm: float) -> float:
        """Mean NLL in nats of the mix."""
        return -interpolated(self.model, self.cache[theta_index], lambdasm).mean().item()


@torch.no_grad()
def read(run: Run, split: str, window: int, thetas: Sequence[float], context: int = 0) -> Reading:
    """Reads a split once, for all thetas, in one column as pointer.py does. The keys of the cache are the last LSTM
    layer's output before dropout, its `rnn_outs[-1]`, whatever the head. `context` is the words of a segment; 0: the
    run's bptt."""
    source, context = batchify(run.text(split), 1).to(run.device), context or run.config.optim.bptt
    rows, hidden = source.shape[0] - 1, run.model.initial_hidden(1)
    cache = ContinuousCache(window, run.model.widths[-1], run.device)
    model_parts, cache_parts = [], []
    with bar(desc=f"{split} with cache", unit="words", total=rows, leave=False) as shown:
        for start in range(0, rows, context):
            inputs, targets = segment(source, start, context)  # (T, 1)
            output = run.model(inputs, targets, hidden)
            carry_on(hidden, output.hidden)
            model_parts.append(output.log_likelihood[:, 0].double())
            cache_parts.append(cache.log_likelihood(output.raw[:, 0], targets[:, 0], thetas))
            shown.update(inputs.shape[0])
    return Reading(torch.cat(model_parts), torch.cat(cache_parts, dim=1))


def tune(run: Run, start: CacheRule, context: int = 0) -> CacheRule:
    """The rule with the lowest loss on the validation text: theta and lambdasm from a grid that has those of `start`,
    its window as it is. The model reads the text once; what is kept of that is 8·(1 + thetas) bytes a word, 136 for
    the 16 thetas of the grid."""
    thetas, lambdas = sorted({*THETAS, start.theta}), sorted({*LAMBDAS, start.lambdasm})
    reading = read(run, "valid", start.window, thetas, context)
    losses = {(theta, lambdasm): reading.loss(i, lambdasm) for i, theta in enumerate(thetas) for lambdasm in lambdas}
    theta, lambdasm = min(losses, key=losses.__getitem__)
    best, alone = losses[theta, lambdasm], -reading.model.mean().item()
    say(
        f"valid: ppl {perplexity(best):.2f} with theta {theta:g} and lambdasm {lambdasm:g}, the best of {len(losses)} "
        f"pairs; {perplexity(alone):.2f} without the cache"
    )
    return dataclasses.replace(start, theta=theta, lambdasm=lambdasm)


def cache_evaluation(run: Run, split: str, rule: CacheRule, tuned: bool = False, context: int = 0) -> dict[str, Any]:
    """The record for evaluation.json. With `tuned`, theta and lambdasm are searched on the validation text first.
    `context` is the words of a segment; 0: the run's bptt."""
    run.text(split)  # one that is missing is better found before the search
    if tuned:
        rule = tune(run, rule, context)
    reading = read(run, split, rule.window, [rule.theta], context)
    loss, rows = reading.loss(0, rule.lambdasm), reading.model.numel()
    record = {"split": split, "dynamic": False, "cache": True, **dataclasses.asdict(rule), "tuned": tuned}
    record["eval_context"] = context or run.config.optim.bptt
    # pointer.py, too, divides by a row too many
    return record | {"loss": loss, "ppl": perplexity(loss), "ppl_published": perplexity(loss * rows / (rows + 1))}
