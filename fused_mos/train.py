"""python -m fused_mos.train --recipe NAME --data DIR [--any-field VALUE …] [--out DIR] | --resume DIR

Trains a language model. The same command goes on with a run that was stopped or killed. Without --recipe and --data,
and where there is no folder `data`, it trains for a minute on the text that every machine with Python has.
"""

import dataclasses
import sys
from pathlib import Path

from .runtime import command
from .runtime.text import show
from .training.config import RECIPES, TrainConfig

Flags = TrainConfig

SAMPLE_FOLDER = Path("runs/sample")


def sample() -> TrainConfig:
    """A run of the recipe `demo` on the sample text."""
    from .data import sample

    return dataclasses.replace(RECIPES["demo"](), data=sample.cached_corpus(), out=SAMPLE_FOLDER)


def saved_config(folder: Path) -> TrainConfig:
    from .training.stages import saved_config

    return saved_config(folder)


def parse(arguments: list[str]) -> TrainConfig:
    """The recipe (or the run to resume) gives the defaults; every other flag overrides one field."""
    from .training import flags

    arguments, columns = flags.without_micro_batch_columns(arguments)
    config = flags.parse(TrainConfig, "train", "Train a language model.", arguments, RECIPES, saved_config, sample)
    return flags.in_micro_batches(config, columns)


def work(arguments: list[str]) -> None:
    config = parse(arguments)
    from .data import sample
    from .training import stages

    on_sample = sample.is_sample(config.data)
    if on_sample:
        show(f"training on {sample.NAME}, the sample text", flush=True)
    stages.train(config)
    if on_sample:
        show("for a model of your own text, name its folder: python -m fused_mos.train --data DIR")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
