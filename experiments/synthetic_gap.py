"""Measure the cost of a head's limited rank: its gap to the entropy of a language of known rank, by features d and
experts K:

    python -m experiments.synthetic_gap [--out FILE.json]

Each head minimises its expected loss under the language itself, with a free vector for each context. The gap has no
sampling error: it is what the head cannot express, plus what Adam has not found. Rows already in the JSON file are not
measured again. The plot is written beside it.
"""

import dataclasses
import json
import platform
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tqdm import tqdm

import fused_mos
from fused_mos.data.synthetic import SyntheticLanguage
from fused_mos.runtime import files, plots


@dataclasses.dataclass
class Config:
    n_words: int = 500
    """Vocabulary size of the language."""
    rank: int = 65
    """Rank of its log-probabilities."""
    features: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers d of decoder features to measure."""
    experts: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers K of MoS experts to measure. MoC is measured with the second largest."""
    context_features: int = 128
    """Size of a mixture's context vectors. Those of a softmax have d features."""
    steps: int = 3000
    """Steps of Adam. The learning rate falls from 0.01 to 0 along a cosine."""
    out: Path = Path(__file__).parent / "results" / "synthetic-gap.json"
    """JSON file for the results."""


def gap(
    language: SyntheticLanguage, head: fused_mos.head.Head, context_features: int, steps: int, name: str
) -> dict[str, float]:
    """Train the head; return its nats per word above the entropy, its parameters and the time."""
    context = torch.nn.Parameter(torch.randn(language.n_words, context_features))
    parameters = [context, *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    share = (language.stationary[:, None] * language.log_prob.exp()).float()
    start = time.perf_counter()
    for _ in tqdm(range(steps), desc=name, leave=False, disable=None):
        optimizer.zero_grad()
        (-(share * head.log_prob(context)).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = language.cross_entropy(head.log_prob(context))
    return {
        "gap": round(loss - language.entropy, 4),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - start, 1),
    }


def plot(result: dict, path: Path) -> None:
    """Writes a PNG of each head's distance to the entropy against d. Raises FileError."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    names = {name: None for row in result["rows"].values() for name in (row["head"],)}
    shades = iter(
        colormaps["viridis"](torch.linspace(0.85, 0.1, sum(name.startswith("MoS") for name in names)).tolist())
    )
    for name in names:
        points = sorted((row["d"], row["gap"]) for row in result["rows"].values() if row["head"] == name)
        style = (
            {"color": next(shades)}
            if name.startswith("MoS")
            else {"color": plots.head_colour(name.split(",")[0], 0), "linestyle": "--"}
        )
        axes.plot(*zip(*points), marker="o", label=name, **style)
    axes.axvline(result["rank"] - 1, color="gray", linewidth=0.8)
    axes.annotate(
        "rank − 1",
        (result["rank"] - 1, axes.get_ylim()[1]),
        xytext=(-3, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="gray",
    )
    axes.set(xlabel="features d of the decoder", ylabel="nats a word above the entropy", xscale="log", ylim=(0, None))
    axes.set_xticks(sorted({row["d"] for row in result["rows"].values()}), minor=False)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    title = (
        f"{result['n_words']} words, log-probabilities of rank {result['rank']}, entropy {result['entropy']:.2f} nats"
    )
    plots.legend_above(figure, axes, columns=3, title=title)
    plots.save(figure, path)


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.synthetic_gap", description=__doc__)
    language = SyntheticLanguage(config.n_words, config.rank)
    about = {name: getattr(config, name) for name in ("n_words", "rank", "context_features", "steps")} | {
        "entropy": language.entropy
    }
    result = json.loads(config.out.read_text()) if config.out.is_file() else about | {"rows": {}}
    if different := [name for name in about if result[name] != about[name]]:
        raise SystemExit(
            f"error: {config.out} has another {different[0]}, {result[different[0]]}, than {about[different[0]]}; "
            "name another --out"
        )
    result |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}
    for d in config.features:
        # a softmax uses the context vector directly
        heads = {"softmax": lambda: (fused_mos.Softmax(d, config.n_words), d)}
        for kind, count in [(fused_mos.MoS, k) for k in config.experts] + [(fused_mos.MoC, sorted(config.experts)[-2])]:
            mixture = partial(kind, config.context_features, config.n_words, count, d)
            heads[f"{kind.__name__}, K = {count}"] = lambda mixture=mixture: (mixture(), config.context_features)
        for name, make in heads.items():
            key = f"{name}, d = {d}"
            if key not in result["rows"]:
                torch.manual_seed(0)
                head, size = make()
                result["rows"][key] = {"head": name, "d": d} | gap(language, head, size, config.steps, key)
                files.write_json(config.out, result)
            print(
                f"{key}: {result['rows'][key]['gap']:.4f} nats above the entropy, "
                f"{result['rows'][key]['parameters']:,} parameters",
                flush=True,
            )
    plot(result, config.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
