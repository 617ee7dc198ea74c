"""The base of all errors that a user can mend."""


class UserError(Exception):
    """Says in one line what was wrong and what to do; a command prints that line and exits with status 2."""
