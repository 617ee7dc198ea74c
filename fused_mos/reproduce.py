"""python -m fused_mos.reproduce ptb|wikitext2 --data DIR [--out DIR] [--time-limit SECONDS]

All stages of the paper (Yang et al. 2018, section 3.1): train, fine-tune, evaluate, evaluate dynamically; at the end
its table beside the measured one. Killed at any moment, the same command continues.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .data import CorpusError
from .evaluate import Config as Evaluation
from .evaluate import run_evaluation
from .finetune import finetuning_config
from .training import RECIPES, USER_ERRORS, ConfigError, TimeLimitReached
from .training.config import dynamic_rule
from .training.run import load_run, write_json
from .training.trainer import train_to_the_end

STAGES = ("trained", "fine-tuned", "dynamic evaluation")

PAPER = {
    "ptb": {"trained": (58.08, 55.97), "fine-tuned": (56.54, 54.44), "dynamic evaluation": (48.33, 47.69)},
    "wikitext2": {"trained": (66.01, 63.33), "fine-tuned": (63.88, 61.45), "dynamic evaluation": (42.41, 40.68)},
}
"""Validation and test perplexity of AWD-LSTM-MoS (Yang et al. 2018, tables 1 and 2)."""


@dataclasses.dataclass
class Config:
    recipe: Annotated[Literal[tuple(RECIPES)], tyro.conf.Positional]
    """What to reproduce: the paper's ptb or wikitext2, or a recipe for a CPU, of which the paper has no numbers."""
    data: Path
    """Folder with train.txt, valid.txt and test.txt."""
    out: Path | None = None
    """Folder of the run; by default runs/reproduce-RECIPE."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Of matrix products in training; evaluation is float32."""
    tune: bool = False
    """Search the numbers of dynamic evaluation on the validation text instead of taking the recipe's."""
    time_limit: float = 0.0
    """Seconds after which to save and exit; the same command continues. 0: none."""
    checkpoint_max_mib: int = 0
    """Split checkpoints into files of at most this size; 0: one file."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"reproduce-{self.recipe}"


def reproduce(config: Config) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs what is left of the stages; returns the evaluations by stage and split. Raises TimeLimitReached when the
    time is up."""
    started = time.monotonic()

    def seconds_left() -> float:
        left = config.time_limit - (time.monotonic() - started)
        if config.time_limit and left <= 0:
            raise TimeLimitReached
        return left if config.time_limit else 0.0

    recipe = dataclasses.replace(RECIPES[config.recipe](), data=config.data, precision=config.precision)
    finetuned, flags = (
        config.folder / "finetune",
        {
            "data": config.data,
            "device": config.device,
            "precision": config.precision,
            "checkpoint_max_mib": config.checkpoint_max_mib,
        },
    )
    train_to_the_end(config.folder, lambda: recipe, **flags, time_limit=seconds_left())
    train_to_the_end(finetuned, lambda: finetuning_config(config.folder), **flags, time_limit=seconds_left())

    path = config.folder / "reproduction.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for stage, folder in zip(STAGES, (config.folder, finetuned, finetuned)):
        dynamic = stage == "dynamic evaluation"
        for split in ("valid", "test"):
            if split not in results.setdefault(stage, {}):
                print(f"{stage}: {split}", flush=True)
                run = load_run(folder, config.data, config.device)
                evaluation = Evaluation(
                    folder,
                    split,
                    dynamic=dynamic,
                    tune=dynamic and config.tune,
                    rule=dynamic_rule(config.recipe),
                    time_limit=seconds_left(),
                )
                results[stage][split] = run_evaluation(evaluation, run)
                write_json(path, results)
    return results


def table(recipe: str, results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: perplexities, exact and as the published code counts, and the paper's."""
    paper = PAPER.get(recipe, {})
    lines = [
        f"| {recipe}, valid / test perplexity | exact | as the published code counts |" + (" paper |" if paper else "")
    ]
    lines.append("|---" * (4 if paper else 3) + "|")
    for stage in STAGES:
        valid, test = results[stage]["valid"], results[stage]["test"]
        line = f"| {stage} |" + "".join(f" {valid[key]:.2f} / {test[key]:.2f} |" for key in ("ppl", "ppl_published"))
        lines.append(line + (" {:.2f} / {:.2f} |".format(*paper[stage]) if paper else ""))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    config = tyro.cli(Config, prog="python -m fused_mos.reproduce", description=__doc__, args=arguments)
    try:
        if not config.time_limit >= 0:
            raise ConfigError(f"time_limit must not be negative, got {config.time_limit}")
        results = reproduce(config)
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TimeLimitReached:
        print("time limit reached; the same command continues")
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command continues at the last checkpoint", file=sys.stderr)
        return 130
    text = table(config.recipe, results)
    (config.folder / "reproduction.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nalso in {config.folder / 'reproduction.md'}, all numbers in reproduction.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
