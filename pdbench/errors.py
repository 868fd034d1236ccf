"""The one exception for what a user can fix: cli prints it as one line and exits with its code; what such lines are made of."""

import msgspec

NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
"""What reading JSON raises: of other types, broken, of no known letters, nested without end."""


class UserError(Exception):
    """What is wrong, where, and the remedy, in one line; `exit_code` is what the process ends with (1 unless told)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OptionError(UserError):
    """The value of one option that cannot be read or is outside its range, whatever the others say: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class WriteError(UserError):
    """A file that cannot be written, as on a full disk: whatever is measured next would be lost, too."""


class StartError(UserError):
    """Servers that did not start: the same ones would not start again for another load."""


def in_line(*texts: object, most: int | None = 200) -> str:
    """Text from elsewhere for a line of ours: no control characters, not endless."""
    return "".join(letter if letter.isprintable() else " " for letter in ", ".join(map(str, texts))[:most])


def span(seconds: float) -> str:
    """A time for people: 0.5 s, 90 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    days, minutes = divmod(minutes, 24 * 60) if minutes >= 48 * 60 else (0, minutes)
    hours, minutes = divmod(minutes, 60)
    units = ((days, "d"), (hours, "h"), (0 if days else minutes, "min"))
    return " ".join(f"{count} {unit}" for count, unit in units if count)
