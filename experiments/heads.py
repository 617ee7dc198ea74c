"""Train softmax, MoC and MoS with equal parameters for equal time, through all stages; write results and a plot:

    python -m experiments.heads --data PTB [--recipe ptb-small] [--minutes 40] [--heads softmax moc mos softmax-wide]

Each head gets as many epochs as fit into the time at its speed on this machine. Speeds are measured once, in turns, at
the start; keep the machine idle meanwhile. Later load does not affect the results. If it was stopped or killed, the
same command continues.

softmax-wide compares at equal cost instead of equal parameters: it has so many features that a word takes as long as
with MoS.
"""

import dataclasses
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.harness import interleaved
from fused_mos.runtime import files, plots
from fused_mos.runtime.signals import CheckpointClock
from fused_mos.training import RECIPES, TrainConfig, Trainer
from fused_mos.training.config import dynamic_rule
from fused_mos.training.evaluation import dynamic_evaluation
from fused_mos.training.metrics import read_metrics
from fused_mos.training.run import load_run
from fused_mos.training.stages import finetuning_config, train_to_the_end

HEADS = ("softmax", "moc", "mos")
FINETUNING = 0.25
"""Fraction of the time for fine-tuning."""

SOFTMAX = {
    "ptb-small": {"embedding_size": 160, "hidden_sizes": (416, 160)},
    "wikitext2-small": {"embedding_size": 110, "hidden_sizes": (448, 110)},
}
"""Sizes at which softmax has as many parameters as the recipe's mixture. Its last layer is as wide as its embedding."""
WIDE_SOFTMAX = {"ptb-small": {"embedding_size": 320, "hidden_sizes": (608, 320)}}
"""Sizes at which softmax is as slow as the recipe's mixture on a CPU."""


@dataclasses.dataclass
class Config:
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    recipe: str = "ptb-small"
    """ptb-small or wikitext2-small."""
    heads: tuple[str, ...] = HEADS
    """Heads to train: softmax, moc, mos, softmax-wide."""
    minutes: float = 40.0
    """Minutes of training and fine-tuning per head."""
    precision: str = "float32"
    """float32 or bfloat16."""
    stages: tuple[str, ...] = ("train", "finetune", "dynamic")
    """Stages to run for each head. Without finetune, training takes all the time."""
    tune: bool = True
    """Search the hyperparameters of dynamic evaluation on the validation text, instead of taking the recipe's."""
    runs: Path = Path("runs/heads")
    """Folder for the runs."""
    out: Path | None = None
    """JSON file for the results, by default experiments/results/heads-RECIPE.json. The plot is written beside it."""


def recipe(config: Config, head: str) -> TrainConfig:
    base = RECIPES[config.recipe]()
    sizes = {"softmax": SOFTMAX, "softmax-wide": WIDE_SOFTMAX}.get(head, {}).get(config.recipe, {})
    model = dataclasses.replace(base.model, head=head.removesuffix("-wide"), **sizes)
    return dataclasses.replace(base, data=config.data, precision=config.precision, model=model)


def words_per_second(
    config: Config, known: dict[str, dict[str, float]], rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Returns the speed of each head. Heads that are not in `known` are measured together with one that is, and scaled
    by how much that one's speed has changed since."""
    missing = [head for head in config.heads if head not in known]
    if not missing:
        return known
    anchor = "mos" if "mos" in known else next(iter(known), None)
    fresh = _measured(config, missing + ([anchor] if anchor else []), rounds)
    scale = known[anchor]["median"] / fresh[anchor]["median"] if anchor else 1
    return known | {head: {name: round(value * scale) for name, value in fresh[head].items()} for head in missing}


def _measured(config: Config, heads: list[str], rounds: int) -> dict[str, dict[str, float]]:
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for head in heads:
            trainer = Trainer(dataclasses.replace(recipe(config, head), out=Path(folder) / head))
            trainer.model.train()
            calls[head] = lambda trainer=trainer: trainer.train_step(trainer.config.optim.bptt)
        times = interleaved(calls, rounds, trainer.device.type == "cuda")
    words = trainer.config.optim.bptt * trainer.config.optim.batch_size
    return {
        head: {name: words / f(t) for name, f in (("median", statistics.median), ("min", max), ("max", min))}
        for head, t in times.items()
    }


def compare(config: Config, head: str, speed: float) -> dict[str, Any]:
    """Run all stages of one head, skipping those already done, and return its row."""
    folder = config.runs / f"{config.recipe}-{head}"
    base = recipe(config, head)
    tuned = "finetune" in config.stages

    def epochs(share: float, words: int) -> int:
        return max(1, round(config.minutes * 60 * share * speed / words))

    n_words = sum(len(line.split()) + 1 for line in (config.data / "train.txt").open(encoding="utf-8"))
    first, second = epochs(1 - FINETUNING if tuned else 1, n_words), epochs(FINETUNING, n_words)
    train_to_the_end(dataclasses.replace(base, out=folder, optim=dataclasses.replace(base.optim, epochs=first)))
    result = json.loads((folder / "result.json").read_text())
    row = {
        "parameters": result["parameters"],
        "seed": result["seed"],
        "epochs": result["epochs"],
        "trained": _perplexities(result),
    }
    row["curve"] = _curve(folder, 0.0, n_words / speed / 60)
    if tuned:
        last, default = folder / "finetune", finetuning_config(folder)
        train_to_the_end(dataclasses.replace(default, optim=dataclasses.replace(default.optim, epochs=second)))
        result = json.loads((last / "result.json").read_text())
        row["curve"] += _curve(last, row["epochs"] * n_words / speed / 60, n_words / speed / 60)
        row |= {"fine-tuning epochs": result["epochs"], "fine-tuned": _perplexities(result)}
        if "dynamic" in config.stages:
            row["dynamic"] = _dynamic(config, last)
    return row


def _perplexities(result: dict[str, Any]) -> dict[str, float]:
    return {split: round(result[f"{split}_ppl"], 2) for split in ("valid", "test")}


def _curve(folder: Path, start: float, minutes_per_epoch: float) -> list[tuple[float, float]]:
    """(minutes, validation perplexity) after each epoch."""
    return [
        (round(start + m["epoch"] * minutes_per_epoch, 2), round(m["ppl"], 2))
        for m in read_metrics(folder)
        if m["kind"] == "valid"
    ]


def _dynamic(config: Config, folder: Path) -> dict[str, Any]:
    """Returns the test perplexity with dynamic evaluation, under the rule found on the validation text or the
    recipe's."""
    path = folder / "dynamic" / "result.json"
    if not path.is_file():
        rule, clock = dynamic_rule(config.recipe), CheckpointClock(minutes=5.0)
        test = dynamic_evaluation(load_run(folder), "test", rule, config.tune, clock)
        files.write_json(path, {"test": round(test["ppl"], 2), "rule": test["rule"]})
    return json.loads(path.read_text())


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of each head's validation perplexity against minutes of training. Raises FileError."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, (head, row) in enumerate(result["heads"].items()):
        label = f"{head}, {row['parameters'] / 1e6:.2f} M parameters"
        axes.plot(*zip(*row["curve"]), color=plots.head_colour(head, i), marker="o", markersize=3, label=label)
    axes.set_yscale("log")
    plots.log_ticks(axes.yaxis, least=6)
    axes.set_xlabel("minutes of training, at the speed of the idle machine")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3)
    plots.legend_above(figure, axes, columns=2, title=f"{result['recipe']}, {result['precision']}")
    plots.save(figure, path)


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.heads", description=__doc__)
    path = config.out or Path(__file__).parent / "results" / f"heads-{config.recipe}.json"
    result = (
        json.loads(path.read_text())
        if path.is_file()
        else {"recipe": config.recipe, "minutes": config.minutes, "precision": config.precision}
    )
    for name in ("recipe", "minutes", "precision"):
        if result[name] != getattr(config, name):
            raise SystemExit(
                f"error: {path} has results for {name} {result[name]}, got {getattr(config, name)}; name another --out"
            )
    result |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}

    def save() -> None:
        files.write_json(path, result)

    if unknown := [head for head in config.heads if head not in (*HEADS, "softmax-wide")]:
        raise SystemExit(f"error: heads must be of {', '.join(HEADS)}, softmax-wide, got {unknown[0]}")
    if "softmax-wide" in config.heads and config.recipe not in WIDE_SOFTMAX:
        raise SystemExit(
            f"error: softmax-wide has sizes for {', '.join(WIDE_SOFTMAX)} only, got recipe {config.recipe}"
        )
    result["words per second"] = words_per_second(config, result.get("words per second", {}))
    save()
    for head in config.heads:
        result.setdefault("heads", {})[head] = compare(config, head, result["words per second"][head]["median"])
        save()
        plot(result, path.with_suffix(".png"))
    for head, row in result["heads"].items():
        print(head, {name: value for name, value in row.items() if name != "curve"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
