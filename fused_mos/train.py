"""python -m fused_mos.train --recipe NAME --data DIR [--any-field VALUE …] [--out DIR] | --resume DIR"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from .data import CorpusError
from .training import RECIPES, USER_ERRORS, ConfigError, TimeLimitReached, TrainConfig, Trainer
from .training.trainer import check_resumable, resumed_config


def parse(arguments: list[str]) -> TrainConfig:
    """The recipe (or the run to resume) gives the defaults; every other flag overrides one field."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="ptb-small")
    first.add_argument("--resume", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    if not chosen.resume and chosen.recipe not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {chosen.recipe!r}")
    default = resumed_config(chosen.resume) if chosen.resume else RECIPES[chosen.recipe]()
    return override(default, "train", f"Train a language model. Recipes: {', '.join(RECIPES)}.", arguments)


def override(default: TrainConfig, command: str, description: str, arguments: list[str]) -> TrainConfig:
    """`default` with the fields that flags name; of a run to resume only those that may change."""
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        prog=f"python -m fused_mos.{command}",
        description=description,
        args=arguments,
        default=default,
    )
    if default.resume:
        check_resumable(default, config)
    return config


def run(parse: Callable[[list[str]], TrainConfig], arguments: list[str]) -> int:
    """What the commands that train do: parse, train, and tell the user what came out or went wrong."""
    try:
        config = parse(arguments)
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = config.run_folder
    try:
        trainer = Trainer(config)
        print(
            f"run folder {folder}, device {trainer.device}, {sum(p.numel() for p in trainer.model.parameters()):,} "
            "parameters"
        )
        result = trainer.run()
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of a file that cannot be written
        print(f"error: {folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    except TimeLimitReached:
        print(f"time limit reached; continue with: python -m fused_mos.train --resume {folder}")
        return 0
    except KeyboardInterrupt:
        # before its first checkpoint a run has not begun
        how = (
            f"continue with: python -m fused_mos.train --resume {folder}"
            if (folder / "last.safetensors").is_file()
            else "nothing was written"
        )
        print(f"\nstopped; {how}", file=sys.stderr)
        return 130
    speed = f", {result['words_per_second']:,.0f} words/s" if result["words_per_second"] else ""
    print(f"{result['head']}: valid ppl {result['valid_ppl']:.2f}, test ppl {result['test_ppl']:.2f}{speed}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
