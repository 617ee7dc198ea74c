"""Analyses the experts of a run's model over a text: statistics, a plot, and an HTML page of coloured text."""

import html
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import batchify, segment
from ..lm.experts import ExpertShares, expert_shares, nearest_words
from ..runtime import files
from ..runtime.progress import bar
from ..runtime.text import printable
from .errors import ConfigError
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
    folder, words, title = run.folder / "experts", run.vocabulary.words, f"{run.folder.name}, {split}"
    labels = [printable(words[i]) for i in reading.tokens[:WORDS_IN_PLOT]]  # matplotlib warns of other characters
    with files.FolderLock(folder, wait=True):  # two processes at once would mix their files
        plot_experts(reading, labels, folder / "experts.png")
        files.write_json(folder / "experts.json", {"split": split, **report})
        files.write_text(folder / "index.html", page(reading, words, n_words, report, title))
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
    """Returns the experts' mean shares, the words that each predicts most, the words in which its share is largest, and
    nearest neighbours of words."""
    tokens, (prior, responsibility, log_likelihood) = reading
    words, n_words = run.vocabulary.words, len(run.vocabulary)
    spoken = torch.zeros(n_words, prior.shape[1], dtype=torch.float64).index_add_(0, tokens, responsibility.double())
    count = torch.bincount(tokens, minlength=n_words)
    share = torch.where(count[:, None] >= RARE, spoken / count[:, None], -1.0)
    listed = min(LISTED_WORDS, n_words)
    experts = [
        {
            "prior": prior[:, k].mean().item(),
            "responsibility": responsibility[:, k].mean().item(),
            "frequent": [words[i] for i in spoken[:, k].topk(listed).indices],
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
        "experts": experts,
        "nearest": {word: [words[i] for i in row] for word, row in zip(nearest, neighbours.tolist())},
    }


def plot_experts(reading: Reading, words: list[str], path: Path) -> None:
    """Plots each expert's prior and responsibility for the first words, and their means over the text, to a PNG."""
    from matplotlib.figure import Figure

    n, k = len(words), reading.shares.prior.shape[1]
    figure = Figure(figsize=(12, 2.2 + 0.28 * k), layout="constrained")
    (top, bars), (bottom, legend) = figure.subplots(2, 2, width_ratios=[5, 1])
    for axes, values, title in (
        (top, reading.shares.prior, "prior"),
        (bottom, reading.shares.responsibility, "responsibility for the word"),
    ):
        image = axes.imshow(
            values[:n].T.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
        )
        axes.set_title(title, fontsize="medium")
        axes.set_ylabel("expert")
        axes.set_yticks(range(k), range(1, k + 1), fontsize="small")
        axes.set_xticks(range(n), words if axes is bottom else [], rotation=90, fontsize="small", parse_math=False)
    figure.colorbar(image, ax=[top, bottom], pad=0.01)
    for offset, values, label in (
        (-0.2, reading.shares.prior, "prior"),
        (0.2, reading.shares.responsibility, "responsibility"),
    ):
        bars.barh([i + 1 + offset for i in range(k)], values.mean(0).tolist(), height=0.4, label=label)
    bars.set_yticks(range(1, k + 1), range(1, k + 1), fontsize="small")
    bars.invert_yaxis()
    bars.set_title("mean over the text", fontsize="medium")
    legend.axis("off")
    legend.legend(*bars.get_legend_handles_labels(), loc="upper left", frameon=False, fontsize="small")
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


STYLE = """
body { font: 16px/1.9 Georgia, serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, label, table, .key, nav { font-family: system-ui, sans-serif }
h1 { font-size: 1.3rem }
h2 { font-size: 1.05rem; margin-top: 2.5rem }
.text span { padding: .1em .15em; border-radius: .2em; background: var(--r) }
#prior:checked ~ .text span { background: var(--p) }
.key span { display: inline-block; padding: 0 .5em; margin: .15em; border-radius: .2em }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.5 }
td, th { padding: .25em .8em .25em 0; text-align: left; vertical-align: top }
img { max-width: 100% }
"""


def page(reading: Reading, words: list[str], n_words: int, report: dict[str, Any], title: str) -> str:
    """The HTML page: text coloured by the expert with the largest share, the more of it the stronger; it needs no
    network."""
    k = reading.shares.prior.shape[1]
    spans = []
    for i in range(min(n_words, reading.tokens.numel())):
        word, prior, responsibility = (
            words[reading.tokens[i]],
            reading.shares.prior[i],
            reading.shares.responsibility[i],
        )
        best = responsibility.topk(min(3, k))
        note = f"{word}: probability {math.exp(reading.shares.log_likelihood[i]):.2g}; " + ", ".join(
            f"expert {e + 1} {r:.0%} (prior {prior[e]:.0%})"
            for r, e in zip(best.values.tolist(), best.indices.tolist())
        )
        spans.append(
            f'<span style="--p:{_colour(prior)};--r:{_colour(responsibility)}" '
            f'title="{html.escape(note)}">{html.escape(word)}</span>' + ("<br>" if word == "<eos>" else "")
        )
    key = "".join(f'<span style="background:{_shade(e, k, 0.8)}">expert {e + 1}</span>' for e in range(k))
    rows = "".join(
        f"<tr><td>{e}</td><td>{x['prior']:.1%}</td><td>{x['responsibility']:.1%}</td>"
        f"<td>{html.escape(' '.join(x['frequent']))}</td><td>{html.escape(' '.join(x['characteristic']))}</td></tr>"
        for e, x in enumerate(report["experts"], start=1)
    )
    neighbours = "".join(
        f"<tr><td>{html.escape(w)}</td><td>{html.escape(' '.join(o))}</td></tr>" for w, o in report["nearest"].items()
    )
    newline = "\n"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Experts of {html.escape(title)}</title><style>{STYLE}</style>
<h1>Which expert speaks when: {html.escape(title)}</h1>
<p>Perplexity {report["ppl"]:.2f}; on average {report["effective_experts"]:.1f} of {k} experts speak at a time (the
exponential of their responsibilities' entropy). Each word has the colour of the expert with the largest share in it,
the stronger the larger the share; point at a word for numbers.</p>
<input type="radio" name="share" id="responsibility" checked>
<label for="responsibility"> responsibility for the word</label>
<input type="radio" name="share" id="prior"><label for="prior"> prior, before the word is seen</label>
<p class="key">{key}</p>
<p class="text">{newline.join(spans)}</p>
<h2>The experts</h2>
<img src="experts.png" alt="prior and responsibility of each expert">
<table>
<tr><th>expert</th><th>prior</th><th>speaks</th><th>most frequent words</th><th>most characteristic words</th></tr>
{rows}
</table>
<h2>Nearest words in the embedding</h2>
<table>{neighbours}</table>
</html>
"""


def _colour(shares: Tensor) -> str:
    share, expert = shares.max(-1)
    return _shade(int(expert), shares.numel(), share.item())


def _shade(expert: int, n_experts: int, strength: float) -> str:
    """One hue an expert, evenly apart."""
    return f"hsl({360 * expert / n_experts:.0f} 80% 60% / {0.75 * strength:.2f})"
