"""Fine-tune the best model of a run, by ASGD from the first step on.

    python -m fused_mos.finetune RUN [--out DIR] [--lr VALUE] [--FLAG VALUE ...]
    python -m fused_mos.finetune --resume RUN/finetune

RUN was written by fused_mos.train or fused_mos.convert. By default --out is RUN/finetune.

Other defaults are the run's own settings, with finetune_lr as lr.

RUN --help shows them; --help without RUN shows those of the recipe ptb.

If a run was stopped or killed, the same command continues it.

Sources: Merity et al. 2017, section 5; Yang et al. 2018, section 3.1.
"""

import dataclasses
import sys
from pathlib import Path

from .runtime import command
from .training.config import RECIPES, TrainConfig
from .training.errors import CheckpointError, ConfigError

Flags = TrainConfig


def parse(arguments: list[str]) -> TrainConfig:
    """Takes the defaults from the run's own configuration, with finetune_lr as lr."""
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
            raise ConfigError(
                f"resume: {resume} is a run of train, not of finetune; continue it with python -m fused_mos.train"
            )
    elif command.asks_for_help(arguments):
        default = RECIPES["ptb"]()
    else:
        raise CheckpointError("name the folder of the run to fine-tune first: python -m fused_mos.finetune RUN [flags]")
    config = command.parse(Flags, "finetune", __doc__, flags, default=default)
    if config.optim.finetune_lr != default.optim.finetune_lr:
        lr = config.optim.finetune_lr
        raise ConfigError(f"finetune_lr is only for training runs; to fine-tune, pass --lr {lr:g}")
    for name in ("recipe", "start"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(f"{name} must be that of the run, {getattr(default, name)}, got {getattr(config, name)}")
    return in_micro_batches(config, columns)


def work(arguments: list[str]) -> None:
    config = parse(arguments)
    from .training import stages

    stages.train(config)


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
