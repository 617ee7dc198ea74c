"""Errors of a run that its user can mend."""

from ..runtime import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run, with the field and its value."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model, with its path."""


class TrainingDiverged(UserError, RuntimeError):
    """The loss is no longer a number."""


class CaptureFailed(UserError, RuntimeError):
    """A step cannot be recorded as a CUDA graph."""
