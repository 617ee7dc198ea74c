"""python -m fused_mos.inspect RUN [--split valid] [--words N] [--nearest WORD …]

Which expert of a run's best model speaks when: RUN/inspect/index.html, the text coloured by expert, with experts.png
and experts.json.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .data import CorpusError
from .training import USER_ERRORS, ConfigError
from .training.inspection import inspect_run
from .training.run import load_run


@dataclasses.dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder that fused_mos.train, fused_mos.finetune or fused_mos.convert left; its head must be a MoS."""
    split: Literal["valid", "test"] = "valid"
    """Text to read."""
    words: int = 400
    """Words of it that the page shows."""
    nearest: tuple[str, ...] = ()
    """Words whose neighbours in the embedding to list; by default the most frequent ones of four letters and more."""
    data: Path | None = None
    """The corpus; by default where it was in training."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    backend: str | None = None
    """Of the head; by default the run's."""


def main(arguments: list[str] | None = None) -> int:
    config = tyro.cli(Config, prog="python -m fused_mos.inspect", description=__doc__, args=arguments)
    try:
        if config.words < 1:
            raise ConfigError(f"words must be positive, got {config.words}")
        run = load_run(config.run, config.data, config.device, config.backend)
        report = inspect_run(run, config.split, config.words, config.nearest)
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(
        f"{config.split}: ppl {report['ppl']:.2f}; {report['effective_experts']:.1f} of {len(report['experts'])} "
        "experts speak at a time"
    )
    print(f"\n{'expert':>6}{'prior':>8}{'speaks':>8}  most frequent words | most characteristic words")
    for i, expert in enumerate(report["experts"], start=1):
        words = " ".join(expert["frequent"][:6]) + " | " + " ".join(expert["characteristic"][:6])
        print(f"{i:>6}{expert['prior']:>8.1%}{expert['responsibility']:>8.1%}  {words}")
    print("\nnearest words in the embedding")
    for word, others in report["nearest"].items():
        print(f"  {word}: {' '.join(others)}")
    print(f"\npage: {config.run / 'inspect' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
