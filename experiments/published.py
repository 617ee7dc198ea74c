"""Compare the trainer with the paper's published code, on the same machine and text:

    git clone https://github.com/zihangdai/mos CODE
    python -m experiments.published CODE --data PTB [--rounds 10] [--epochs 1 --seeds 28 29 30] [--out FILE.json]

For the speed, training steps of both take turns in one process, at the recipe's mean segment length. With --epochs,
both are also trained from each seed, and their validation perplexities are compared; the published code runs unchanged,
by its own command line. The same seed draws different numbers in the two, so compare over several seeds. Results
already in the JSON file are not measured again.
"""

import dataclasses
import gc
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro

from benchmarks.harness import interleaved
from fused_mos.data import batchify, segment
from fused_mos.runtime.files import write_json
from fused_mos.training import RECIPES, TrainConfig, Trainer
from fused_mos.training.metrics import perplexity, read_metrics


@dataclasses.dataclass
class Config:
    code: Annotated[Path, tyro.conf.Positional]
    """Folder of the published code."""
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    recipe: str = "ptb"
    """ptb or wikitext2."""
    rounds: int = 10
    """Number of steps to time; 0 skips the timing."""
    epochs: int = 0
    """Number of epochs to train; 0 skips the training."""
    seeds: tuple[int, ...] = (28,)
    """Seeds of the training runs."""
    precisions: tuple[str, ...] = ("float32",)
    """Precisions at which to time our steps: float32, tf32 (GPU), bfloat16."""
    runs: Path = Path("runs/published")
    """Folder for our training runs; interrupted ones continue."""
    out: Path = Path(__file__).parent / "results" / "published.json"
    """JSON file for the results."""


def options(config: TrainConfig) -> dict[str, Any]:
    """Returns the flags of the published main.py for the model and optimizer of `config`."""
    model, optim = config.model, config.optim
    return {
        "emsize": model.embedding_size,
        "nhid": model.hidden_sizes[0],
        "nhidlast": model.hidden_sizes[-1],
        "nlayers": len(model.hidden_sizes),
        "n_experts": model.n_experts,
        "dropout": model.dropout,
        "dropouth": model.dropouth,
        "dropouti": model.dropouti,
        "dropoute": model.dropoute,
        "dropoutl": model.dropoutl,
        "wdrop": model.wdrop,
        "lr": optim.lr,
        "clip": optim.clip,
        "batch_size": optim.batch_size,
        "bptt": optim.bptt,
        "small_batch_size": optim.batch_size // optim.micro_batches,
        "max_seq_len_delta": optim.bptt_delta,
        "alpha": optim.alpha,
        "beta": optim.beta,
        "wdecay": optim.weight_decay,
        "nonmono": optim.nonmono,
    }


def published_module(code: Path) -> ModuleType:
    sys.path.append(str(code.resolve()))
    spec = importlib.util.spec_from_file_location("published_model", code / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_step(
    code: Path, n_words: int, config: TrainConfig, inputs: torch.Tensor, targets: torch.Tensor
) -> Callable[[], None]:
    """Returns a function that takes a training step of the published model, as its main.py does."""
    o, optim = options(config), config.optim
    names = ("emsize", "nhid", "nhidlast", "nlayers", "dropout", "dropouth", "dropouti", "dropoute", "wdrop")
    model = (
        published_module(code)
        .RNNModel("LSTM", n_words, *(o[name] for name in names), True, o["dropoutl"], o["n_experts"])
        .to(inputs.device)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    size, total = o["small_batch_size"], 0
    parts = [slice(start, start + size) for start in range(0, optim.batch_size, size)]
    hidden = [model.init_hidden(size) for _ in parts]

    def step() -> None:
        nonlocal total
        model.train()
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            hidden[i] = [(h.detach(), c.detach()) for h, c in hidden[i]]
            log_prob, hidden[i], raw, dropped = model(inputs[:, part], hidden[i], return_h=True)
            nll = torch.nn.functional.nll_loss(log_prob.flatten(0, 1), targets[:, part].flatten())
            loss = (
                nll + optim.alpha * dropped[-1].pow(2).mean() + optim.beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
            )
            total += nll.detach() * size / optim.batch_size
            (loss * (size / optim.batch_size)).backward()
            gc.collect()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()

    return step


def speed(config: Config) -> dict[str, Any]:
    recipe = dataclasses.replace(RECIPES[config.recipe](), data=config.data)
    bptt = recipe.optim.bptt
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for precision in config.precisions:
            trainer = Trainer(dataclasses.replace(recipe, out=Path(folder) / precision, precision=precision))
            trainer.model.train()
            calls[f"fused_mos, {precision}"] = lambda trainer=trainer: trainer.train_step(bptt)
        inputs, targets = segment(batchify(trainer.corpus.train, recipe.optim.batch_size).to(trainer.device), 0, bptt)
        calls["published"] = published_step(config.code, len(trainer.corpus.vocabulary), recipe, inputs, targets)
        times = interleaved(calls, config.rounds, trainer.device.type == "cuda")
    words = inputs.numel()
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
    """Returns the validation perplexity after each epoch, as main.py reports it. (With a recent torch, main.py fails
    after the last epoch, when it unpickles its model; by then all perplexities are known.)"""
    flags = [f"--{name}={value}" for name, value in options(RECIPES[config.recipe]()).items()]
    flags += ["--single_gpu", f"--seed={seed}", f"--epochs={config.epochs}", f"--data={config.data.resolve()}"]
    if not torch.cuda.is_available():
        flags.append("--cuda")  # in main.py, this flag turns CUDA off
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "main.py", *flags, f"--save={folder}/run"]
        process = subprocess.Popen(
            command, cwd=config.code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
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


def train_ours(config: Config, seed: int) -> list[float]:
    """Returns the validation perplexity after each epoch, counted as in the published code."""
    folder = config.runs / f"{config.recipe}-{seed}"
    default = dataclasses.replace(RECIPES[config.recipe](), data=config.data, out=folder, seed=seed)
    trainer = Trainer(dataclasses.replace(default, optim=dataclasses.replace(default.optim, epochs=config.epochs)))
    trainer.run()
    rows = trainer.corpus.valid.numel() // default.valid_batch_size
    return [round(perplexity(m["loss"] * (rows - 1) / rows), 2) for m in read_metrics(folder) if m["kind"] == "valid"]


def main() -> int:
    config = tyro.cli(Config, prog="python -m experiments.published", description=__doc__)
    result = json.loads(config.out.read_text()) if config.out.is_file() else {}
    facts = result.setdefault(config.recipe, {})
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "date": date.today().isoformat()}

    def save() -> None:
        write_json(config.out, result)

    if config.rounds and "speed" not in facts:
        facts["speed"] = speed(config)
        save()
    if config.epochs:
        trainings = facts.setdefault("valid perplexity by epoch, as the published code counts", {})
        for seed in config.seeds:
            for name, train in (("fused_mos", train_ours), ("published", train_published)):
                if len(trainings.setdefault(name, {}).get(str(seed), [])) < config.epochs:
                    trainings[name][str(seed)] = train(config, seed)
                    save()
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
