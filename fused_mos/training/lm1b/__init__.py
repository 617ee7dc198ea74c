"""Training at the scale of the One Billion Word benchmark, on one device or many under torchrun."""

from .config import RECIPES, LM1BConfig
from .trainer import LM1BTrainer, Stopped

__all__ = ["RECIPES", "LM1BConfig", "LM1BTrainer", "Stopped"]
