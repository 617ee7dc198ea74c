"""Evaluate the perplexity of a run's best model, also with dynamic evaluation or a continuous cache.

    python -m fused_mos.evaluate RUN [--split valid] [--dynamic [--tune] | --cache [--tune]]

The result is printed and added to RUN/evaluation.json.

If a dynamic evaluation was stopped or killed, the same command continues it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .lm.dynamic_evaluation import DynamicRule
from .runtime import command, files
from .runtime.signals import CheckpointClock
from .runtime.text import show
from .training.cache_evaluation import CacheRule, cache_evaluation
from .training.config import dynamic_rule
from .training.errors import ConfigError
from .training.run import load_run, read_config
from .training.settings import NOT_NEGATIVE, check, setting


@dataclasses.dataclass
class Flags:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, written by fused_mos.train, fused_mos.finetune or fused_mos.convert."""
    split: Literal["valid", "test"] = "test"
    """Text to evaluate."""
    eval_context: int = setting(0, NOT_NEGATIVE)
    """Segment length in words; 0 takes the run's bptt. Not with --dynamic.
    The hidden state is carried from segment to segment."""
    dynamic: bool = False
    """Dynamic evaluation (Krause et al. 2018): the model keeps learning from the text that it reads."""
    cache: bool = False
    """Continuous cache (Grave et al. 2017): words that occurred recently become more likely."""
    tune: bool = False
    """First search hyperparameters on the validation text, starting from the given ones.
    For --cache these are theta and lambdasm."""
    rule: DynamicRule = dataclasses.field(default_factory=DynamicRule)
    cache_rule: CacheRule = dataclasses.field(default_factory=CacheRule)
    data: Path | None = None
    """Folder of the corpus; by default the one that the run was trained on."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto uses a GPU if there is one."""
    backend: str | None = None
    """Backend that computes the head; by default the run's."""
    checkpoint_minutes: float = setting(5.0, NOT_NEGATIVE)
    """Minutes between checkpoints of a dynamic evaluation; 0 saves after every segment."""
    time_limit: float = setting(0.0, NOT_NEGATIVE)
    """Save and exit a dynamic evaluation after this many seconds; 0 sets no limit.
    The same command continues it."""


def parse(arguments: list[str]) -> Flags:
    """Takes the defaults of --dynamic from the run's recipe. Raises CheckpointError, ConfigError."""

    def parsed(rule: DynamicRule) -> Flags:
        default = Flags(run=tyro.MISSING, rule=rule)
        return command.parse(Flags, "evaluate", __doc__, arguments, default=default)

    run = parsed(DynamicRule()).run  # finding the positional argument takes a full parse
    return parsed(dynamic_rule(read_config(run).recipe))


def check_flags(config: Flags) -> None:
    """Raises ConfigError for a value out of its range, and for flags of another kind of evaluation."""
    if config.dynamic and config.cache:
        raise ConfigError("--dynamic and --cache cannot be combined; pass only one of them")
    if config.tune and not (config.dynamic or config.cache):
        raise ConfigError("--tune searches hyperparameters of --dynamic or --cache; pass one of them, too")
    if config.dynamic and config.eval_context:
        raise ConfigError(
            f"eval_context is for static evaluation and --cache, got {config.eval_context} with --dynamic; set its "
            "segment length by --bptt"
        )
    if not config.dynamic and config.rule != dynamic_rule(read_config(config.run).recipe):
        raise ConfigError(
            f"lr, lamb, epsilon and bptt are for --dynamic evaluation, got {config.rule} without it; set the segment "
            "length of other evaluations by --eval-context"
        )
    if not config.cache and config.cache_rule != CacheRule():
        raise ConfigError(f"window, theta and lambdasm are for --cache, got {config.cache_rule} without it")
    check(config)
    try:
        config.rule.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def evaluate(config: Flags) -> dict[str, Any]:
    """Returns the record for evaluation.json."""
    from .training import evaluation

    run = load_run(config.run, config.data, config.device, config.backend)
    if config.cache:
        return cache_evaluation(run, config.split, config.cache_rule, config.tune, config.eval_context)
    if config.dynamic:
        clock = CheckpointClock(config.checkpoint_minutes, config.time_limit)
        return evaluation.dynamic_evaluation(run, config.split, config.rule, config.tune, clock)
    return evaluation.static_evaluation(run, config.split, config.eval_context)


def in_words(result: dict[str, Any]) -> str:
    """Describes how the text was evaluated."""
    if result["dynamic"]:
        return "dynamic with " + _listed(result["rule"])
    if result.get("cache"):
        return "cache with " + _listed({field.name: result[field.name] for field in dataclasses.fields(CacheRule)})
    return f"context {result['eval_context']}"


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, int) else f'{value:g}'}" for name, value in numbers.items())


def work(arguments: list[str]) -> None:
    config = parse(arguments)
    check_flags(config)
    kept = config.run / "evaluation.json"
    if kept.is_file():
        files.read_json(kept, list)  # finds a damaged file before hours of work, not after
    result = evaluate(config)
    show(  # before saving, so that the result of hours of work is shown even if it cannot be saved
        f"{config.split}, {in_words(result)}: ppl {result['ppl']:.2f} "
        f"({result['ppl_published']:.2f} as the published code counts), loss {result['loss']:.4f}",
        flush=True,
    )
    files.append_json(kept, result)


def main(arguments: list[str] | None = None) -> int:
    dynamic = "--dynamic" in (sys.argv if arguments is None else arguments)
    return command.run(work, arguments, command.CONTINUES if dynamic else "")


if __name__ == "__main__":
    sys.exit(main())
