"""Compare the trainer with the paper's published code, on the same machine and text:

    git clone https://github.com/zihangdai/mos CODE
    python -m experiments.published CODE --data PTB [--rounds 10] [--epochs 2 --seeds 28 29 30] [--out FILE.json]

Speed: training steps of both take turns in one process, at the recipe's mean segment length. With --epochs, both are
also trained from each seed, the published code by its own command line (`published_code` says what is repaired), and
their validation losses are compared. The same seed draws different numbers in the two, so compare over several seeds;
`python -m experiments.same_draws` compares steps with the same draws. --recipe demo with --lines 3000 is a size for a
laptop. Results already in the JSON file are not measured again.
"""

import dataclasses
import functools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.harness import interleaved
from fused_mos.data import batchify
from fused_mos.data.corpus import SPLITS, UNKNOWN
from fused_mos.runtime.files import write_json
from fused_mos.training import RECIPES, TrainConfig, Trainer
from fused_mos.training.metrics import perplexity, read_metrics

from .published_code import PublishedTraining, options

ROOT = Path(__file__).parents[1]
DEALS = 100_000
"""Random permutations in the test of the difference."""
ROUNDED = "fused_mos, head in plain PyTorch"
TRAININGS = "valid perplexity by epoch, as the published code counts"


@dataclasses.dataclass
class Config:
    code: Annotated[Path, tyro.conf.Positional]
    """Folder of the published code."""
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    recipe: str = "ptb"
    """ptb, wikitext2, or a smaller recipe of python -m fused_mos.train."""
    lines: int = 0
    """Train on so many first lines of train.txt, with a tenth as many for validation; 0: on all."""
    rounds: int = 10
    """Number of steps to time; 0 skips the timing."""
    epochs: int = 0
    """Number of epochs to train; 0 skips the training."""
    seeds: tuple[int, ...] = (28,)
    """Seeds of the training runs."""
    rounding: bool = False
    """Train ours a second time with the head in plain PyTorch: the same draws, rounded differently."""
    precisions: tuple[str, ...] = ("float32",)
    """Precisions at which to time our steps: float32, tf32 (GPU), bfloat16."""
    runs: Path = Path("runs/published")
    """Folder for our training runs and for shortened texts; interrupted runs continue."""
    out: Path = Path(__file__).parent / "results" / "published.json"
    """JSON file for the results."""

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.lines}" if self.lines else self.recipe

    def recipe_config(self, **changes: Any) -> TrainConfig:
        """Return the recipe with `changes`, and with a bias of 0 at the start, as the published code has it."""
        return dataclasses.replace(RECIPES[self.recipe](), data=self.data, init_bias=False, **changes)


def shortened(data: Path, lines: int, folder: Path) -> Path:
    """Write the first `lines` lines of train.txt and a tenth as many of the others to `folder`, and return it.

    Words that train.txt then lacks become <unk>: both programs refuse them or give them a class that is never learnt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = {UNKNOWN}
    for split in SPLITS:
        n = lines if split == "train" else max(lines // 10, 1)
        with (data / f"{split}.txt").open(encoding="utf-8") as file:
            rows = [line.split() for line, _ in zip(file, range(n))]
        if split == "train":
            known.update(word for row in rows for word in row)
        text = "\n".join(" ".join(word if word in known else UNKNOWN for word in row) for row in rows)
        (folder / f"{split}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def speed(config: Config) -> dict[str, Any]:
    recipe = config.recipe_config()
    bptt = recipe.optim.bptt
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {}
        for precision in config.precisions:
            trainer = Trainer(dataclasses.replace(recipe, out=Path(folder) / precision, precision=precision))
            trainer.model.train()
            calls[f"fused_mos, {precision}"] = lambda trainer=trainer: trainer.train_step(bptt)
        source = batchify(trainer.corpus.train, recipe.optim.batch_size).to(trainer.device)
        published = PublishedTraining(config.code, len(trainer.corpus.vocabulary), recipe, trainer.device)
        calls["published"] = lambda: published.step(source, 0, bptt)
        times = interleaved(calls, config.rounds, trainer.device.type == "cuda")
    words = bptt * recipe.optim.batch_size
    return {
        "device": torch.cuda.get_device_name()
        if trainer.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "words_per_step": words,
        "words_per_second": {name: _spread([words / t for t in values]) for name, values in times.items()},
        "times_as_fast": {
            name: _spread([theirs / ours for theirs, ours in zip(times["published"], values)])
            for name, values in times.items()
            if name != "published"
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def train_published(config: Config, seed: int) -> list[float]:
    """Return the validation perplexity after each epoch, as main.py reports it. main.py fails after the last epoch,
    where torch refuses to unpickle its model; by then all perplexities are known."""
    flags = [f"--{name}={value}" for name, value in options(config.recipe_config()).items()]
    flags += ["--single_gpu", f"--seed={seed}", f"--epochs={config.epochs}", f"--data={config.data.resolve()}"]
    if not torch.cuda.is_available():
        flags.append("--cuda")  # in main.py, this flag turns CUDA off
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "experiments.published_code", str(config.code.resolve()), *flags]
        command.append(f"--save={folder}/run")
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("|"):
                print(f"published, seed {seed} {line.rstrip()}", flush=True)
        process.wait()
    found = [float(match[1]) for line in lines if (match := re.search(r"end of epoch .*valid ppl\s+([\d.]+)", line))]
    if len(found) != config.epochs:
        raise RuntimeError("the published code did not finish:\n" + "".join(lines[-20:]))
    return found


def train_ours(config: Config, seed: int, backend: str = "auto") -> list[float]:
    """Return the validation perplexity after each epoch, counted as the published code counts."""
    folder = config.runs / "-".join([config.name, str(seed), *([] if backend == "auto" else [backend])])
    default = config.recipe_config(out=folder, seed=seed)
    default = dataclasses.replace(default, model=dataclasses.replace(default.model, backend=backend))
    trainer = Trainer(dataclasses.replace(default, optim=dataclasses.replace(default.optim, epochs=config.epochs)))
    trainer.run()
    rows = trainer.corpus.valid.numel() // default.valid_batch_size
    return [round(perplexity(m["loss"] * (rows - 1) / rows), 2) for m in read_metrics(folder) if m["kind"] == "valid"]


def difference(trainings: dict[str, dict[str, list[float]]], seeds: tuple[int, ...], epochs: int) -> dict[str, Any]:
    """Return the difference of the mean validation losses after `epochs`, its standard error, and how often one as
    large comes about when the runs are dealt out to the two names at random."""
    ours, published = (
        torch.tensor([trainings[name][str(seed)][epochs - 1] for seed in seeds], dtype=torch.float64).log()
        for name in ("fused_mos", "published")
    )
    found = (ours.mean() - published.mean()).item()
    runs, n = torch.cat([ours, published]), len(seeds)
    generator = torch.Generator().manual_seed(0)
    deals = runs[torch.rand(DEALS, 2 * n, generator=generator).argsort(1)]
    as_large = (deals[:, :n].mean(1) - deals[:, n:].mean(1)).abs() >= abs(found) - 1e-12
    return {
        "epochs": epochs,
        "seeds": n,
        "mean": round(found, 4),
        "standard error": round(math.sqrt((ours.var() + published.var()).item() / n), 4),
        "p, by permutation": round(as_large.double().mean().item(), 3),
        "standard deviation over seeds": [round(ours.std().item(), 4), round(published.std().item(), 4)],
    }


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.published", description=__doc__)
    result = json.loads(config.out.read_text()) if config.out.is_file() else {}
    facts = result.setdefault(config.name, {})
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}

    def save() -> None:
        write_json(config.out, result)

    if config.lines:
        config.data = shortened(config.data, config.lines, config.runs / f"{config.name}-text")
    if config.rounds and "speed" not in facts:
        facts["speed"] = speed(config)
        save()
    if config.epochs:
        trainings = facts.setdefault(TRAININGS, {})
        contenders: dict[str, Callable[[Config, int], list[float]]] = {
            "fused_mos": train_ours,
            "published": train_published,
        }
        if config.rounding:
            contenders[ROUNDED] = functools.partial(train_ours, backend="tiled")
        for seed in config.seeds:
            for name, train in contenders.items():
                if len(trainings.setdefault(name, {}).get(str(seed), [])) < config.epochs:
                    trainings[name][str(seed)] = train(config, seed)
                    save()
        if len(config.seeds) > 1:
            epochs = range(1, config.epochs + 1)
            facts["ours minus published, nats"] = [difference(trainings, config.seeds, epoch) for epoch in epochs]
        if config.rounding:
            facts["change by rounding, %"] = {
                seed: [round(100 * abs(a / b - 1), 2) for a, b in zip(changed, trainings["fused_mos"][seed])]
                for seed, changed in trainings[ROUNDED].items()
            }
        save()
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
