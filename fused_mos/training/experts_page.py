"""How the experts of a run are shown: a colour for each, a plot, and a page of coloured text that needs no network."""

import html
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.word_kinds import kind_of
from ..lm.experts import ExpertShares
from ..runtime import plots

LINES = ("solid", "dashed", "dotted", "double")
"""Lines below a word: experts that share a colour differ in them."""
HATCHES = ("", "////", "....", "xxxx")
"""The same on a bar of the plot."""
LONGEST = 20
"""Characters of a word in the plot."""
KIND_NAMES = {"function": "function words", "content": "content words", "other": "punctuation and numbers"}
FAVOURS = 1.2
"""An expert favours a kind of words of which it speaks this many times as large a part as the text has."""


def colour_of(expert: int) -> str:
    """The #RRGGBB of an expert, counted from 0; the eight colours repeat."""
    return plots.COLOURS[expert % len(plots.COLOURS)]


def round_of(expert: int, styles: tuple[str, ...]) -> str:
    """The style of an expert's colour, another one each time that the colours repeat."""
    return styles[expert // len(plots.COLOURS) % len(styles)]


def plot_experts(shares: ExpertShares, words: list[str], path: Path) -> None:
    """Writes a PNG: prior and responsibility of each expert for the first words, and their means over the whole text.
    shares of (n, K), words the first of the n. Raises FileError."""
    from matplotlib.colors import to_rgba_array
    from matplotlib.figure import Figure

    n, k = len(words), shares.prior.shape[1]
    words = [word if len(word) <= LONGEST else word[: LONGEST - 1] + "…" for word in words]
    colours = to_rgba_array([colour_of(e) for e in range(k)])[:, None]  # (K, 1, RGBA)
    figure = Figure(figsize=(12, 2.2 + 0.28 * k), layout="constrained")
    (top, bars), (bottom, legend) = figure.subplots(2, 2, width_ratios=[5, 1])
    for axes, values, title in (
        (top, shares.prior, "prior: the more, the stronger the colour"),
        (bottom, shares.responsibility, "responsibility for the word"),
    ):
        image = colours.repeat(n, axis=1)
        image[..., 3] = values[:n].T.clamp(0, 1).numpy()
        axes.imshow(image, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize="medium")
        axes.set_ylabel("expert")
        axes.set_yticks(range(k), range(1, k + 1), fontsize="small")
        axes.set_xticks(range(n), words if axes is bottom else [], rotation=90, fontsize="small", parse_math=False)
    for e in range(k):
        style = {"height": 0.38, "edgecolor": colour_of(e)}
        prior, spoken = shares.prior[:, e].mean().item(), shares.responsibility[:, e].mean().item()
        bars.barh(e + 0.8, prior, facecolor="none", **style)
        bars.barh(e + 1.2, spoken, facecolor=colour_of(e), hatch=round_of(e, HATCHES), **style | {"edgecolor": "white"})
    bars.set_yticks(range(1, k + 1), range(1, k + 1), fontsize="small")
    bars.invert_yaxis()
    bars.set_title("mean over the text", fontsize="medium")
    legend.axis("off")
    legend.text(0, 1, "outline: prior\nfilled: responsibility", va="top", fontsize="small", transform=legend.transAxes)
    plots.save(figure, path)


STYLE = """
:root { color-scheme: light }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: #222;
  background: #fff }
h1 { font-size: 1.3rem }
h2 { font-size: 1.05rem; margin-top: 2.5rem }
fieldset { border: 0; padding: 0; margin: .5rem 0 }
legend { float: left; padding: .3em .8em .3em 0 }
label { display: inline-block; padding: .3em .8em .3em 0 }
.text { line-height: 2.1; overflow-wrap: anywhere }
.w { padding: .15em .15em 0; border-radius: .2em .2em 0 0; background: var(--r);
  border-bottom: 3px var(--line) var(--c) }
.text .w { cursor: pointer }
.text .w.chosen { outline: 2px solid #000 }
.key .w, td .w { display: inline-block; padding: .1em .6em 0; margin: .15em; background: var(--fill) }
#note { position: sticky; bottom: 0; margin: 0 -1rem; padding: .6em 1rem; background: #fff; border-top: 2px solid #222;
  min-height: 3.2em }
.wide { overflow-x: auto }
.wide img { width: 100%; min-width: 50rem }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.5 }
td, th { padding: .3em .8em .3em 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere; min-width: 3.5em }
body:has(#prior:checked) .text .w { background: var(--p) }
body:has(#only-function:checked) .text .w:not(.function), body:has(#only-content:checked) .text .w:not(.content) {
  background: none; border-color: transparent; color: #767676 }
@media (max-width: 45rem) {
  tr { display: block; margin-bottom: 1em }
  td { display: block; padding: 0; min-width: 0 }
  td::before { content: attr(data-label) ": "; color: #595959 }
  td:first-child { font-weight: bold }
  tr:has(th) { display: none }
}
"""

SCRIPT = """
const text = document.querySelector(".text"), words = [...text.querySelectorAll(".w")];
const note = document.querySelector("#note");
let chosen = words[0];
for (const word of words) {
  word.dataset.note = word.title;  // without this script, pointing at a word shows its title
  word.removeAttribute("title");
}
function choose(word) {
  chosen.tabIndex = -1;
  chosen.classList.remove("chosen");
  chosen = word;
  chosen.tabIndex = 0;  // one stop of the tab key for the whole text: the arrow keys move inside it
  chosen.classList.add("chosen");
  note.textContent = chosen.dataset.note;
}
for (const event of ["pointerover", "click", "focusin"])
  text.addEventListener(event, ({ target }) => target.matches(".w") && choose(target));
text.addEventListener("keydown", (event) => {
  const at = words.indexOf(chosen), last = words.length - 1;
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  words[Math.max(0, Math.min(last, next))].focus();
});
"""


def page(shares: ExpertShares, words: list[str], report: dict[str, Any], title: str) -> str:
    """The HTML page. shares of (n, K), words the first of the n, report as `experts.summary` returns it."""
    k, name = shares.prior.shape[1], html.escape(title)
    spans = "\n".join(_span(i, word, shares) + ("<br>" if word == "<eos>" else "") for i, word in enumerate(words))
    key = " ".join(_swatch(e, f"expert {e + 1}") for e in range(k))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experts of {name}</title><style>{STYLE}{_expert_styles(k)}</style>
<h1>Which expert speaks when: {name}</h1>
<p>Perplexity {report["ppl"]:.2f}; on average {report["effective_experts"]:.1f} of {k} experts speak at a time (the
exponential of their responsibilities' entropy). Each word is underlined in the colour of the expert with the largest
share in it, and the larger the share, the stronger the colour behind it. Tap or point at a word for numbers, or move to
it by the tab and arrow keys.</p>
<fieldset><legend>Share:</legend>
<label><input type="radio" name="share" checked> responsibility for the word</label>
<label><input type="radio" name="share" id="prior"> prior, before the word is seen</label></fieldset>
<fieldset><legend>Colour:</legend>
<label><input type="radio" name="kind" checked> all words</label>
<label><input type="radio" name="kind" id="only-function"> function words</label>
<label><input type="radio" name="kind" id="only-content"> content words</label></fieldset>
<p class="key">{key}</p>
{_repeated_colours(k)}
<div class="text" role="group" aria-label="The text; the arrow keys move from word to word">
{spans}
</div>
<p id="note" role="status">Tap or point at a word.</p>
<h2>The experts</h2>
<p>{_favouring(report)}</p>
{_table(report)}
<div class="wide" tabindex="0" role="region" aria-label="Plot"><img src="experts.png" alt="Prior and responsibility of
each expert for the first words, and their means; the table has the means as numbers"></div>
<h2>Nearest words in the embedding</h2>
<table><tr><th>word</th><th>nearest</th></tr>
{_rows([_escaped({"word": word, "nearest": " ".join(others)}) for word, others in report["nearest"].items()])}
</table>
<script>{SCRIPT}</script>
</html>
"""


def _span(i: int, word: str, shares: ExpertShares) -> str:
    """A word of the text with its colours, and what is said of it."""
    prior, responsibility = shares.prior[i], shares.responsibility[i]
    best = responsibility.topk(min(3, responsibility.numel()))
    note = f"{word}: probability {math.exp(shares.log_likelihood[i]):.2g}; " + ", ".join(
        f"expert {e + 1} {r:.0%} (prior {prior[e]:.0%})" for r, e in zip(best.values.tolist(), best.indices.tolist())
    )
    (r, r_fill), (p, p_fill) = _largest(responsibility), _largest(prior)
    return (
        f'<span class="w {kind_of(word)} r{r} p{p}" style="--r:{r_fill};--p:{p_fill}" '
        f'tabindex="{-1 if i else 0}" title="{html.escape(note)}">{html.escape(word)}</span>'
    )


def _largest(shares: Tensor) -> tuple[int, str]:
    """The expert with the largest of the shares (K,), and the colour behind its word."""
    share, expert = shares.max(-1)
    return int(expert), _fill(int(expert), share.item())


def _fill(expert: int, share: float) -> str:
    """An expert's colour as #RRGGBBAA, at most so strong that black letters on it can be read."""
    return f"{colour_of(expert)}{round(255 * 0.5 * min(max(share, 0.0), 1.0)):02x}"


def _expert_styles(k: int) -> str:
    return "\n".join(
        f".r{e}, body:has(#prior:checked) .p{e} {{ --c: {colour_of(e)}; --line: {round_of(e, LINES)} }}"
        for e in range(k)
    )


def _repeated_colours(k: int) -> str:
    count = len(plots.COLOURS)
    if k <= count:
        return ""
    lines = ", ".join(f"from expert {i * count + 1} on {line}" for i, line in enumerate(LINES) if i and i * count < k)
    more = " Beyond those, only the numbers tell experts apart." if k > count * len(LINES) else ""
    return f"<p>There are more experts than colours, which repeat with another line: {lines}.{more}</p>"


def _swatch(expert: int, text: str) -> str:
    return f'<span class="w r{expert}" style="--fill:{_fill(expert, 1)}">{text}</span>'


def _favouring(report: dict[str, Any]) -> str:
    """Which experts favour which kind of words."""
    parts = []
    for kind, name in KIND_NAMES.items():
        share = report["kinds"][kind]
        found = [(e["kinds"][kind], i) for i, e in enumerate(report["experts"], 1)]
        found = sorted(((s, i) for s, i in found if s >= FAVOURS * share > 0), reverse=True)
        who = ", ".join(f"expert {i} ({s:.0%} of what it speaks)" for s, i in found) or "no expert"
        parts.append(f"{name}: {share:.0%} of the text, favoured by {who}.".capitalize())
    return " ".join(parts)


def _table(report: dict[str, Any]) -> str:
    rows = []
    for i, e in enumerate(report["experts"]):
        numbers = {"prior": f"{e['prior']:.1%}", "speaks": f"{e['responsibility']:.1%}"}
        numbers |= {name: f"{e['kinds'][kind]:.0%}" for kind, name in KIND_NAMES.items()}
        lists = {
            "most frequent": e["frequent"],
            "most frequent content words": e["frequent_content"],
            "most characteristic": e["characteristic"],
        }
        listed = _escaped({name: " ".join(words) for name, words in lists.items()})
        rows.append({"expert": _swatch(i, str(i + 1)), **numbers, **listed})
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    return f"<table>\n<tr>{head}</tr>\n{_rows(rows)}\n</table>"


def _escaped(row: dict[str, str]) -> dict[str, str]:
    return {name: html.escape(cell) for name, cell in row.items()}


def _rows(rows: list[dict[str, str]]) -> str:
    """Table rows of HTML cells that know the names of their columns, which a narrow screen shows beside them."""
    cells = [[f'<td data-label="{name}">{cell}</td>' for name, cell in row.items()] for row in rows]
    return "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
