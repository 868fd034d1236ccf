"""Types of options with their ranges, which cyclopts checks: `Count[int]`, `Positive[float | None]`."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter, Token

T = TypeVar("T")


def _whole_number(kind: Any, tokens: Sequence[Token]) -> int:
    """Raises ValueError for anything else; cyclopts by default rounds 1.5 to 2."""
    text = tokens[0].value
    if not text.lstrip("+-").isdecimal():
        raise ValueError(f"{text!r} is not a whole number.")
    return int(text)


def _range(words: str, least: float, most: float, *, or_zero: bool = False) -> Parameter:
    """A validator for numbers. Raises ValueError, which cyclopts reports with the option's name."""

    def validate(kind: Any, value: float | None) -> None:
        within = value is None or (math.isfinite(value) and least <= value <= most) or (or_zero and value == 0)
        if not within:
            raise ValueError(f"Give {words}.")

    return Parameter(validator=validate)


_WHOLE = Parameter(converter=_whole_number)
MOST = 10_000_000
LEAST_NUMBER, MOST_NUMBER = 1e-9, 1e9
"""Beyond them sums of instants and clocks of the system overflow."""
Count = Annotated[T, _WHOLE, _range(f"1 to {MOST:,}", 1, MOST)]
Gpus = Annotated[T, _WHOLE, _range("1 to 10,000", 1, 10_000)]
CountOrZero = Annotated[T, _WHOLE, _range("0 or more", 0, math.inf)]
Port = Annotated[T, _WHOLE, _range("a port, 0 to 65535", 0, 65535)]
WarmUp = Annotated[T, _WHOLE, _range("0 to 10,000", 0, 10_000)]
Seconds = Annotated[T, _range("0.1 seconds or more, up to 1e9", 0.1, MOST_NUMBER)]
Spread = Annotated[T, _range("a spread from 0 to 3", 0, 3)]
Positive = Annotated[T, _range("a number above 0, 1e-9 to 1e9", LEAST_NUMBER, MOST_NUMBER)]
NotNegative = Annotated[T, _range("0 or more, up to 1e9", 0, MOST_NUMBER)]
Share = Annotated[T, _range("a share from 0 to 1", 0, 1)]
Interval = Annotated[T, _range("seconds from 0.01 to 10", 0.01, 10)]
IntervalOrZero = Annotated[T, _range("0, or seconds from 0.05 to 60", 0.05, 60, or_zero=True)]
