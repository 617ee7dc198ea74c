"""Train a word-level Transformer with each head at equal parameters; write results and a plot:

    python -m experiments.transformer --data WIKITEXT2 [--ds 64 128 256] [--seeds 0 1 2]

Heads are compared at equal steps and at equal time: there softmax and MoC get as many steps as fit into the time of
MoS. Another run turns a softmax into a MoS by `MoS.from_linear` after 80 % of that time. The biases of all heads are
initialised to the word frequencies. Speeds are measured once, at the start; keep the machine idle meanwhile. Later load
does not affect the results.

Each run is saved when it ends. If it was stopped or killed, the same command repeats the unfinished run and continues.
Several processes may share the folder of the runs, each with its own seeds or sizes.
"""

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

import fused_mos
from fused_mos.data import Corpus
from fused_mos.runtime import files, plots
from fused_mos.training.device import device_named

from .equal_budget import Budget, Store, values_of, with_one_size
from .small_lm import BATCH, WINDOW, LanguageModel, Shape, Steps, learning_rate_factor, make_optimizer, places_of

HEADS = {"softmax": "softmax", "MoC": "moc", "MoS": "mos"}
SWITCH = 0.8
"""Fraction of the time after which a softmax becomes a mixture."""

UPCYCLED = f"softmax, MoS after {100 * SWITCH:.0f} %"
EQUAL_STEPS = ("softmax", "MoC", "MoS")
EQUAL_TIME = ("softmax, equal time", "MoC, equal time", "MoS", UPCYCLED)
RUNS = tuple(dict.fromkeys(EQUAL_STEPS + EQUAL_TIME))
"""Runs for each size and seed: those compared at equal steps, those compared at equal time, and all."""

COLOURS = {name: plots.head_colour(name, 2) for name in (*HEADS, UPCYCLED)}


@dataclasses.dataclass
class Config:
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    steps: int = 1000
    """Training steps of MoS, each with 16 windows of 64 words."""
    ds: tuple[int, ...] = (64, 128, 256)
    """Widths d of the embedding, the decoder and the Transformer.
    Finished runs with other widths stay in the results."""
    n_experts: int = 4
    """Experts of MoC and MoS."""
    latent: str = "residual"
    """Latent vectors of MoC and MoS: residual, linear or tanh. experiments.adam compares them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run. Finished runs with other seeds stay in the results."""
    device: str = "auto"
    """cpu or cuda; auto uses a GPU if there is one."""
    only_speeds: bool = False
    """Measure only the seconds per step. Do so before several processes share the machine."""
    runs: Path = Path("runs/transformer")
    """Folder for finished runs."""
    out: Path = Path(__file__).parent / "results" / "transformer.json"
    """JSON file for all results. The plot is written beside it."""


def shapes_of(d: int, n_classes: int, **options: Any) -> dict[str, Shape]:
    """Returns a shape for each head, with equal numbers of parameters. `options` are those of the mixtures."""
    softmax = Shape("transformer", "softmax", n_classes=n_classes, d=d, width=4 * d, n_experts=options["n_experts"])
    mixtures = {name: dataclasses.replace(softmax, head=HEADS[name], **options) for name in ("MoC", "MoS")}
    return with_one_size({"softmax": softmax} | mixtures)


def upcycle(model: LanguageModel, optimizer: torch.optim.Optimizer, n_experts: int, words: Tensor) -> None:
    """Turns the softmax into a mixture with the same loss. The optimizer keeps its state and gets the new parameters.

    Args:
        words: (B, T) text from which the scale of the hidden states is measured.
    """
    model.eval()
    with torch.no_grad():
        rms = model.hidden(words).square().mean().sqrt().item()
    model.head = fused_mos.MoS.from_linear(model.head.decoder, n_experts, input_rms=rms)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in model.parameters() if id(p) not in known]
    optimizer.add_param_group({"params": new, "weight_decay": optimizer.param_groups[0]["weight_decay"]})


@dataclasses.dataclass
class SoftmaxRun:
    """A softmax trained for as long as MoS, and the same softmax turned into a mixture for the last part of that
    time."""

    budget: Budget
    shape: Shape
    steps: int
    learning_rate: float
    seed: int
    checkpoint: Path
    """File with model and optimizer at the switch."""

    @property
    def switch(self) -> int:
        """Number of steps before the switch to a mixture."""
        return round(SWITCH * self.steps)

    def whole(self) -> dict[str, Any]:
        training = self._to_switch()
        training.run(self.steps - self.switch, "softmax")
        return self.budget.result(training, "softmax", self.steps, "test")

    def upcycled(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Returns the result of the softmax turned into a mixture. `seconds` are per step, of "softmax" and
        "upcycled"."""
        steps = max(1, round((self.steps - self.switch) * seconds["softmax"] / seconds["upcycled"]))
        budget, n = self.budget, self.switch + steps
        if not self.checkpoint.is_file():
            self._to_switch()
        model, optimizer = self._at_switch()
        torch.manual_seed(self.seed)
        upcycle(model, optimizer, self.shape.n_experts, budget.train_text[: BATCH * WINDOW].view(BATCH, WINDOW))
        # the learning rate keeps following the fraction of the time; the rest of the time now has fewer steps
        share = self.switch / self.steps
        progress = [share + (1 - share) * (step + 0.5) / steps for step in range(steps)]
        rates = [self.learning_rate * learning_rate_factor(p) for p in progress]
        places = places_of(budget.corpus.train, n, torch.Generator().manual_seed(self.seed))[self.switch :]
        training = budget.continued(model, optimizer, places, rates)
        training.run(steps, "upcycled")
        return {"steps as softmax": self.switch, **budget.result(training, "upcycled", n, "test")}

    def _to_switch(self) -> Steps:
        training = self.budget.begin(self.shape, True, self.steps, self.learning_rate, self.seed)
        training.run(self.switch, "softmax")
        with files.writing(self.checkpoint) as file:
            torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, file)
        return training

    def _at_switch(self) -> tuple[LanguageModel, torch.optim.Optimizer]:
        device = self.budget.device
        saved = torch.load(self.checkpoint, map_location=device, weights_only=True)
        model = LanguageModel(self.shape).to(device)
        model.load_state_dict(saved["model"])
        optimizer = make_optimizer(list(model.parameters()), self.learning_rate, replayed=device.type == "cuda")
        optimizer.load_state_dict(saved["optimizer"])
        return model, optimizer


def run_all(budget: Budget, shapes: dict[str, Shape], seconds: dict[str, float], rate: float, group: str, seed: int):
    """Runs everything for one size and seed."""
    store = budget.store

    def key(name: str) -> str:
        return f"{group}, {name}, seed {seed}"

    for name in EQUAL_STEPS:
        store.row(key(name), lambda name=name: budget.run(shapes[name], True, budget.steps, rate, seed, "test"))
    in_time = {name: round(budget.steps * seconds["MoS"] / seconds[name]) for name in ("softmax", "MoC")}
    store.row(key("MoC, equal time"), lambda: budget.run(shapes["MoC"], True, in_time["MoC"], rate, seed, "test"))
    checkpoint = store.path(key("softmax, equal time"), ".pt")
    softmax = SoftmaxRun(budget, shapes["softmax"], in_time["softmax"], rate, seed, checkpoint)
    store.row(key("softmax, equal time"), softmax.whole)
    store.row(key(UPCYCLED), lambda: softmax.upcycled(seconds))


def sizes(rows: dict[str, dict[str, Any]]) -> list[int]:
    """Returns all sizes d in the results, sorted."""
    return sorted({int(key.split(",")[0].removeprefix("d = ")) for key in rows})


def plot(result: dict[str, Any], path: Path) -> None:
    """Plots perplexity against d for each head, with the median and range over seeds, to a PNG. Raises FileError."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels, rows = figure.subplots(1, 2, sharey=True), result["rows"]
    for panel, title, names in zip(panels, ("equal steps", "equal time"), (EQUAL_STEPS, EQUAL_TIME)):
        for name in names:
            found = {d: values_of(rows, f"d = {d}, {name}", "test perplexity") for d in sizes(rows)}
            found = {d: values for d, values in found.items() if values}
            if not found:
                continue
            label = name.removesuffix(", equal time")
            style = {"color": COLOURS[label], "linestyle": "--" if name == UPCYCLED else "-"}  # softmax lies below it
            panel.plot(list(found), [statistics.median(v) for v in found.values()], marker="o", label=label, **style)
            ranges = [min(v) for v in found.values()], [max(v) for v in found.values()]
            panel.fill_between(list(found), *ranges, color=COLOURS[label], alpha=0.2, linewidth=0)
        panel.set(title=title, xlabel="d", xscale="log")
        panel.set_xticks(sizes(rows), [str(d) for d in sizes(rows)])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test perplexity")
    title = f"{result['data']}, {result['steps']} steps of MoS, K = {result['n_experts']}"
    plots.legend_above(figure, *panels, columns=len(COLOURS), title=title)
    plots.save(figure, path)


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.transformer", description=__doc__)
    device = device_named(config.device)
    options = {"n_experts": config.n_experts, "latent": config.latent}
    settings = {"data": config.data.name, "steps": config.steps, **options, "device": device.type}
    budget = Budget(Corpus(config.data), Store(config.runs, settings), config.steps, device)

    def write() -> None:
        budget.store.write(config.out, lambda result: plot(result, config.out.with_suffix(".png")))

    shapes = {d: shapes_of(d, len(budget.corpus.vocabulary), **options) for d in config.ds}
    seconds = {}
    for d in config.ds:
        upcycled = dataclasses.replace(shapes[d]["softmax"], head="mos", latent="residual")
        seconds[d] = budget.seconds_per_step(f"d = {d}", shapes[d] | {"upcycled": upcycled})
    if config.only_speeds:
        return 0
    for d in config.ds:
        rate = budget.learning_rate(f"d = {d}", shapes[d]["softmax"])
        for seed in config.seeds:
            run_all(budget, shapes[d], seconds[d], rate, f"d = {d}", seed)
            write()
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
