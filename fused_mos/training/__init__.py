"""Training of language models: configuration and recipes, the loop, checkpoints and logs."""

from typing import TYPE_CHECKING

from .config import RECIPES, ModelConfig, OptimConfig, TrainConfig
from .errors import CheckpointError, ConfigError, TrainingDiverged

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = [
    "RECIPES",
    "CheckpointError",
    "ConfigError",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
]


def __getattr__(name: str) -> object:
    """Imports the trainer on first use, so that a command's --help stays fast."""
    if name == "Trainer":
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
