"""python -m fused_mos.demo [--out DIR]

Trains softmax and MoS side by side on the text that CPython ships, in about three minutes. The same command goes on
where it was stopped; once both are trained, it shows what came out.
"""

import dataclasses
import sys
from pathlib import Path

from .runtime import command, files
from .runtime.text import show
from .training.config import RECIPES, HeadName

HEADS: tuple[HeadName, ...] = ("softmax", "mos")


@dataclasses.dataclass
class Flags:
    out: Path = Path("runs/demo")
    """Folder for the text, both runs, and the plot."""


def demo(out: Path) -> None:
    from .data import sample
    from .training import Trainer
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
            config = dataclasses.replace(base, out=out / head, model=dataclasses.replace(base.model, head=head))
            trainer = Trainer(config)
            done = trainer.progress.epoch
            goes_on = f", of which {done} are done ({out / head})" if done else ""
            show(f"\n{head}: {base.optim.epochs} epochs on {sample.NAME}{goes_on}", flush=True)
            results.append(trainer.run())
        plot = out / "demo.png"
        plot_learning_curves({head: out / head for head in HEADS}, plot)
        files.write_json(out / "result.json", results)

    show(f"\n{'head':<10}{'parameters':>12}{'valid ppl':>11}{'test ppl':>10}{'words/s':>9}")
    for r in results:
        perplexities = f"{r['valid_ppl']:>11.2f}{r['test_ppl']:>10.2f}"
        show(f"{r['head']:<10}{r['parameters']:>12,}{perplexities}{r['words_per_second']:>9,.0f}")
    show(f"\nlearning curves: {plot}   all numbers: {out / 'result.json'}")
    show(f"to train again, delete {out} or name another --out")


def work(arguments: list[str]) -> None:
    demo(command.parse(Flags, "demo", __doc__, arguments).out)


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
