"""Measure the softmax bottleneck: the rank of trained models' log-probabilities (Yang et al. 2018, section 3.2):

    python -m experiments.rank RUN [RUN ...] [--split valid] [--out FILE.json]

RUN is the folder of a fused_mos.train or fused_mos.finetune run. Each takes minutes and 24·V² bytes of memory. Runs
already in the JSON file are not measured again. A plot of all singular values is written beside it.
"""

import dataclasses
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from fused_mos.data import batchify, segment
from fused_mos.lm.rank import Spectrum, numerical_rank, rank_threshold
from fused_mos.runtime import files, plots
from fused_mos.training.run import Run, load_run

COLUMNS = 10
"""Columns of text to read in parallel."""
BLOCK = 2048
"""Rows to add to the Gram matrix at once."""
POINTS = 400
"""Number of singular values of each run to save for the plot."""


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs on the same corpus."""
    split: Literal["valid", "test"] = "valid"
    """Text whose contexts are the rows of the matrix."""
    data: Path | None = None
    """Folder of the corpus; by default the one that the runs were trained on."""
    out: Path = Path(__file__).parent / "results" / "rank-ptb.json"
    """JSON file for the results."""


@torch.no_grad()
def spectrum(run: Run, tokens: Tensor, name: str) -> tuple[Tensor, int]:
    """Returns the singular values of the log-probabilities (n, V) after each word of the text, and n."""
    source, bptt = batchify(tokens, COLUMNS).to(run.device), run.config.optim.bptt
    found, hidden, block = Spectrum(len(run.vocabulary), run.device), run.model.initial_hidden(COLUMNS), []
    rows = source.shape[0] - 1
    with tqdm(total=rows * COLUMNS, desc=name, unit="contexts", mininterval=0.5, dynamic_ncols=True) as bar:
        for start in range(0, rows, bptt):
            inputs, _ = segment(source, start, bptt)
            _, features, hidden = run.model.features(inputs, hidden)
            block.append(features.flatten(0, 1))
            if sum(map(len, block)) >= BLOCK or start + bptt >= rows:
                found.add(run.model.head.log_prob(torch.cat(block)))
                bar.update(sum(map(len, block)))
                block = []
    print(f"{name}: {found.n_rows:,} rows; computing singular values …", flush=True)
    return found.singular_values(), found.n_rows


def measure(run: Run, split: str) -> dict[str, Any]:
    model = run.config.model
    values, n_rows = spectrum(run, getattr(run.corpus, split), run.folder.name)
    n_columns = len(run.vocabulary)
    places = torch.unique(
        torch.logspace(0, torch.tensor(float(len(values))).log10().item(), POINTS, dtype=torch.float64).round().long()
    ).clamp(max=len(values))
    return {
        "head": model.head,
        "n_experts": 1 if model.head == "softmax" else model.n_experts,
        "d": model.embedding_size,
        "rank": numerical_rank(values, n_rows, n_columns),
        "rows": n_rows,
        "columns": n_columns,
        "threshold": rank_threshold(n_rows, n_columns),
        "test_ppl": json.loads((run.folder / "result.json").read_text()).get("test_ppl"),
        "singular values over the largest": [[int(i), float(f"{values[i - 1] / values[0]:.4g}")] for i in places],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the singular values of each run's log-probabilities. Raises FileError."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(result["runs"].values()):
        experts = f", K = {row['n_experts']}" if row["n_experts"] > 1 else ""
        label = (
            f"{ {'mos': 'MoS', 'moc': 'MoC'}.get(row['head'], row['head']) }{experts}, d = {row['d']}: rank "
            f"{row['rank']:,}"
        )
        axes.plot(*zip(*row["singular values over the largest"]), color=plots.head_colour(row["head"], i), label=label)
    axes.axhline(row["threshold"], color="gray", linewidth=0.8)
    axes.annotate(
        "counts as 0",
        (1, row["threshold"]),
        xytext=(2, -3),
        textcoords="offset points",
        va="top",
        color="gray",
        fontsize=8,
    )
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value ÷ the largest")
    title = f"log-probabilities, {row['rows']:,} contexts × {row['columns']:,} words"
    plots.legend_above(figure, axes, columns=1, title=title)
    plots.save(figure, path)


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.rank", description=__doc__)
    result = json.loads(config.out.read_text()) if config.out.is_file() else {"split": config.split, "runs": {}}
    if result["split"] != config.split:
        raise SystemExit(
            f"error: {config.out} has results for split {result['split']}, got {config.split}; name another --out"
        )
    result |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}
    for folder in config.runs:
        if folder.name not in result["runs"]:
            result["runs"][folder.name] = measure(load_run(folder, config.data), config.split)
            files.write_json(config.out, result)
        row = result["runs"][folder.name]
        print(
            f"{folder.name}: rank {row['rank']:,} of {row['columns']:,} (d = {row['d']}, K = {row['n_experts']})",
            flush=True,
        )
    plot(result, config.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
