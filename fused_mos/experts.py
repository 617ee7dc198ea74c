"""Show which expert of a run's best model predicts which word.

    python -m fused_mos.experts RUN [--split valid] [--words N] [--nearest WORD ...]

Writes the text coloured by expert to RUN/experts/index.html, with experts.png and experts.json.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .runtime import command
from .runtime.text import show
from .training.settings import POSITIVE, check, setting


@dataclasses.dataclass
class Flags:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run with a MoS head, written by fused_mos.train, fused_mos.finetune or fused_mos.convert."""
    split: Literal["valid", "test"] = "valid"
    """Text to analyse."""
    words: int = setting(400, POSITIVE)
    """Number of words to show on the page."""
    nearest: tuple[str, ...] = ()
    """Words whose nearest neighbours in the embedding are listed.
    By default the most frequent words of at least four letters."""
    data: Path | None = None
    """Folder of the corpus; by default the one that the run was trained on."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto uses a GPU if there is one."""
    backend: str | None = None
    """Backend that computes the head; by default the run's."""


def work(arguments: list[str]) -> None:
    config = command.parse(Flags, "experts", __doc__, arguments)
    check(config)
    from .training.experts import inspect_run
    from .training.run import load_run

    run = load_run(config.run, config.data, config.device, config.backend)
    report = inspect_run(run, config.split, config.words, config.nearest)
    n_experts = len(report["experts"])
    show(
        f"{config.split}: ppl {report['ppl']:.2f}; on average {report['effective_experts']:.1f} of {n_experts} experts "
        "are active for a word"
    )
    show(f"function words are {report['kinds']['function']:.0%} of the text")
    header = "most frequent words | most characteristic words"
    show(f"\n{'expert':>6}{'prior':>8}{'active':>8}{'function words':>16}  {header}")
    for i, expert in enumerate(report["experts"], start=1):
        words = " ".join(expert["frequent"][:6]) + " | " + " ".join(expert["characteristic"][:6])
        shares = f"{expert['prior']:>8.1%}{expert['responsibility']:>8.1%}{expert['kinds']['function']:>16.0%}"
        show(f"{i:>6}{shares}  {words}")
    show("\nnearest words in the embedding")
    for word, others in report["nearest"].items():
        show(f"  {word}: {' '.join(others)}")
    show(f"\npage: {config.run / 'experts' / 'index.html'}")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
