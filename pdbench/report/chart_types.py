"""What a chart is, without a plotting library: panels of series with their axes, and the colours that all charts share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pdbench.records import Interval

INK, MUTED, FAINT, PAPER = "#1f2933", "#5f6b7a", "#dfe3e8", "#ffffff"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
GREY, BAD, GOOD = "#9aa5b1", "#B3261E", "#00704F"
SHADES = {
    "prefill": VERMILLION,
    "decode": BLUE,
    "single": GREEN,
    "replica": PURPLE,
    "replicas": PURPLE,
    "tensor-parallel": ORANGE,
    "disaggregated": BLUE,
    "send": "#c3cbd3",
    "api_server": SKY,
    "queue": YELLOW,
    "compute": VERMILLION,
    "handoff": GREEN,
    "kv_transfer": GREEN,
    "decode_wait": ORANGE,
    "decode_step": BLUE,
    "reply": PURPLE,
    "other": FAINT,
    "proxy": "#7b8794",
    "bench": SKY,
}
SPARE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES = ("solid", "dash", "dot", "dashdot")

Kind = Literal["line", "points", "bar", "hbar", "area", "boxes", "interval"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, set of points, bars or boxes; `labels` are texts beside its points or bars. NaN in `y` breaks a line;
    one of width 0 is only its points.

    boxes: `x` holds (start, end) pairs, `y` rows of height 1. interval: `low` and `high` bound each `x`.
    """

    kind: Kind = "line"
    name: str = ""
    x: Any
    y: Any
    low: Any = ()
    high: Any = ()
    labels: Sequence[str] = ()
    shade: str | Sequence[str] = INK
    opacity: float = 1.0
    dash: str = "solid"
    width: float = 1.5
    size: float = 5.0
    marker: str = ""
    hollow: bool = False
    hatch: str = ""

    @property
    def behind(self) -> bool:
        """Is it drawn behind the others, on a vertical axis of its own?"""
        return self.kind in ("area", "boxes")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`label` with its unit. `low` and `high` cut it. `ticks` are places with their labels, `names` the categories of bars or rows."""

    label: str = ""
    log: bool = False
    integer: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    names: Sequence[str] = ()


def log_axis(label: str, low: float, high: float, steps: Sequence[int] = (1, 2, 5)) -> Axis:
    """Logarithmic, with ticks at these steps of each decade."""
    places = [place for power in range(-3, 7) for step in steps if low <= (place := step * 10.0**power) <= high]
    return Axis(label=label, log=True, low=low, high=high, ticks=(places, [f"{place:g}" for place in places]))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Series that share axes. Without series, `not_measured` says why.

    `rows` are (values, verdict) of an interval panel, named by `y.names`. `spread` holds values whose histogram is drawn beside
    the panel, with `marks` (p50 -> value). `lines` are dotted verticals, `pauses` stretches of x left blank.
    """

    title: str
    series: Sequence[Series]
    x: Axis = Axis()
    y: Axis = Axis()
    not_measured: str = ""
    rows: Sequence[tuple[str, str]] = ()
    spread: Any = None
    marks: Mapping[str, float] = field(default_factory=dict)
    lines: Sequence[float] = ()
    pauses: Sequence[Interval] = ()
    height: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels beside each other, or below each other on one horizontal axis (`shared_x`)."""

    key: str
    title: str
    panels: Sequence[Panel]
    caption: str = ""
    shared_x: bool = False

    @property
    def drawable(self) -> list[Panel]:
        return [panel for panel in self.panels if panel.series]


def shades(names: Sequence[str]) -> list[str]:
    """A colour for each role, phase or deployment, no two the same as long as the palette lasts."""
    taken: list[str] = []
    for name in names:
        usual = SHADES.get(name)
        free = [spare for spare in SPARE if spare not in taken]
        taken.append(usual if usual and usual not in taken else (free or SPARE)[0])
    return taken
