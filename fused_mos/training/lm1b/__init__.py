"""Training at the scale of the One Billion Word benchmark, on one device or many under torchrun."""

from typing import TYPE_CHECKING

from .config import RECIPES, LM1BConfig

if TYPE_CHECKING:
    from .trainer import LM1BTrainer

__all__ = ["RECIPES", "LM1BConfig", "LM1BTrainer"]


def __getattr__(name: str) -> object:
    """Imports the trainer on first use, so that a command's --help stays fast."""
    if name == "LM1BTrainer":
        from .trainer import LM1BTrainer

        return LM1BTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
