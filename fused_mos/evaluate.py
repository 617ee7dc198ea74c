"""python -m fused_mos.evaluate RUN [--split test] [--eval-context N] [--dynamic [--tune] | --cache [--tune]]

The perplexity of the best model of a run, also with dynamic evaluation, which can be killed and called again, or with a
continuous cache.
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
    """Folder that fused_mos.train, fused_mos.finetune or fused_mos.convert left."""
    split: Literal["valid", "test"] = "test"
    """Text to evaluate."""
    eval_context: int = setting(0, NOT_NEGATIVE)
    """Words of a segment, not with --dynamic; 0: the run's bptt. The hidden state is carried over either way."""
    dynamic: bool = False
    """Dynamic evaluation (Krause et al. 2018): the model goes on learning from the text."""
    cache: bool = False
    """A continuous cache (Grave et al. 2017): the words of the last --window are likelier to come again."""
    tune: bool = False
    """Search the numbers of --dynamic, or theta and lambdasm of --cache, on the validation text first, from those given
    here."""
    rule: DynamicRule = dataclasses.field(default_factory=DynamicRule)
    cache_rule: CacheRule = dataclasses.field(default_factory=CacheRule)
    data: Path | None = None
    """The corpus; by default where it was in training."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    backend: str | None = None
    """Backend of the head; by default the run's."""
    checkpoint_minutes: float = setting(5.0, NOT_NEGATIVE)
    """Minutes between checkpoints of a dynamic evaluation; 0 writes one after every segment."""
    time_limit: float = setting(0.0, NOT_NEGATIVE)
    """Seconds after which a dynamic evaluation saves and exits; the same command continues it. 0: none."""


def parse(arguments: list[str]) -> Flags:
    """The recipe of the run gives the defaults of its rule. Raises CheckpointError, ConfigError."""

    def parsed(rule: DynamicRule) -> Flags:
        default = Flags(run=tyro.MISSING, rule=rule)
        return command.parse(Flags, "evaluate", __doc__, arguments, default=default)

    run = parsed(DynamicRule()).run  # which argument that is, only all flags tell
    return parsed(dynamic_rule(read_config(run).recipe))


def check_flags(config: Flags) -> None:
    """Raises ConfigError for a value out of its range, and for flags of the other kind of evaluation."""
    if config.dynamic and config.cache:
        raise ConfigError("--dynamic and --cache are two kinds of evaluation; give one of them")
    if config.tune and not (config.dynamic or config.cache):
        raise ConfigError("--tune searches the numbers of --dynamic or --cache; give one of them with it")
    if config.dynamic and config.eval_context:
        raise ConfigError(
            f"eval_context is for static evaluation and --cache, got {config.eval_context} with --dynamic, whose "
            "segments are --bptt"
        )
    if not config.dynamic and config.rule != dynamic_rule(read_config(config.run).recipe):
        raise ConfigError(
            f"lr, lamb, epsilon and bptt are for --dynamic evaluation, got {config.rule} without it (--eval-context: "
            "segments of the others)"
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
    """How the text was evaluated."""
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
        files.read_json(kept, list)  # one that is damaged is better found before the work
    result = evaluate(config)
    show(  # before it is kept: what took hours is shown also where it cannot be
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
