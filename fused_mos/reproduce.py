"""Reproduce the results of the paper (Yang et al. 2018, section 3.1), and print both side by side.

    python -m fused_mos.reproduce ptb|wikitext2 --data DIR [--out DIR] [--time-limit SECONDS]

Runs all stages: training, fine-tuning, evaluation and dynamic evaluation. Before the first one, it measures and prints
how long all of them will take.

If it was stopped or killed, the same command continues.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .runtime import command, files
from .runtime.progress import say
from .runtime.signals import CheckpointClock, TimeLimitReached
from .runtime.text import show
from .training.config import RECIPES, Precision, TrainConfig, dynamic_rule
from .training.errors import ConfigError
from .training.settings import NOT_NEGATIVE, NUMBER, check, read_record, setting

STAGES = ("trained", "fine-tuned", "dynamic evaluation")

PAPER = {
    "ptb": {"trained": (58.08, 55.97), "fine-tuned": (56.54, 54.44), "dynamic evaluation": (48.33, 47.69)},
    "wikitext2": {"trained": (66.01, 63.33), "fine-tuned": (63.88, 61.45), "dynamic evaluation": (42.41, 40.68)},
}
"""Validation and test perplexity of AWD-LSTM-MoS (Yang et al. 2018, tables 1 and 2)."""

if TYPE_CHECKING:  # mypy rejects a Literal with computed values
    from .data import Corpus

    Recipe = str
else:
    Recipe = Literal[tuple(RECIPES)]


@dataclasses.dataclass
class Flags:
    recipe: Annotated[Recipe, tyro.conf.Positional]
    """Recipe to run: the paper's ptb or wikitext2, or a smaller one for a CPU, which has no results in the paper."""
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path | None = None
    """Folder of the run. By default runs/reproduce-CORPUS-RECIPE, where CORPUS is the name of the data folder."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto uses a GPU if there is one."""
    precision: Precision = "float32"
    """Precision of matrix products in training; evaluation is always float32."""
    cuda_graphs: bool = True
    """Record training steps as CUDA graphs and replay them: the same losses, less CPU overhead.
    No effect on a CPU."""
    tune: bool = False
    """Search the hyperparameters of dynamic evaluation on the validation text, instead of taking the recipe's."""
    estimate: bool = True
    """Before the first stage, time a few steps of each stage and print how long all will take."""
    time_limit: float = setting(0.0, NOT_NEGATIVE)
    """Save and exit after this many seconds, not counting the estimate; 0 sets no limit. The same command continues."""
    checkpoint_max_mib: int = setting(0, NOT_NEGATIVE)
    """Split checkpoints into files of at most this many MiB; 0 writes a single file."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"reproduce-{files.real(self.data).name}-{self.recipe}"


def reproduce(config: Flags) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs the stages that are not done yet; returns all evaluations by stage and split.

    Raises TimeLimitReached or Stopped after saving everything; ConfigError or CheckpointError if the folder belongs to
    another run, FolderInUse if another process writes to it.
    """
    from .data import Corpus
    from .training import folder as run_folder
    from .training import stages, state
    from .training.forecast import forecast

    def seconds_left() -> float:
        left = config.time_limit - (time.monotonic() - started)
        if config.time_limit and left <= 0:
            raise TimeLimitReached
        return left if config.time_limit else 0.0

    recipe = RECIPES[config.recipe]()
    corpus = Corpus(config.data, recipe.map_unknown)
    trained, finetuned = config.folder, config.folder / "finetune"

    def asked_for(run: TrainConfig) -> TrainConfig:
        return dataclasses.replace(
            run,
            data=config.data,
            device=config.device,
            precision=config.precision,
            cuda_graphs=config.cuda_graphs,
            checkpoint_max_mib=config.checkpoint_max_mib,
            optim=dataclasses.replace(run.optim, epochs=recipe.optim.epochs),
        )

    def train(run: TrainConfig) -> None:
        asked = dataclasses.replace(asked_for(run), time_limit=seconds_left())
        if state.has_begun(asked.run_folder):
            epochs = stages.saved_config(asked.run_folder).optim.epochs
            if epochs != recipe.optim.epochs:
                what = f"epochs must be {recipe.optim.epochs}, as in the recipe, but {asked.run_folder} has {epochs}"
                raise ConfigError(f"{what}; name another --out")
        stages.train_to_the_end(asked)

    with run_folder.claim(trained, state.is_of_run):
        path = trained / "reproduction.json"
        results = _read_results(path) if path.is_file() else {}
        _check_made_with(results, config, corpus)
        if config.estimate and not state.has_begun(trained):
            say(forecast(asked_for(recipe), dynamic_rule(config.recipe)).report())
        started = time.monotonic()
        train(dataclasses.replace(recipe, out=trained))
        train(stages.finetuning_config(trained))
        for stage, run in zip(STAGES, (trained, finetuned, finetuned)):
            for split in ("valid", "test"):
                if split not in results.setdefault(stage, {}):
                    say(f"{stage}: {split}")
                    dynamic = stage == "dynamic evaluation"
                    results[stage][split] = evaluated(config, run, split, dynamic, seconds_left())
                    files.write_sealed(path, results)
    return results


@dataclasses.dataclass
class Perplexities:
    """The fields of an evaluation's record that the table shows."""

    ppl: float | None = setting(None, NUMBER)  # None: infinite, which JSON cannot express
    ppl_published: float | None = setting(None, NUMBER)


def _read_results(path: Path) -> dict[str, Any]:
    """Reads reproduction.json. Raises FileError, or ConfigError if it has another format."""
    results = files.read_sealed(path)
    try:
        results.get("made with", {}).items()
        for stage in STAGES:
            for record in results.get(stage, {}).values():
                read_record(Perplexities, {key: record[key] for key in ("ppl", "ppl_published")})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is of another version: {error}; name another --out") from None
    return results


def _check_made_with(results: dict[str, Any], config: Flags, corpus: "Corpus") -> None:
    """Records what the evaluations depend on. Raises ConfigError if those in reproduction.json were made with another
    recipe, --tune or text."""
    from .data import digest

    texts = {f"{split}.txt": digest(getattr(corpus, split)) for split in ("valid", "test")}
    now = {"recipe": config.recipe, "tune": config.tune, **texts}
    before = results.setdefault("made with", now)
    for name in now:
        if before.get(name) != now[name] and name in texts:
            raise ConfigError(f"data: {config.data} has another {name} than {config.folder} was evaluated on")
        if before.get(name) != now[name]:
            change = f"it was {before.get(name)}, got {now[name]}"
            raise ConfigError(f"{name} cannot change when a reproduction continues: {change}; name another --out")


def evaluated(config: Flags, folder: Path, split: str, dynamic: bool, time_limit: float) -> dict[str, Any]:
    """Evaluates the best model of the run in `folder` and returns its record."""
    from .training import evaluation
    from .training.run import load_run

    run = load_run(folder, config.data, config.device)
    if not dynamic:
        return evaluation.static_evaluation(run, split)
    clock = CheckpointClock(minutes=5.0, time_limit=time_limit)
    return evaluation.dynamic_evaluation(run, split, dynamic_rule(config.recipe), config.tune, clock)


def table(recipe: str, results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns a Markdown table of perplexities: exact, as the published code counts them, and the paper's."""
    paper = PAPER.get(recipe, {})
    lines = [
        f"| {recipe}, valid / test perplexity | exact | as the published code counts |" + (" paper |" if paper else "")
    ]
    lines.append("|---" * (4 if paper else 3) + "|")
    for stage in STAGES:
        valid, test = results[stage]["valid"], results[stage]["test"]
        line = f"| {stage} |"
        for key in ("ppl", "ppl_published"):
            # JSON has no infinity: it is null there
            line += " {:.2f} / {:.2f} |".format(*(math.inf if x is None else x for x in (valid[key], test[key])))
        lines.append(line + (" {:.2f} / {:.2f} |".format(*paper[stage]) if paper else ""))
    return "\n".join(lines)


def work(arguments: list[str]) -> None:
    config = command.parse(Flags, "reproduce", __doc__, arguments)
    check(config)
    text = table(config.recipe, reproduce(config))
    files.write_text(config.folder / "reproduction.md", text + "\n")
    show(f"\n{text}\n\nsaved to {config.folder / 'reproduction.md'}, with all numbers in reproduction.json")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
