"""Compare MoS and softmax with equal parameters on a small part of One Billion Words, over several seeds:

    python -m experiments.lm1b_heads --data PREPARED [--seeds 1 2 3] [--out FILE.json]

Trains the recipe lm1b-tiny on shards prepared by fused_mos.data.lm1b. Both heads read the same text for the same number
of epochs. Runs already in the JSON file are not repeated, and an interrupted run continues.
"""

import dataclasses
import json
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import torch
import tyro

from fused_mos import train_1b
from fused_mos.data.token_stream import PreparedCorpus
from fused_mos.runtime.files import write_json

HEADS = {"mos": [], "softmax": ["--head", "softmax", "--embedding-size", "104", "--hidden-sizes", "192", "104"]}
"""Flags of each head. With the 9,607 words of two held-out shards, softmax has 1,361,567 parameters and MoS (K = 3)
1,356,999."""


@dataclasses.dataclass
class Config:
    data: Path
    """Folder written by fused_mos.data.lm1b prepare."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the initialisation and the order of the text."""
    runs: Path = Path("runs/lm1b-heads")
    """Folder for the runs."""
    out: Path = Path(__file__).parent / "results" / "lm1b-heads.json"
    """JSON file for the results."""


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.lm1b_heads", description=__doc__)
    digest = PreparedCorpus(config.data).digest
    result = json.loads(config.out.read_text()) if config.out.is_file() else {"vocabulary sha256": digest}
    if result["vocabulary sha256"] != digest:
        raise SystemExit(f"error: {config.out} has results for another corpus than {config.data}; name another --out")
    result |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}
    for seed in config.seeds:
        for head, flags in HEADS.items():
            rows = result.setdefault("heads", {}).setdefault(head, {})
            if str(seed) not in rows:
                out = config.runs / f"{head}-{seed}"
                command = [
                    "--recipe",
                    "lm1b-tiny",
                    "--data",
                    str(config.data),
                    "--seed",
                    str(seed),
                    "--device",
                    "cpu",
                    "--out",
                    str(out),
                    *flags,
                ]
                if status := train_1b.main(command):
                    return status
                run = json.loads((out / "result.json").read_text())
                rows[str(seed)] = {
                    name: run[name]
                    for name in ("parameters", "heldout_ppl", "heldout_words", "steps", "best_step", "words")
                }
                write_json(config.out, result)
    ppl = {head: [result["heads"][head][str(seed)]["heldout_ppl"] for seed in config.seeds] for head in HEADS}
    for head, values in ppl.items():
        print(
            f"{head}: held-out perplexity {statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f}), "
            f"{len(values)} seeds"
        )
    differences = [mos - softmax for mos, softmax in zip(ppl["mos"], ppl["softmax"])]
    print(f"mos − softmax: {statistics.mean(differences):+.2f} ({min(differences):+.2f} to {max(differences):+.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
