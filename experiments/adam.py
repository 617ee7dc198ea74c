"""Train an LSTM and a Transformer with AdamW under each head and each way to begin; write a table:

    python -m experiments.adam --data PTB [--seeds 0 1 2]

All models have the same number of parameters. "At equal time", softmax and MoC get as many steps as fit into the time
of MoS's, at speeds measured once at the start: have the machine idle then; load on it later changes no result. A run
takes a few minutes and is kept when it ends; after a kill, the same command goes on with the one that was cut.
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
"""The head's arguments, and whether `init_bias` gives it the words' frequencies."""

AT_EQUAL_TIME = ("softmax, bias", "MoC, bias")
"""Those that are trained for the time of MoS, too."""


@dataclasses.dataclass
class Config:
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    steps: int = 1000
    """Steps of MoS, of 16 windows of 64 words."""
    d: int = 64
    """Size of the embedding, of the decoder and of the Transformer."""
    n_experts: int = 4
    """Experts of MoC and MoS."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run. Others that are finished are in the table, too."""
    bodies: tuple[str, ...] = BODIES
    """Bodies to run, of lstm and transformer; the same goes for them."""
    device: str = "auto"
    """auto, cpu or cuda. auto is a GPU if there is one."""
    only_speeds: bool = False
    """Measure the seconds per step and stop: before several processes, one a seed or body, share the machine."""
    runs: Path = Path("runs/adam")
    """Folder of the finished runs."""
    out: Path = Path(__file__).parent / "results" / "adam.json"
    """JSON file of all results."""


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
    """Of all variants, with equal parameters."""
    sizes = {"n_classes": n_classes, "d": config.d, "width": 4 * config.d, "n_experts": config.n_experts}
    return with_one_size({name: Shape(body, **sizes, **how) for name, (how, _) in VARIANTS.items()})


if __name__ == "__main__":
    sys.exit(main())
