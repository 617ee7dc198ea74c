"""Generate text with the best model of a run.

    python -m fused_mos.generate RUN [--prompt TEXT] [--words N] [--temperature T] [--seed S]

Words are printed as they are drawn.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from ._inputs import COLDEST
from .runtime import command
from .runtime.text import show
from .training.errors import ConfigError
from .training.settings import NOT_NEGATIVE, POSITIVE, SEED, Range, check, setting


@dataclasses.dataclass
class Flags:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, written by fused_mos.train, fused_mos.finetune or fused_mos.convert."""
    prompt: str = ""
    """Words to start with, separated by spaces; by default a new sentence starts."""
    words: int = setting(100, POSITIVE)
    """Number of words to generate."""
    temperature: float = setting(1.0, Range(f"be at least {COLDEST}", lambda temperature: temperature >= COLDEST))
    """Sampling temperature; values below 1 favour likely words. For greedy decoding pass --top-k 1.
    It divides the logits of each expert or, with top_k or top_p, the log-probabilities of the mixture."""
    top_k: int = setting(0, NOT_NEGATIVE)
    """Sample from the k most likely words only; 0 samples from all."""
    top_p: float = setting(1.0, Range("be in (0, 1]", lambda p: 0 < p <= 1))
    """Sample from the smallest set of words whose probabilities add up to p; 1 samples from all."""
    seed: int | None = setting(None, SEED)
    """Random seed, for reproducible text."""
    data: Path | None = None
    """Folder of the corpus, for a converted run without a vocabulary of its own."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto uses a GPU if there is one."""


def work(arguments: list[str]) -> None:
    config = command.parse(Flags, "generate", __doc__, arguments)
    check(config)
    import torch

    from .data.corpus import EOS
    from .lm.generate import generate
    from .training.run import load_run

    run = load_run(config.run, config.data, config.device)
    prompt = config.prompt.split()
    if unknown := [word for word in prompt if word not in run.vocabulary.index]:
        raise ConfigError(f"prompt: {unknown[0]!r} is not one of the model's {len(run.vocabulary):,} words")
    tokens = torch.tensor([run.vocabulary.index[word] for word in (EOS, *prompt)], device=run.device)
    generator = torch.Generator(run.device)
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    show(config.prompt, end=" " if config.prompt else "")
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    for word in generate(run.model, tokens[:, None], config.words, generator, **options):
        text = run.vocabulary.words[int(word)]
        show("" if text == EOS else text, end="\n" if text == EOS else " ", flush=True)
    show()


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
