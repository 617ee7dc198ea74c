"""Analyses the experts of a run's model over a text: statistics and, with `experts_page`, a plot and coloured text."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import batchify, segment
from ..data.word_kinds import KINDS, kinds_of
from ..lm.experts import ExpertShares, expert_shares, nearest_words
from ..runtime import files
from ..runtime.progress import bar
from ..runtime.text import printable
from .errors import ConfigError
from .experts_page import page, plot_experts
from .run import Run

WORDS_IN_PLOT = 48
LISTED_WORDS = 12
"""Number of words listed for each expert, and of neighbours for each word."""
RARE = 10
"""Words that occur less often than this are never listed as characteristic of an expert."""


class Reading(NamedTuple):
    """A text of n words, and the experts' shares in each of its predictions."""

    tokens: Tensor  # (n,)
    shares: ExpertShares  # prior and responsibility (n, K), log_likelihood (n,)


def inspect_run(run: Run, split: str, n_words: int, nearest: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a split, writes the folder RUN/experts, and returns the content of its experts.json. Raises ConfigError."""
    if run.config.model.head != "mos":
        raise ConfigError(f"head must be mos, the only one whose experts predict words, got {run.config.model.head}")
    index = run.vocabulary.index
    if unknown := [word for word in nearest if word not in index]:
        raise ConfigError(f"nearest: {unknown[0]!r} is not one of the model's {len(index):,} words")
    reading = read(run, run.text(split))
    report = summary(run, reading, nearest)
    folder, title = run.folder / "experts", f"{run.folder.name}, {split}"
    words = [run.vocabulary.words[i] for i in reading.tokens[: max(n_words, WORDS_IN_PLOT)]]
    labels = [printable(word) for word in words[:WORDS_IN_PLOT]]  # matplotlib warns of other characters
    with files.FolderLock(folder, wait=True):  # two processes at once would mix their files
        plot_experts(reading.shares, labels, folder / "experts.png")
        files.write_json(folder / "experts.json", {"split": split, **report})
        files.write_text(folder / "index.html", page(reading.shares, words[:n_words], report, title))
    return report


@torch.no_grad()
def read(run: Run, tokens: Tensor) -> Reading:
    """Returns the experts' shares in every word of `tokens` (n + 1,) after the first."""
    source, bptt = batchify(tokens, 1).to(run.device), run.config.optim.bptt
    hidden, parts, rows = run.model.initial_hidden(1), [], source.shape[0] - 1
    with bar(desc="read", total=rows, unit="words", leave=False) as shown:
        for start in range(0, rows, bptt):
            inputs, targets = segment(source, start, bptt)
            _, features, hidden = run.model.features(inputs, hidden)
            parts.append([part.squeeze(1).cpu() for part in expert_shares(run.model.head, features, targets)])
            shown.update(inputs.shape[0])
    return Reading(source[1:, 0].cpu(), ExpertShares(*(torch.cat(part) for part in zip(*parts))))


def summary(run: Run, reading: Reading, nearest: tuple[str, ...]) -> dict[str, Any]:
    """Returns the experts' mean shares, the words that each predicts most, the words in which its share is largest, the
    shares of function words, content words and others, and nearest neighbours of words."""
    tokens, (prior, responsibility, log_likelihood) = reading
    words, n_words = run.vocabulary.words, len(run.vocabulary)
    spoken = torch.zeros(n_words, prior.shape[1], dtype=torch.float64).index_add_(0, tokens, responsibility.double())
    count = torch.bincount(tokens, minlength=n_words)
    share = torch.where(count[:, None] >= RARE, spoken / count[:, None], -1.0)
    listed = min(LISTED_WORDS, n_words)
    kinds = kinds_of(words)
    of_kinds = torch.zeros(len(KINDS), prior.shape[1], dtype=torch.float64).index_add_(0, kinds, spoken)
    of_kinds /= spoken.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    of_text = torch.bincount(kinds[tokens], minlength=len(KINDS)) / tokens.numel()
    content = torch.where(kinds[:, None] == KINDS.index("content"), spoken, -1.0)
    experts = [
        {
            "prior": prior[:, k].mean().item(),
            "responsibility": responsibility[:, k].mean().item(),
            "kinds": dict(zip(KINDS, of_kinds[:, k].tolist())),
            "frequent": [words[i] for i in spoken[:, k].topk(listed).indices],
            "frequent_content": [words[i] for i in content[:, k].topk(listed).indices if content[i, k] > 0],
            "characteristic": [words[i] for i in share[:, k].topk(listed).indices if count[i] >= RARE],
        }
        for k in range(prior.shape[1])
    ]
    if not nearest:
        by_count = count.argsort(descending=True, stable=True).tolist()
        nearest = tuple([words[i] for i in by_count if len(words[i]) > 3 and words[i].isalpha()][:LISTED_WORDS])
    chosen = torch.tensor([run.vocabulary.index[word] for word in nearest], dtype=torch.int64, device=run.device)
    _, neighbours = nearest_words(run.model.encoder.weight.detach(), chosen, LISTED_WORDS)
    return {
        "ppl": math.exp(-log_likelihood.double().mean().item()),
        "effective_experts": torch.special.entr(responsibility).sum(-1).exp().mean().item(),
        "kinds": dict(zip(KINDS, of_text.tolist())),
        "experts": experts,
        "nearest": {word: [words[i] for i in row] for word, row in zip(nearest, neighbours.tolist())},
    }
