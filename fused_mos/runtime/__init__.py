"""How commands run: the errors they show, the files they leave, their progress bars, and the signals that stop them.

Nothing here knows a model or a corpus, or imports torch.
"""

from .errors import UserError

__all__ = ["UserError"]
