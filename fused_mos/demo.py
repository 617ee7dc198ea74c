"""python -m fused_mos.demo: softmax and MoS trained side by side on the text that CPython ships, in about three
minutes."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import tyro

from .data.pydoc import write_pydoc_corpus
from .training import RECIPES, Trainer
from .training.logging import plot_learning_curves

HEADS = ("softmax", "mos")


def main(out: Path = Path("runs/demo")) -> int:
    """
    Args:
        out: Folder for the text, both runs, which begin afresh, and the plot.
    """
    data = out / "data"
    try:
        write_pydoc_corpus(data)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    base = dataclasses.replace(RECIPES["demo"](), data=data)
    results = []
    for head in HEADS:
        print(f"\n{head}: {base.optim.epochs} epochs on Python's own documentation ({data})", flush=True)
        shutil.rmtree(out / head, ignore_errors=True)  # the demo's own folder: running it again starts afresh
        config = dataclasses.replace(base, out=out / head, model=dataclasses.replace(base.model, head=head))
        results.append(Trainer(config).run())
    plot = out / "demo.png"
    plot_learning_curves({head: out / head for head in HEADS}, plot)
    (out / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    print(f"\n{'head':<10}{'parameters':>12}{'valid ppl':>11}{'test ppl':>10}{'words/s':>9}")
    for r in results:
        print(
            f"{r['head']:<10}{r['parameters']:>12,}{r['valid_ppl']:>11.2f}{r['test_ppl']:>10.2f}{r['words_per_second']:>9,.0f}"
        )
    print(f"\nlearning curves: {plot}   all numbers: {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m fused_mos.demo", description=__doc__))
