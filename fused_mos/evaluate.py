"""python -m fused_mos.evaluate RUN [--split test] [--eval-context N] [--dynamic [--tune]]

The perplexity of the best model of a run, also with dynamic evaluation, which can be killed and called again.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .data import CorpusError
from .lm.dynamic_eval import DynamicRule
from .training import USER_ERRORS, ConfigError, TimeLimitReached
from .training.checkpoint import CheckpointClock
from .training.config import dynamic_rule
from .training.dynamic import DynamicRun
from .training.evaluation import evaluate
from .training.logging import perplexity
from .training.run import Run, load_run, read_config, write_json


@dataclasses.dataclass
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder that fused_mos.train, fused_mos.finetune or fused_mos.convert left."""
    split: Literal["valid", "test"] = "test"
    """Text to evaluate."""
    eval_context: int = 0
    """Words of a segment in static evaluation; 0: the run's bptt. The hidden state is carried over either way."""
    dynamic: bool = False
    """Dynamic evaluation (Krause et al. 2018): the model goes on learning from the text."""
    tune: bool = False
    """Search the rule's numbers on the validation text first, from those given here."""
    rule: DynamicRule = dataclasses.field(default_factory=DynamicRule)
    data: Path | None = None
    """The corpus; by default where it was in training."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    backend: str | None = None
    """Of the head; by default the run's."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints of a dynamic evaluation; 0 writes one after every segment."""
    time_limit: float = 0.0
    """Seconds after which a dynamic evaluation saves and exits; the same command continues it. 0: none."""


def run_evaluation(config: Config, run: Run) -> dict[str, Any]:
    """What is appended to evaluation.json."""
    tokens, result = getattr(run.corpus, config.split), {"split": config.split, "dynamic": config.dynamic}
    if config.dynamic:
        dynamic = DynamicRun(run, CheckpointClock(config.checkpoint_minutes, config.time_limit))
        rule = dynamic.tune(config.rule) if config.tune else config.rule
        batch_size, loss = 1, dynamic.evaluate(tokens, rule, config.split)
        result |= {"rule": dataclasses.asdict(rule), "tuned": config.tune}
    else:
        batch_size = getattr(run.config, f"{config.split}_batch_size")
        context = config.eval_context or run.config.optim.bptt
        loss = evaluate(run.model, tokens, batch_size, context, config.split)
        result |= {"eval_context": context}
    rows = tokens.numel() // batch_size
    # the published code divides by a row too many, but not in its dynamic evaluation
    published = loss if config.dynamic else loss * (rows - 1) / rows
    return result | {"loss": loss, "ppl": perplexity(loss), "ppl_published": perplexity(published)}


def parse(arguments: list[str]) -> Config:
    """The recipe of the run gives the defaults of its rule. Raises ConfigError."""
    folder = next((Path(argument) for argument in arguments if (Path(argument) / "config.json").is_file()), None)
    rule = dynamic_rule(read_config(folder).recipe) if folder else DynamicRule()
    options = {
        "prog": "python -m fused_mos.evaluate",
        "description": __doc__,
        "default": Config(run=tyro.MISSING, rule=rule),
    }
    return tyro.cli(tyro.conf.OmitArgPrefixes[Config], args=arguments, **options)


def main(arguments: list[str] | None = None) -> int:
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        if config.tune and not config.dynamic:
            raise ConfigError("--tune searches the rule of --dynamic; give both")
        if config.dynamic and config.eval_context:
            raise ConfigError(
                f"eval_context is for static evaluation, got {config.eval_context} with --dynamic, whose segments "
                "are --bptt"
            )
        if not config.dynamic and config.rule != dynamic_rule(read_config(config.run).recipe):
            raise ConfigError(
                f"lr, lamb, epsilon and bptt are for --dynamic evaluation, got {config.rule} without it "
                "(--eval-context: static segments)"
            )
        for name in ("eval_context", "checkpoint_minutes", "time_limit"):
            if not getattr(config, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(config, name)}")
        try:
            config.rule.check()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        run = load_run(config.run, config.data, config.device, config.backend)
        result = run_evaluation(config, run)
    except (CorpusError, *USER_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TimeLimitReached:
        print("time limit reached; the same command continues the dynamic evaluation")
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command continues a dynamic evaluation at its last checkpoint", file=sys.stderr)
        return 130
    path = config.run / "evaluation.json"
    write_json(path, [*(json.loads(path.read_text()) if path.is_file() else []), result])
    how = (
        f"dynamic with {config.rule if not config.tune else DynamicRule(**result['rule'])}"
        if config.dynamic
        else f"context {result['eval_context']}"
    )
    print(
        f"{config.split}, {how}: ppl {result['ppl']:.2f} ({result['ppl_published']:.2f} as the published code "
        f"counts), loss {result['loss']:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
