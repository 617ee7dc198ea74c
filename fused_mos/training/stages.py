"""Training and fine-tuning of an AWD-LSTM, started or continued, as the commands call them."""

import dataclasses
from pathlib import Path
from typing import Any

from ..data import Corpus
from ..runtime.progress import say
from .checkpoint import load_latest
from .config import TrainConfig
from .device import backend_in_words
from .folder import check_name
from .run import read_config
from .state import has_begun, last_path, load_last
from .trainer import Trainer


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains to the end, prints the result, and returns it (see `Trainer.run`)."""
    trainer = Trainer(config)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    epoch = trainer.progress.epoch
    where = ""
    if trainer.resumed:
        left = config.optim.epochs - epoch
        where = f", continues after {epoch} epochs" if left > 0 else f", already trained for {epoch} epochs"
    backend = backend_in_words(config, trainer.device)
    say(f"run folder {trainer.folder}, device {trainer.device}, {backend}, {n_parameters:,} parameters{where}")
    result = trainer.run()
    speed = f", {result['words_per_second']:,.0f} words/s" if result["words_per_second"] else ""
    say(f"{result['head']}: valid ppl {result['valid_ppl']:.2f}, test ppl {result['test_ppl']:.2f}{speed}")
    return result


def saved_config(folder: Path) -> TrainConfig:
    """Returns the configuration in the last checkpoint of the run in `folder`. Raises CheckpointError, ConfigError."""
    check_name("resume", folder)
    if not has_begun(folder) and (folder / "config.json").is_file():
        read_config(folder)  # raises a helpful error for a run of train_1b
    saved = load_latest(last_path(folder), "config", quietly=True).meta["config"]
    return dataclasses.replace(TrainConfig.from_json(saved), out=folder, resume=None, time_limit=0.0, profile=0)


def finetuning_config(folder: Path) -> TrainConfig:
    """Returns the configuration for fine-tuning the run in `folder`. Raises CheckpointError or ConfigError."""
    config = read_config(folder)
    optim = dataclasses.replace(config.optim, lr=config.optim.finetune_lr)
    return dataclasses.replace(
        config, start=folder, out=folder / "finetune", resume=None, time_limit=0.0, profile=0, optim=optim
    )


def train_to_the_end(config: TrainConfig) -> None:
    """Trains from the start or from the folder's last checkpoint; does nothing if the run is finished. Raises what
    Trainer raises, even for a finished run if it is another one."""
    folder = config.run_folder
    begun = load_last(config, Corpus(config.data, config.map_unknown)) is not None
    if begun and (folder / "result.json").is_file():
        return
    say(f"{folder}: {'continued' if begun else 'fine-tuning' if config.start else 'training'}")
    Trainer(config).run()
