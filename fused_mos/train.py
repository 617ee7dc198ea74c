"""python -m fused_mos.train --recipe NAME --data DIR [--any-field VALUE …] [--out DIR] | --resume DIR"""

import argparse
import sys
from pathlib import Path

import tyro

from .data import CorpusError
from .training import RECIPES, USER_ERRORS, ConfigError, TrainConfig, Trainer
from .training.trainer import check_resumable, resumed_config


def parse(arguments: list[str]) -> TrainConfig:
    """The recipe (or the run to resume) gives the defaults; every other flag overrides one field."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="ptb-small")
    first.add_argument("--resume", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    if chosen.resume:
        default = resumed_config(chosen.resume)
    elif chosen.recipe in RECIPES:
        default = RECIPES[chosen.recipe]()
    else:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {chosen.recipe!r}")
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig], prog="python -m fused_mos.train",
        description=f"Train a language model. Recipes: {', '.join(RECIPES)}.", args=arguments, default=default,
    )  # fmt: skip
    if chosen.resume:
        check_resumable(default, config)
    return config


def main(arguments: list[str] | None = None) -> int:
    try:
        trainer = Trainer(parse(sys.argv[1:] if arguments is None else arguments))
        print(f"run folder {trainer.folder}, device {trainer.device}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters")
        result = trainer.run()
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; continue with: python -m fused_mos.train --resume {trainer.folder}", file=sys.stderr)
        return 130
    print(f"{result['head']}: valid ppl {result['valid_ppl']:.2f}, test ppl {result['test_ppl']:.2f}, {result['words_per_second']:,.0f} words/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
