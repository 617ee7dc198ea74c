"""Train an LSTM and a Transformer with AdamW, with each head and each initialisation; write the results:

    python -m experiments.adam --data PTB [--seeds 0 1 2]

All models have the same number of parameters. At equal time, softmax and MoC get as many steps as fit into the time of
MoS. Speeds are measured once, at the start; keep the machine idle meanwhile. Later load does not affect the results.
Each run takes a few minutes and is saved when it ends. If it was stopped or killed, the same command repeats the
unfinished run and continues.
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from fused_mos.data import Corpus
from fused_mos.training.device import device_named

from .equal_budget import Budget, Store, with_one_size
from .small_lm import Shape

BODIES = ("lstm", "transformer")

VARIANTS: dict[str, tuple[dict, bool]] = {
    "softmax": ({"head": "softmax"}, False),
    "softmax, bias": ({"head": "softmax"}, True),
    "MoC": ({"head": "moc"}, False),
    "MoC, bias": ({"head": "moc"}, True),
    "MoS": ({"head": "mos"}, False),
    "MoS, bias": ({"head": "mos"}, True),
    "MoS, latent_norm": ({"head": "mos", "latent_norm": True}, False),
    "MoS, bias, latent_norm": ({"head": "mos", "latent_norm": True}, True),
    "MoS, bias, linear": ({"head": "mos", "latent": "linear"}, True),
    "MoS, bias, residual": ({"head": "mos", "latent": "residual"}, True),
}
"""Arguments of the head, and whether `init_bias` initialises its bias to the word frequencies."""

AT_EQUAL_TIME = ("softmax, bias", "MoC, bias")
"""Variants that are also trained for as long as MoS."""


@dataclasses.dataclass
class Config:
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    steps: int = 1000
    """Training steps of MoS, each with 16 windows of 64 words."""
    d: int = 64
    """Width of the embedding, the decoder and the Transformer."""
    n_experts: int = 4
    """Experts of MoC and MoS."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run. Finished runs with other seeds stay in the results."""
    bodies: tuple[str, ...] = BODIES
    """Models to run: lstm, transformer. Finished runs of the other one stay in the results."""
    device: str = "auto"
    """cpu or cuda; auto uses a GPU if there is one."""
    only_speeds: bool = False
    """Measure only the seconds per step. Do so before several processes share the machine, one per seed or model."""
    runs: Path = Path("runs/adam")
    """Folder for finished runs."""
    out: Path = Path(__file__).parent / "results" / "adam.json"
    """JSON file for all results."""


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.adam", description=__doc__)
    device = device_named(config.device)
    settings = {"data": config.data.name, "steps": config.steps, "d": config.d, "n_experts": config.n_experts}
    store = Store(config.runs, settings | {"device": device.type})
    budget = Budget(Corpus(config.data), store, config.steps, device)
    shapes = {body: shapes_of(body, config, len(budget.corpus.vocabulary)) for body in config.bodies}
    seconds = {
        body: budget.seconds_per_step(body, {n: shapes[body][n] for n in (*AT_EQUAL_TIME, "MoS, bias")})
        for body in config.bodies
    }
    if config.only_speeds:
        return 0
    rates = {body: budget.learning_rate(body, shapes[body]["softmax, bias"]) for body in config.bodies}
    for seed in config.seeds:
        for body in config.bodies:
            for name, (_, with_counts) in VARIANTS.items():

                def train(steps: int, body=body, name=name, with_counts=with_counts, seed=seed) -> dict:
                    return budget.run(shapes[body][name], with_counts, steps, rates[body], seed, "test")

                store.row(f"{body}, {name}, seed {seed}", lambda train=train: train(config.steps))
                if name in AT_EQUAL_TIME:
                    steps = round(config.steps * seconds[body]["MoS, bias"] / seconds[body][name])
                    store.row(f"{body}, {name}, equal time, seed {seed}", lambda train=train, n=steps: train(n))
            store.write(config.out)
    store.write(config.out)
    return 0


def shapes_of(body: str, config: Config, n_classes: int) -> dict[str, Shape]:
    """Returns the shapes of all variants, with equal numbers of parameters."""
    sizes = {"n_classes": n_classes, "d": config.d, "width": 4 * config.d, "n_experts": config.n_experts}
    return with_one_size({name: Shape(body, **sizes, **how) for name, (how, _) in VARIANTS.items()})


if __name__ == "__main__":
    sys.exit(main())
