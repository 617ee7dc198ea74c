"""The runtime of commands: error messages, durable files, progress bars and signals.

Nothing here depends on models or corpora, or imports torch.
"""

from .errors import UserError

__all__ = ["UserError"]
