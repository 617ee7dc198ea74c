"""From the flags of a command to the configuration of a run, the same for both trainers."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ..runtime import command
from .config import RunConfig, TrainConfig
from .errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)

RENAMED = {"--accumulate": "--micro-batches"}
"""Flags of versions before 0.2."""


def parse(
    config_type: type[Config],
    name: str,
    description: str,
    arguments: list[str],
    recipes: Mapping[str, Callable[[], Config]],
    saved_config: Callable[[Path], Config],
    sample: Callable[[], Config],
) -> Config:
    """The configuration that flags ask for: a recipe's, or with --resume that of a run, with the fields that flags
    name.

    Args:
        config_type: gives the flags and their help.
        name: the command.
        saved_config: reads that of the run in a folder.
        sample: makes one for the text that every machine has. It is the default where neither a recipe nor a corpus is
            named and there is no folder of the default name.

    Raises ConfigError.
    """
    arguments = [_renamed(argument) for argument in arguments]
    chosen = command.peek(arguments, "recipe", "resume", "data")
    if chosen["resume"]:
        folder = Path(chosen["resume"])
        default = dataclasses.replace(saved_config(folder), out=None, resume=folder, time_limit=0.0)
    elif chosen["recipe"] and chosen["recipe"] not in recipes:
        raise ConfigError(f"recipe must be one of {', '.join(recipes)}, got {chosen['recipe']!r}")
    elif any(chosen.values()) or config_type().data.exists() or command.asks_for_help(arguments):
        default = recipes[chosen["recipe"] or config_type().recipe]()
    else:
        default = sample()
    description = f"{description} Recipes: {', '.join(recipes)}."
    config = command.parse(config_type, name, description, arguments, default=default)
    config.check()
    return config


def _renamed(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return RENAMED.get(flag, flag) + equals + value


def without_micro_batch_columns(arguments: list[str]) -> tuple[list[str], int]:
    """Takes the published code's flag --small-batch-size, the columns of a micro-batch, out of the arguments. Returns
    the others and its value, 0 where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--small-batch-size", "--small_batch_size", type=int, default=0)
    known, others = parser.parse_known_args(arguments)
    return others, known.small_batch_size


def in_micro_batches(config: TrainConfig, columns: int) -> TrainConfig:
    """The configuration with micro-batches of so many columns; as it is for 0. Raises ConfigError."""
    if not columns:
        return config
    batch_size = config.optim.batch_size
    if columns < 0 or batch_size % columns:
        raise ConfigError(f"small_batch_size must divide batch_size = {batch_size}, got {columns}")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=batch_size // columns))
