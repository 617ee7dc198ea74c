"""Evaluation of a text: its mean negative log-likelihood, and the records for evaluation.json."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import batchify, segment
from ..lm import AWDLSTM
from ..lm.awd_lstm import carry_on
from ..lm.dynamic_evaluation import DynamicRule
from ..runtime.progress import bar
from ..runtime.signals import CheckpointClock
from .dynamic_evaluation import DynamicRun
from .graphs import Recorder, Replayed
from .metrics import perplexity
from .run import Run


@torch.no_grad()
def evaluate(
    model: AWDLSTM,
    tokens: Tensor,  # (n,)
    batch_size: int,
    bptt: int,
    description: str = "evaluate",
    check: Callable[[], None] = lambda: None,
    recorder: Recorder | None = None,
) -> float:
    """Returns the mean NLL in nats over every predicted word of `tokens`.

    The text is read as `batch_size` columns in segments of `bptt`, and the hidden state is carried from segment to
    segment. The mean is exact: the paper's published code divides by one row more than it predicts, which lowers its
    perplexities by about 0.03 on Penn Treebank.

    Args:
        check: is called before each segment, and may raise to stop.
        recorder: replays the segments; all but the last have the same length.
    """
    model.eval()
    device = model.encoder.weight.device
    source = batchify(tokens, batch_size).to(device)
    hidden = model.initial_hidden(batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    rows = source.shape[0] - 1

    def add(inputs: Tensor, targets: Tensor) -> None:
        output = model(inputs, targets, hidden)
        carry_on(hidden, output.hidden)
        total.sub_(output.log_likelihood.sum(dtype=torch.float64))

    step = Replayed(add, recorder, bptt) if recorder else add
    with bar(desc=description, unit="words", total=rows * batch_size, leave=False) as shown:
        for start in range(0, rows, bptt):
            check()
            inputs, targets = segment(source, start, bptt)
            step(inputs, targets)
            shown.update(inputs.numel())
    return total.item() / (rows * batch_size)


def static_evaluation(run: Run, split: str, context: int = 0) -> dict[str, Any]:
    """Returns the record for evaluation.json. `context` is the segment length in words; 0 takes the run's bptt."""
    context = context or run.config.optim.bptt
    tokens, batch_size = run.text(split), getattr(run.config, f"{split}_batch_size")
    loss = evaluate(run.model, tokens, batch_size, context, split)
    rows = tokens.numel() // batch_size
    record = {"split": split, "dynamic": False, "eval_context": context}
    return record | _perplexities(loss, loss * (rows - 1) / rows)  # the published code divides by one row too many


def dynamic_evaluation(run: Run, split: str, rule: DynamicRule, tune: bool, clock: CheckpointClock) -> dict[str, Any]:
    """Returns the record for evaluation.json. With `tune`, first searches a better rule on the validation text, from
    `rule` on.

    Raises FolderInUse; Stopped or TimeLimitReached after saving everything; ConfigError if the model diverges under the
    rule.
    """
    dynamic = DynamicRun(run, clock)
    if tune:
        rule = dynamic.tune(rule)
    loss = dynamic.evaluate(run.text(split), rule, split)
    record = {"split": split, "dynamic": True, "rule": dataclasses.asdict(rule), "tuned": tune}
    return record | _perplexities(loss, loss)


def _perplexities(loss: float, published: float) -> dict[str, float]:
    return {"loss": loss, "ppl": perplexity(loss), "ppl_published": perplexity(published)}
