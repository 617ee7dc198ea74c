"""Train a language model on the One Billion Word benchmark, or on a corpus in the same format.

    python -m fused_mos.train_1b --recipe NAME --data DIR [--out DIR] [--FLAG VALUE ...]
    torchrun --nproc-per-node=P -m fused_mos.train_1b --recipe NAME --data DIR ...

DIR of --data was written by fused_mos.data.lm1b prepare. The same command continues a run.

Exit status: 0 at the end or the time limit, 2 for an error, 130 or 143 after SIGINT or SIGTERM.

Send signals to torchrun itself: with --max-restarts, it restarts ranks whose status is not 0.

Without --recipe and --data, and without a folder `lm1b`, it trains the recipe lm1b-tiny for two minutes on
sample text.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .runtime import command
from .runtime.text import show
from .training.lm1b.config import RECIPES, LM1BConfig

if TYPE_CHECKING:
    from .training.lm1b.ranks import Ranks

SAMPLE_FOLDER = Path("runs/sample-1b")

HOW_TO_GET_THE_CORPUS = """
That was the sample text. To train on the benchmark itself, 0.8 billion words:
  python -m fused_mos.data.lm1b download --out data                            # 1.8 GB; can be interrupted
  python -m fused_mos.data.lm1b prepare --source data --out lm1b --top 100000  # or --min-count 3: all 793,471 words
  python -m fused_mos.train_1b --recipe lm1b-mos --data lm1b --out runs/mos"""

Flags = LM1BConfig


def sample() -> LM1BConfig:
    """Returns the configuration of the recipe `lm1b-tiny` on the sample text."""
    from .data import sample

    return dataclasses.replace(RECIPES["lm1b-tiny"](), data=sample.cached_benchmark(), out=SAMPLE_FOLDER, epochs=10)


def saved_config(folder: Path) -> LM1BConfig:
    from .training.lm1b.checkpoint import saved_config

    return saved_config(folder)


def parse(arguments: list[str]) -> LM1BConfig:
    """Takes the defaults from the recipe, or from the run to resume; every other flag overrides one field."""
    from .training import flags

    return flags.parse(LM1BConfig, "train_1b", __doc__, arguments, RECIPES, saved_config, sample)


def train(config: LM1BConfig, ranks: "Ranks") -> None:
    from .data import sample
    from .training.device import backend_in_words
    from .training.lm1b import LM1BTrainer

    def tell(text: str) -> None:
        if ranks.is_main:
            show(text, flush=True)

    on_sample = sample.is_sample(config.data)
    trainer = LM1BTrainer(config, ranks)
    if config.evaluate:
        result = trainer.final_evaluation()
    else:
        if on_sample:
            tell(f"training {config.recipe} on the sample text, {sample.NAME}")
        n_words = len(trainer.corpus.vocabulary)
        backend = backend_in_words(config, ranks.device)
        tell(f"run folder {trainer.folder}, {backend}, {trainer.n_parameters:,} parameters, {n_words:,} words")
        tell(f"ranks on {ranks.device.type}: {ranks.n_data} data-parallel × {ranks.n_vocab} sharing a decoder")
        tell(f"memory per rank:\n{trainer.memory}")
        if trainer.resumed:
            done, steps = trainer.progress.step, trainer.total_steps
            tell(f"continues at step {done} of {steps}" if done < steps else f"already trained for {done} steps")
        result = trainer.run()
    speed = f", {result['words_per_second']:,.0f} words/s" if result["words_per_second"] else ""
    tell(f"{result['head']}: held-out ppl {result['heldout_ppl']:.2f} over {result['heldout_words']:,} words{speed}")
    if config.evaluate:  # after printing, so that the result is shown even if it cannot be saved
        trainer.write_result(result)
    if on_sample:
        tell(HOW_TO_GET_THE_CORPUS)


def work(arguments: list[str]) -> int:
    config = parse(arguments)
    from .training.lm1b.ranks import OtherRankFailed, Ranks

    ranks = Ranks(config.device, config.vocab_parallel)
    try:
        train(config, ranks)
    except OtherRankFailed:
        return 2  # that rank prints the error
    finally:
        ranks.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
