"""A table as text, before it becomes rich, Markdown or HTML, and how its numbers are written.

Try: python -c "from pdbench.report.rows import Rows; from pdbench.report.tables import markdown; print(markdown(Rows('t', ['a'], [['1']], [''])))"
"""

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class Rows:
    """Title, header, rows (the first column is the row's name), a style a row, columns that hold words, a note below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    styles: list[str]
    left: tuple[int, ...] = (0,)
    note: str = ""


def figure(value: float | None) -> str:
    """A number with three significant digits, thousands apart; an en dash for what was not measured."""
    if value is None or not isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
