"""Errors of a run that its user can fix."""

from ..runtime import UserError


class ConfigError(UserError, ValueError):
    """The configuration cannot be run. The message names the field and its value."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged, or of another model. The message names its path."""


class TrainingDiverged(UserError, RuntimeError):
    """The loss is no longer a number."""


class CaptureFailed(UserError, RuntimeError):
    """A step cannot be recorded as a CUDA graph."""
