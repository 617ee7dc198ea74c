"""Train a language model on a corpus of words.

    python -m fused_mos.train --recipe NAME --data DIR [--out DIR] [--FLAG VALUE ...]
    python -m fused_mos.train --resume DIR

If a run was stopped or killed, the same command continues it.

Without --recipe and --data, and without a folder `data`, it trains the recipe demo for a minute on sample text.
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
    """Returns the configuration of the recipe `demo` on the sample text."""
    from .data import sample

    return dataclasses.replace(RECIPES["demo"](), data=sample.cached_corpus(), out=SAMPLE_FOLDER)


def saved_config(folder: Path) -> TrainConfig:
    from .training.stages import saved_config

    return saved_config(folder)


def parse(arguments: list[str]) -> TrainConfig:
    """Takes the defaults from the recipe, or from the run to resume; every other flag overrides one field."""
    from .training import flags

    arguments, columns = flags.without_micro_batch_columns(arguments)
    config = flags.parse(TrainConfig, "train", __doc__, arguments, RECIPES, saved_config, sample)
    return flags.in_micro_batches(config, columns)


def work(arguments: list[str]) -> None:
    config = parse(arguments)
    from .data import sample
    from .training import stages

    on_sample = sample.is_sample(config.data)
    if on_sample:
        show(f"training on the sample text, {sample.NAME}", flush=True)
    stages.train(config)
    if on_sample:
        show("to train on your own text, pass its folder: python -m fused_mos.train --data DIR")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
