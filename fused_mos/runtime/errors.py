"""The base class of all errors that a user can fix."""


class UserError(Exception):
    """Tells in one line what is wrong and what to do. A command prints that line and exits with status 2."""
