"""[torchrun --nproc-per-node=P -m] python -m fused_mos.train_1b --recipe NAME --data DIR --out DIR [--any-field VALUE
…]

Trains a language model on the One Billion Word benchmark, or a corpus of its form, that fused_mos.data.lm1b has
prepared. The same command continues a run. Exit status: 0 at the end or the time limit, 2 for an error, 143 or 130
after SIGTERM or SIGINT, with everything saved. (Send signals to torchrun itself: it starts ranks anew that end with
another status than 0, if it may.)
"""

import argparse
import os
import sys

import tyro

from .data import CorpusError
from .training import USER_ERRORS, ConfigError, TimeLimitReached
from .training.lm1b import RECIPES, LM1BConfig, LM1BTrainer, Stopped
from .training.lm1b.ranks import OtherRankFailed, Ranks


def parse(arguments: list[str]) -> LM1BConfig:
    """The recipe gives the defaults; every other flag overrides one field."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="lm1b-mos")
    chosen, _ = first.parse_known_args(arguments)
    if chosen.recipe not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {chosen.recipe!r}")
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[LM1BConfig],
        prog="python -m fused_mos.train_1b",
        description=f"Recipes: {', '.join(RECIPES)}.",
        args=arguments,
        default=RECIPES[chosen.recipe](),
    )
    config.check()
    return config


def run(config: LM1BConfig, ranks: Ranks) -> None:
    def tell(text: str) -> None:
        if ranks.first:
            print(text, flush=True)

    trainer = LM1BTrainer(config, ranks)
    if config.evaluate:
        result = trainer.final_evaluation()
    else:
        tell(
            f"run folder {trainer.folder}, {trainer.n_parameters:,} parameters, {len(trainer.corpus.vocabulary):,} "
            "words"
        )
        tell(
            f"{ranks.n_ranks} ranks on {ranks.device.type}: {ranks.n_data} read other text, {ranks.n_vocab} share a "
            f"decoder; memory of one:\n{trainer.memory}"
        )
        if trainer.resumed:
            tell(f"goes on at step {trainer.progress.step} of {trainer.total_steps}")
        result = trainer.run()
    speed = f", {result['words_per_second']:,.0f} words/s" if result["words_per_second"] else ""
    tell(f"{result['head']}: held-out ppl {result['heldout_ppl']:.2f} over {result['heldout_words']:,} words{speed}")


def main(arguments: list[str] | None = None) -> int:
    ranks = None
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        ranks = Ranks(config.device, config.vocab_parallel)
        run(config, ranks)
    except OtherRankFailed:
        return 2  # the other one tells
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}" if first else f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {config.run_folder}: {error.strerror or error}; the same command continues", file=sys.stderr)
        return 2
    except TimeLimitReached:
        if first:
            print("time limit reached; the same command continues")
    except Stopped as stopped:
        if first:
            print("stopped, and saved; the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130
    finally:
        if ranks:
            ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
