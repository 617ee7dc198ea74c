"""Evaluation of a run with a continuous cache (lm/cache.py), and the search for its hyperparameters."""

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
"""Grid of the search, which adds the user's values. λ = 0 is the model alone. The published runs have θ ≤ 1; narrow
layers have short vectors and need a larger θ."""


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """Hyperparameters of the cache. AWD-LSTM's published runs use a window of 500, theta 1.0 and lambdasm 0.1 on Penn
    Treebank, and 3785, 0.6625523432485668 and 0.12785920428335693 on WikiText-2."""

    window: int = setting(2000, SIZE)
    """Number of words in the cache (pointer window length)."""
    theta: float = setting(0.3, NOT_NEGATIVE)
    """Sharpness of the cache's softmax over previous words (θ); 0 gives their relative frequencies."""
    lambdasm: float = setting(0.1, SHARE)
    """Weight of the cache in the mixture with the model (λ); 0 is the model alone."""


class Reading(NamedTuple):
    """Log-likelihoods of a text under the model and the cache, 8·(1 + number of thetas) bytes a word."""

    model: Tensor  # (N,) float64, log p_model of each word after the first
    cache: Tensor  # (θ, N) float64, log p_cache

    def loss(self, theta_index: int, lambdasm: float) -> float:
        """Mean NLL of the mixture, in nats."""
        return -interpolated(self.model, self.cache[theta_index], lambdasm).mean().item()


@torch.no_grad()
def read(run: Run, split: str, window: int, thetas: Sequence[float], context: int = 0) -> Reading:
    """Reads a split once for all thetas, as a single column like the published pointer.py.

    The cache's keys are the last LSTM layer's output before dropout (`rnn_outs[-1]` in pointer.py), whatever the head.
    `context` is the segment length in words; 0 takes the run's bptt.
    """
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
    """Returns the rule with the lowest loss on the validation text. It searches theta and lambdasm on a grid that
    includes those of `start`, and keeps the window.

    The model reads the text once. This takes 8·(1 + number of thetas) bytes of memory a word, 136 for the 16 thetas of
    the grid."""
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
    """Returns the record for evaluation.json. With `tuned`, theta and lambdasm are first searched on the validation
    text. `context` is the segment length in words; 0 takes the run's bptt."""
    run.text(split)  # fails here, before the search, if the text is missing
    if tuned:
        rule = tune(run, rule, context)
    reading = read(run, split, rule.window, [rule.theta], context)
    loss, rows = reading.loss(0, rule.lambdasm), reading.model.numel()
    record = {"split": split, "dynamic": False, "cache": True, **dataclasses.asdict(rule), "tuned": tuned}
    record["eval_context"] = context or run.config.optim.bptt
    # pointer.py divides by one row too many, too
    return record | {"loss": loss, "ppl": perplexity(loss), "ppl_published": perplexity(loss * rows / (rows + 1))}
