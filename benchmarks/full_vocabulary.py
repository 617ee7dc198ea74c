"""Prepare 100 M words, take a training step of lm1b-full with all 793,471 words, and evaluate, on a CPU:

    python -m benchmarks.full_vocabulary FOLDER [--words 100_000_000] [--batch-size 8] [--out FILE.json]

The words are random (lm1b_corpus.py); the sizes are those of the One Billion Word benchmark. It needs 23 GiB of memory,
15 GB of disk in FOLDER and ten minutes. Parts already in the JSON file are not repeated.
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fused_mos import _cpu, train_1b
from fused_mos.data.manifest import read_manifest
from fused_mos.runtime.files import write_json
from fused_mos.training.lm1b import memory
from fused_mos.training.metrics import read_metrics

from . import lm1b_corpus


@dataclasses.dataclass
class Config:
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for the corpus and the run."""
    words: int = 100_000_000
    """Words to prepare."""
    heldout_words: int = 2_500
    """Words to evaluate on."""
    batch_size: int = 8
    """Columns of text in the training step."""
    embedding_size: int = 1024
    """Size of embeddings and latent vectors."""
    out: Path = Path(__file__).parent / "results" / "full-vocabulary-cpu.json"
    """JSON file of the results."""


def processes(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += processes(int(child))
    except OSError:  # it has ended
        pass
    return found


def own_mib(pid: int) -> float:
    """Anonymous memory of a process. Shared pages are divided among their owners. (The system may drop file pages.)"""
    try:
        return int(re.search(r"Pss_Anon:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]) / 1024
    except (OSError, TypeError):
        return 0.0


def prepare(source: Path, out: Path) -> dict[str, Any]:
    """Prepare the corpus; return the speed of the whole command and its memory over time."""
    start, samples = time.monotonic(), []
    command = [
        sys.executable,
        "-m",
        "fused_mos.data.lm1b",
        "prepare",
        "--source",
        str(source),
        "--out",
        str(out),
        "--allow-missing",
    ]
    process = subprocess.Popen(command)
    while process.poll() is None:
        samples.append(sum(map(own_mib, processes(process.pid))))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.monotonic() - start
    manifest = read_manifest(out)
    words = sum(file["tokens"] - 2 * file["sentences"] for file in manifest["train"])
    n_bytes = sum(file.stat().st_size for file in source.glob("training*/*"))
    return {
        "words": words,
        "seconds": round(seconds, 1),
        "words_per_second": round(words / seconds),
        "mb_per_second": round(n_bytes / seconds / 1e6, 1),
        "processors": len(os.sched_getaffinity(0)),
        "vocabulary": manifest["vocabulary"]["words"],
        "peak_mib_in_each_tenth_of_the_time": [
            round(max(samples[i * len(samples) // 10 : (i + 1) * len(samples) // 10])) for i in range(10)
        ],
    }


def step(config: Config, corpus: Path, run: Path) -> dict[str, Any]:
    """Take one training step and evaluate."""
    flags = [
        "--recipe",
        "lm1b-full",
        "--data",
        str(corpus),
        "--out",
        str(run),
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--log-interval",
        "1",
    ]
    sizes = {
        "batch-size": config.batch_size,
        "eval-batch-size": config.batch_size,
        "embedding-size": config.embedding_size,
    }
    flags += [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    _cpu.reset_peak_bytes()
    if status := train_1b.main(flags):
        raise SystemExit(status)
    parsed = train_1b.parse(flags)
    result = json.loads((run / "result.json").read_text())
    train, valid = read_metrics(run)
    predicted = memory.table(parsed, result["vocabulary"], 1, "cpu")
    return {
        "parameters": result["parameters"],
        "embedding_size": config.embedding_size,
        "experts": parsed.model.n_experts,
        "vocabulary": result["vocabulary"],
        "optimizer": parsed.optimizer,
        "precision": parsed.precision,
        "tokens": config.batch_size * parsed.bptt,
        "step_seconds": round(result["training_seconds"], 1),
        "loss_before": round(train["loss"], 4),
        "heldout_loss_after": round(valid["loss"], 4),
        "heldout_words": result["heldout_words"],
        "peak_mib": round(result["peak_memory_mib"]),
        "predicted_mib": round(sum(predicted.values()) / 2**20),
        "head_workspace_mib": round(_cpu.peak_bytes() / 2**20, 1),
    }


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.full_vocabulary", description=__doc__)
    source, prepared, run = (config.folder / name for name in ("source", "prepared", "run"))
    result = json.loads(config.out.read_text()) if config.out.is_file() else {}
    result |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "instruction set": _cpu.instruction_set(),
    }
    if "prepare" not in result:
        lm1b_corpus.generate(
            lm1b_corpus.Config(source, words=config.words, heldout_words=config.heldout_words, heldout_shards=1)
        )
        result["prepare"] = prepare(source, prepared)
        write_json(config.out, result)
    if "step" not in result:
        result["step"] = step(config, prepared, run)
        write_json(config.out, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
