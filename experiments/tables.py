"""Tables of quality for the documents, from the JSON files in results/."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import OURS, table

from .adam import AT_EQUAL_TIME, BODIES, VARIANTS
from .equal_budget import values_of
from .transformer import RUNS, UPCYCLED, sizes

RESULTS = Path(__file__).parent / "results"
BODY_NAMES = {"lstm": "LSTM", "transformer": "Transformer"}
HEAD_NAMES = {"softmax": "softmax", "moc": "MoC", "mos": "MoS", "softmax-wide": "softmax, d = 320"}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def ranks() -> str:
    found = [
        [
            HEAD_NAMES[row["head"]],
            str(row["n_experts"]),
            str(row["d"]),
            f"{row['rank']:,} of {row['columns']:,}",
            f"{row['test_ppl']:.2f}",
        ]
        for row in load("rank-ptb.json")["runs"].values()
    ]
    return table(["head", "K", "d", "rank", "test perplexity"], found)


def synthetic() -> str:
    rows = load("synthetic-gap.json")["rows"].values()
    sizes, names = sorted({row["d"] for row in rows}), list(dict.fromkeys(row["head"] for row in rows))
    gaps = {(row["head"], row["d"]): f"{row['gap']:.3f}" for row in rows}
    return table(
        ["nats above the entropy", *(f"d = {d}" for d in sizes)],
        [[name, *(gaps.get((name, d), "–") for d in sizes)] for name in names],
    )


def heads() -> str:
    """Test perplexities after each stage, at equal parameters and equal training time."""
    facts = load("heads-ptb-small.json")
    found = [
        [
            HEAD_NAMES[head],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{facts['words per second'][head]['median']:,}",
            f"{row['epochs']} + {row['fine-tuning epochs']}",
            *(f"{row[stage]['test']:.2f}" for stage in ("trained", "fine-tuned", "dynamic")),
        ]
        for head, row in facts["heads"].items()
    ]
    return table(["head", "parameters", "words/s", "epochs", "trained", "fine-tuned", "with dynamic evaluation"], found)


def cost() -> str:
    """A sentence: the training speed of each head of `ptb-small` at equal parameters."""
    facts = load("heads-ptb-small.json")
    rates = {head: facts["words per second"][head]["median"] / 1e3 for head in ("mos", "moc", "softmax")}
    millions = {f"{facts['heads'][head]['parameters'] / 1e6:.2f}" for head in rates}
    return (
        f"On two CPU cores the recipe `ptb-small` trains at {rates['mos']:.1f} k words/s with MoS (K = 4), at "
        f"{rates['moc']:.1f} k with MoC\nand at {rates['softmax']:.1f} k with a softmax, each with "
        f"{' to '.join(sorted(millions))} M parameters."
    )


def lm1b_heads() -> str:
    heads = load("lm1b-heads.json")["heads"]
    seeds = list(heads["mos"])
    found = [
        [HEAD_NAMES[head], f"{rows[seeds[0]]['parameters']:,}", *(f"{rows[seed]['heldout_ppl']:.1f}" for seed in seeds)]
        for head, rows in heads.items()
    ]
    return table(["head", "parameters", *(f"seed {seed}" for seed in seeds)], found)


def published() -> str:
    facts = load("published.json")["ptb"]
    epochs = facts["valid perplexity by epoch, as the published code counts"]
    speed = facts["speed"]["words_per_second"]
    seeds = sorted(epochs[OURS], key=int)
    found = []
    for name in (OURS, "published"):
        rate = next(value for key, value in speed.items() if key.split(",")[0] == name)
        measured = f"{rate['median']:.0f} ({rate['min']:.0f}–{rate['max']:.0f})"
        found.append(
            [
                f"**{name}**" if name == OURS else f"{name} code",
                measured,
                *(f"{epochs[name][s][-1]:.2f}" if s in epochs.get(name, {}) else "–" for s in seeds),
            ]
        )
    return table(
        [
            "`ptb`, float32",
            "words/s",
            *(f"validation perplexity after {len(epochs[OURS][s])} epoch, seed {s}" for s in seeds),
        ],
        found,
    )


def same_draws() -> str:
    facts = load("same-draws.json")
    apart = facts["largest relative difference of a parameter"]
    return table(
        ["steps with", f"largest relative difference of a parameter after {facts['steps']} steps"],
        [[name, f"{value:.0e}"] for name, value in apart.items()],
    )


def published_seeds() -> str:
    """Validation perplexities of both codes over seeds, and how far apart their mean losses are."""
    facts = load("published.json")["demo-1500"]
    trainings = facts["valid perplexity by epoch, as the published code counts"]
    differences = facts["ours minus published, nats"]
    found = []
    for i, difference in enumerate(differences):
        row = [str(difference["epochs"])]
        for name in (OURS, "published"):
            values = [epochs[i] for epochs in trainings[name].values()]
            row.append(f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})")
        row.append(f"{difference['mean']:+.2f} ± {difference['standard error']:.2f}")
        found.append([*row, f"{difference['p, by permutation']:.2f}"])
    n = differences[0]["seeds"]
    return table(["epoch", f"{OURS}, {n} seeds", f"published code, {n} seeds", "mean difference, nats", "p"], found)


def adam() -> str:
    """Test perplexities with AdamW, at equal steps and, for some heads, at equal time."""
    rows = load("adam.json")["rows"]
    runs = [
        name + budget for name in VARIANTS for budget in ("", ", equal time") if not budget or name in AT_EQUAL_TIME
    ]
    found = [[name, *(over_seeds(rows, f"{body}, {name}") for body in BODIES)] for name in runs]
    return table(["test perplexity", *(BODY_NAMES[body] for body in BODIES)], found)


def transformer() -> str:
    """Test perplexities and parameters by d."""
    rows = load("transformer.json")["rows"]
    ds = sizes(rows)
    found = [[run, *(over_seeds(rows, f"d = {d}, {run}") for d in ds)] for run in RUNS]
    for run in ("MoS", UPCYCLED):
        counts = [values_of(rows, f"d = {d}, {run}", "parameters") for d in ds]
        found.append([f"parameters, {run}", *(f"{c[0] / 1e6:.2f} M" if c else "–" for c in counts)])
    return table(["test perplexity", *(f"d = {d}" for d in ds)], found)


def over_seeds(rows: dict[str, dict[str, Any]], run: str) -> str:
    """Median (minimum–maximum) over seeds."""
    values = values_of(rows, run, "test perplexity")
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})" if values else "–"


BLOCKS: dict[str, Callable[[], str]] = {
    "ranks": ranks,
    "synthetic": synthetic,
    "cost": cost,
    "heads": heads,
    "lm1b-heads": lm1b_heads,
    "published": published,
    "published-seeds": published_seeds,
    "same-draws": same_draws,
    "adam": adam,
    "transformer": transformer,
}
"""Maps NAME in a document's `<!-- table: NAME -->` to the function that makes the table or text."""
