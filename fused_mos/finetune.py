"""python -m fused_mos.finetune RUN [--lr VALUE …] [--out DIR] | --resume DIR

Fine-tunes the best model of the run in the folder RUN, which `fused_mos.train` or `fused_mos.convert` left, by ASGD
from the first step, into RUN/finetune (Merity et al. 2017, section 5; Yang et al. 2018, section 3.1). What RUN/finetune
has of it is continued.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from .train import override, run
from .training import CheckpointError, ConfigError, TrainConfig
from .training.run import read_config
from .training.trainer import resumed_config


def parse(arguments: list[str]) -> TrainConfig:
    """The run's own configuration gives the defaults, with finetune_lr for lr; what was begun is continued."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", type=Path)
    first.add_argument("--out", type=Path)
    chosen, flags = first.parse_known_args(arguments)[0], arguments
    if arguments and not arguments[0].startswith("-"):
        run, *flags = arguments
        default = finetuning_config(Path(run))
        out = chosen.out or default.out
        if (out / "last.safetensors").is_file():
            begun = resumed_config(out)
            if begun.start and begun.start.resolve() == Path(run).resolve():  # and not what another run left there
                default = begun
    elif chosen.resume:
        default = resumed_config(chosen.resume)
    elif {"-h", "--help"} & set(arguments):
        default = TrainConfig()
    else:
        raise CheckpointError("name the folder of the run to fine-tune first: python -m fused_mos.finetune RUN [flags]")
    config = override(
        default, "finetune", "Fine-tune the best model of a run: finetune RUN [flags] | --resume RUN/finetune", flags
    )
    if config.optim.finetune_lr != default.optim.finetune_lr:
        raise ConfigError(
            f"finetune_lr is what a run says of its fine-tuning; here name --lr {config.optim.finetune_lr:g}"
        )
    for name in ("recipe", "start"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(f"{name} is that of the run, {getattr(default, name)}, got {getattr(config, name)}")
    return config


def finetuning_config(folder: Path) -> TrainConfig:
    """The configuration that fine-tunes the run in `folder`. Raises CheckpointError or ConfigError."""
    config = read_config(folder)
    optim = dataclasses.replace(config.optim, lr=config.optim.finetune_lr)
    return dataclasses.replace(
        config, start=folder, out=folder / "finetune", resume=None, time_limit=0.0, profile=0, optim=optim
    )


def main(arguments: list[str] | None = None) -> int:
    return run(parse, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
