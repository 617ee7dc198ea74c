"""Training of language models: configuration and recipes, the loop, checkpoints and logs."""

from .checkpoint import CheckpointError, TimeLimitReached
from .config import RECIPES, ConfigError, ModelConfig, OptimConfig, TrainConfig
from .trainer import Trainer, TrainingDiverged

USER_ERRORS = (CheckpointError, ConfigError, TrainingDiverged)
"""Errors that a command shows as one line: what was wrong and what to do."""

__all__ = [
    "RECIPES",
    "USER_ERRORS",
    "CheckpointError",
    "ConfigError",
    "ModelConfig",
    "OptimConfig",
    "TimeLimitReached",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
]
