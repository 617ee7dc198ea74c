"""Parses the flags of both trainers into the configuration of a run."""

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
"""Flag names of versions before 0.2."""


def parse(
    config_type: type[Config],
    name: str,
    description: str,
    arguments: list[str],
    recipes: Mapping[str, Callable[[], Config]],
    saved_config: Callable[[Path], Config],
    sample: Callable[[], Config],
) -> Config:
    """Returns the configuration of a recipe, or with --resume of a run, with the fields replaced that flags name.

    Args:
        config_type: defines the flags and their help.
        name: name of the command.
        description: the command's help text, which ends with a newline.
        saved_config: reads the configuration of the run in a folder.
        sample: makes the configuration for the sample text. It is the default if neither a recipe nor a corpus is given
            and there is no folder of the default name.

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
    origin = f"the run in {chosen['resume']}" if chosen["resume"] else f"the recipe {default.recipe}"
    description = f"{description}\nRecipes: {', '.join(recipes)}. The defaults shown here are those of {origin}."
    config = command.parse(config_type, name, description, arguments, default=default)
    config.check()
    return config


def _renamed(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return RENAMED.get(flag, flag) + equals + value


def without_micro_batch_columns(arguments: list[str]) -> tuple[list[str], int]:
    """Removes the published code's flag --small-batch-size, the number of columns in a micro-batch. Returns the other
    arguments and the flag's value, or 0 if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--small-batch-size", "--small_batch_size", type=int, default=0)
    known, others = parser.parse_known_args(arguments)
    return others, known.small_batch_size


def in_micro_batches(config: TrainConfig, columns: int) -> TrainConfig:
    """Returns the configuration with micro-batches of `columns` columns; 0 leaves it unchanged. Raises ConfigError."""
    if not columns:
        return config
    batch_size = config.optim.batch_size
    if columns < 0 or batch_size % columns:
        raise ConfigError(f"small_batch_size must divide batch_size = {batch_size}, got {columns}")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=batch_size // columns))
