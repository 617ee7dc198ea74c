"""python -m fused_mos.finetune RUN [--lr VALUE …] [--out DIR] | --resume DIR

Fine-tunes the best model of the run in the folder RUN, which `fused_mos.train` or `fused_mos.convert` left, by ASGD
from the first step, into RUN/finetune (Merity et al. 2017, section 5; Yang et al. 2018, section 3.1). The same command
goes on with what was stopped or killed.
"""

import dataclasses
import sys
from pathlib import Path

from .runtime import command
from .training.config import TrainConfig
from .training.errors import CheckpointError, ConfigError

DESCRIPTION = "Fine-tune the best model of a run: finetune RUN [flags] | --resume RUN/finetune"

Flags = TrainConfig


def parse(arguments: list[str]) -> TrainConfig:
    """The run's own configuration gives the defaults, with finetune_lr for lr."""
    from .training import stages
    from .training.flags import in_micro_batches, without_micro_batch_columns

    arguments, columns = without_micro_batch_columns(arguments)
    resume, flags = command.peek(arguments, "resume")["resume"], arguments
    if arguments and not arguments[0].startswith("-"):
        run, *flags = arguments
        default = stages.finetuning_config(Path(run))
    elif resume:
        default = dataclasses.replace(stages.saved_config(Path(resume)), out=None, resume=Path(resume))
        if default.start is None:
            raise ConfigError(f"resume: {resume} is a run of train, not of finetune; python -m fused_mos.train goes on")
    elif command.asks_for_help(arguments):
        default = TrainConfig()
    else:
        raise CheckpointError("name the folder of the run to fine-tune first: python -m fused_mos.finetune RUN [flags]")
    config = command.parse(Flags, "finetune", DESCRIPTION, flags, default=default)
    if config.optim.finetune_lr != default.optim.finetune_lr:
        lr = config.optim.finetune_lr
        raise ConfigError(f"finetune_lr is what a run says of its fine-tuning; here name --lr {lr:g}")
    for name in ("recipe", "start"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(f"{name} is that of the run, {getattr(default, name)}, got {getattr(config, name)}")
    return in_micro_batches(config, columns)


def work(arguments: list[str]) -> None:
    config = parse(arguments)
    from .training import stages

    stages.train(config)


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
