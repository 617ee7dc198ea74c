"""python -m fused_mos.generate RUN [--prompt TEXT] [--words N] [--temperature T] [--top-k K] [--top-p P] [--seed S]

Text by the best model of a run, word by word as it is drawn.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .data import CorpusError
from .data.corpus import EOS
from .lm.generation import generate
from .training import USER_ERRORS, ConfigError
from .training.config import check_seed
from .training.run import load_run


@dataclasses.dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder that fused_mos.train, fused_mos.finetune or fused_mos.convert left."""
    prompt: str = ""
    """Words to begin with, separated by spaces; by default the beginning of a sentence."""
    words: int = 100
    """Words to draw."""
    temperature: float = 1.0
    """Below 1 the likely words become likelier; without top_k and top_p within each expert alone. --top-k 1 is
    greedy."""
    top_k: int = 0
    """Draw from the k most probable words alone; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest words whose probabilities reach p; 1: from all."""
    seed: int | None = None
    """For the same text every time."""
    data: Path | None = None
    """The corpus; by default where it was in training."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""

    def check(self) -> None:
        """Raises ConfigError naming the field and its value."""
        check_seed(self.seed or 0)
        for name, valid in (
            ("words", self.words > 0),
            ("temperature", self.temperature > 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
        ):
            if not valid:
                wanted = {"top_p": "in (0, 1]", "top_k": "0 or more"}.get(name, "positive")
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)}")


def main(arguments: list[str] | None = None) -> int:
    config = tyro.cli(Config, prog="python -m fused_mos.generate", description=__doc__, args=arguments)
    try:
        config.check()
        run = load_run(config.run, config.data, config.device)
        vocabulary = run.corpus.vocabulary
        unknown = [word for word in config.prompt.split() if word not in vocabulary.index]
        if unknown:
            raise ConfigError(f"prompt: {unknown[0]!r} is not one of the model's {len(vocabulary):,} words")
        prompt = torch.tensor([vocabulary.index[word] for word in (EOS, *config.prompt.split())], device=run.device)[
            :, None
        ]
        generator = torch.Generator(run.device)
        if config.seed is None:
            generator.seed()
        else:
            generator.manual_seed(config.seed)
        print(config.prompt, end=" " if config.prompt else "")
        options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        for word in generate(run.model, prompt, config.words, generator, **options):
            text = vocabulary.words[word.item()]
            print("\n" if text == EOS else text, end="" if text == EOS else " ", flush=True)
        print()
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
