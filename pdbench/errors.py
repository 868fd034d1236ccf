"""The one exception for what a user can fix: cli prints it as one line and exits with its code."""

import msgspec

NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
"""What reading JSON raises: of other types, broken, of no known letters, nested without end."""


class UserError(Exception):
    """What is wrong, where, and the remedy, in one line; `exit_code` is what the process ends with (1 unless told)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WriteError(UserError):
    """A file that cannot be written, as on a full disk: whatever is measured next would be lost, too."""


class StartError(UserError):
    """Servers that did not start: the same ones would not start again for another load."""
