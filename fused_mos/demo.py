"""python -m fused_mos.demo [--out DIR]

Trains a softmax and a MoS of about equal size on text that comes with Python: about two minutes on two cores, three
with `make demo`, which first makes an environment.

The same command goes on where it was stopped; once both are trained, it shows what came out.
"""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from .runtime import command, files
from .runtime.text import show
from .training.config import RECIPES, HeadName, ModelConfig

HEADS: dict[HeadName, str] = {"softmax": "softmax", "mos": "MoS"}


@dataclasses.dataclass
class Flags:
    out: Path = Path("runs/demo")
    """Folder for the text, both runs, and the plot."""


def model_with(head: HeadName, base: ModelConfig) -> ModelConfig:
    """The recipe's model with this head. MoS gets residual latent vectors and a last LSTM layer as narrow as that of
    the softmax, so that both have about as many parameters. With the recipe's wider layer and tanh, MoS stays near the
    perplexity of the words' frequencies for two epochs."""
    if head == "softmax":
        return dataclasses.replace(base, head=head)
    widths = (*base.hidden_sizes[:-1], base.embedding_size)
    return dataclasses.replace(base, head=head, latent="residual", hidden_sizes=widths)


def demo(out: Path) -> None:
    from .data import sample
    from .training import Trainer
    from .training.device import backend_in_words
    from .training.folder import check_name
    from .training.metrics import plot_learning_curves

    results = []
    check_name("out", out)
    # the text is the first that it writes, and the runs in it look after themselves
    files.refuse_foreign(out, lambda path: path.name == "data" and sample.is_corpus(path))
    with files.FolderLock(out):
        sample.write_corpus(out / "data")
        base = dataclasses.replace(RECIPES["demo"](), data=out / "data")
        for head in HEADS:
            config = dataclasses.replace(base, out=out / head, model=model_with(head, base.model))
            trainer = Trainer(config)
            done = trainer.progress.epoch
            goes_on = f", of which {done} are done ({out / head})" if done else ""
            backend = backend_in_words(config, trainer.device)
            show(f"\n{HEADS[head]}: {base.optim.epochs} epochs on {sample.NAME}, {backend}{goes_on}", flush=True)
            results.append(trainer.run())
        plot_learning_curves({head: out / head for head in HEADS}, out / "demo.png")
        files.write_json(out / "result.json", results)
    show(f"\n{as_table(results)}\n\n{what_next(out)}")


def as_table(results: list[dict[str, Any]]) -> str:
    """A line for each head, as it stands in the result.json of its run."""
    lines = [f"{'head':<10}{'test perplexity':>16}{'parameters':>13}{'training':>11}{'words/s':>9}"]
    for r in results:
        time = f"{r['training_seconds']:,.0f} s"
        speed = f"{r['words_per_second']:,.0f}"
        lines.append(f"{HEADS[r['head']]:<10}{r['test_ppl']:>16.2f}{r['parameters']:>13,}{time:>11}{speed:>9}")
    return "\n".join(lines)


def what_next(out: Path) -> str:
    """What the demo leaves, and the commands that a reader may try then."""
    mos = shlex.quote(str(out / "mos"))
    page = out / "mos" / "experts" / "index.html"
    steps = {
        f"fused_mos.generate {mos}": "words that this MoS writes",
        f"fused_mos.experts {mos}": f"which expert speaks when: open {page}",
        "fused_mos.train --data FOLDER": "your own text: train.txt, valid.txt and test.txt in FOLDER",
    }
    width = max(map(len, steps))
    return "\n".join(
        [
            "One text and one seed: another seed moves a perplexity by some per cent.",
            f"learning curves: {out / 'demo.png'}   all numbers: {out / 'result.json'}",
            f"To train again, delete {out} or name another --out.",
            "",
            "Next:",
            *(f"  {python()} -m {step:<{width}}  # {what}" for step, what in steps.items()),
            "The head in a model of your own, and what it costs: README.md and docs/ of the repository.",
        ]
    )


def python() -> str:
    """What starts this Python from here: its name if the shell finds it so, else its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def work(arguments: list[str]) -> None:
    demo(command.parse(Flags, "demo", __doc__, arguments).out)


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
