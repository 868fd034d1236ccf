"""Every chart described once, without a plotting library: panels of series with their axes, built from `RunAnalysis`.

`mpl` draws them into pictures, `page` into the interactive report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pdbench.analysis.curves import series
from pdbench.records import DeviceRecord, Interval
from pdbench.report import text
from pdbench.report.text import translate as _

INK, MUTED, FAINT, PAPER = "#1f2933", "#5f6b7a", "#dfe3e8", "#ffffff"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
GREY, BAD, GOOD = "#9aa5b1", "#B3261E", "#00704F"
SHADES = {
    "prefill": VERMILLION,
    "decode": BLUE,
    "single": GREEN,
    "replica": PURPLE,
    "replicas": PURPLE,
    "tensor-parallel": ORANGE,
    "disaggregated": BLUE,
    "queue": YELLOW,
    "kv_transfer": GREEN,
    "other": FAINT,
    "proxy": "#7b8794",
    "bench": SKY,
}
SPARE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES = ("solid", "dash", "dot", "dashdot")
Kind = Literal["line", "step", "points", "bar", "hbar", "area", "boxes", "interval"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, set of points, bars or boxes. NaN in `y` breaks a line.

    boxes: `x` holds (start, end) pairs, `y` rows of height 1. interval: `low` and `high` bound each `x`, NaN where there is none.
    `behind` draws on a second vertical axis behind the panel. `labels` are texts beside the points or bars. `marker` marks the points
    of a line.
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
    behind: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`label` with its unit. `ticks` are positions and labels, `names` the categories of bars; `low` and `high` where it is cut."""

    label: str = ""
    log: bool = False
    integer: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Series that share axes. Without series, `not_measured` says why.

    `rows` are (name, values, judgement) texts beside an interval panel. `spread` holds values whose histogram stands beside the
    panel, with `marks` (p50 -> value). `lines` are dotted verticals, `pauses` stretches of x left blank. `behind` is the axis of the
    series behind, None for one without scale.
    """

    title: str
    series: Sequence[Series]
    x: Axis = Axis()
    y: Axis = Axis()
    behind: Axis | None = None
    not_measured: str = ""
    stacked: bool = False
    rows: Sequence[tuple[str, str, str]] = ()
    spread: Any = None
    marks: Mapping[str, float] = field(default_factory=dict)
    lines: Sequence[float] = ()
    pauses: Sequence[Interval] = ()
    height: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels that belong together. `below` puts them below each other on one horizontal axis, else beside each other."""

    key: str
    title: str
    panels: Sequence[Panel]
    caption: str = ""
    below: bool = False

    @property
    def drawable(self) -> bool:
        return any(panel.series for panel in self.panels)


def shade(name: str, place: int = 0) -> str:
    """The colour of a role, phase or deployment; other names take the spare colour at `place`."""
    return SHADES.get(name, SPARE[place % len(SPARE)])


def shades(names: Sequence[str]) -> list[str]:
    """A colour for each, no two the same as long as the palette lasts."""
    taken: list[str] = []
    for name in names:
        usual = SHADES.get(name)
        free = [spare for spare in SPARE if spare not in taken]
        taken.append(usual if usual and usual not in taken else (free or SPARE)[0])
    return taken


def dash(number: int) -> str:
    """The line style of the run at `number`, so that the palette may repeat."""
    return DASHES[number // len(SPARE) % len(DASHES)]


def monitored(devices: Sequence[DeviceRecord], title: str) -> Chart:
    """Devices alone: power with utilisation behind, clocks, temperature, power against utilisation; those that were measured."""
    colours = shades([device.role or device.id for device in devices])
    # Beside GPUs the host's CPU use would be the larger surface and say less.
    behind = [device for device in devices if device.kind == "gpu"] or devices
    used = "gpu_utilization_pct" if behind is not devices else "cpu_utilization_pct"
    use = Axis(label=text.label(used), low=0)

    def lines(field_name: str, among: Sequence[DeviceRecord] = devices, more: str = "", **look: Any) -> list[Series]:
        drawn = []
        for device, colour in zip(devices, colours, strict=True):
            x, y = series(device, field_name)
            if len(x) and device in among:
                holes = (
                    np.flatnonzero(np.diff(x) > max(1.0, 10 * float(np.median(np.diff(x))) if len(x) > 1 else 1.0)) + 1
                )
                name = device.id if device.role is None else f"{device.role} ({device.id})"
                name = "" if look.get("behind") else f"{name} {more}".strip()
                drawn.append(
                    Series(
                        name=name, x=np.insert(x, holes, np.nan), y=np.insert(y, holes, np.nan), shade=colour, **look
                    )
                )
        return drawn

    power = lines("power_w", width=1.1)
    filled = lines(used, behind, kind="area", opacity=0.16, behind=True)
    clocks = [
        *lines("sm_clock_mhz"),
        *lines("memory_clock_mhz", more=_("memory"), dash="dash"),
        *lines("cpu_clock_mhz"),
    ]
    points = []
    for device, colour in zip(devices, colours, strict=True):
        # Utilisation is a mean over about 1 s, so power's own 1 s mean goes with it where there is one.
        pairs = [
            (sample.gpu_utilization_pct, sample.power_w if sample.power_average_w is None else sample.power_average_w)
            for sample in device.samples
        ]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            x, y = zip(*pairs, strict=True)
            points.append(
                Series(kind="points", name=device.role or device.id, x=x, y=y, shade=colour, opacity=0.45, size=3.7)
            )
    seconds = Axis(label=_("seconds"))
    watts = Axis(label=text.label("power_w"), low=0)
    panels = [
        Panel(title=_("Power, with utilisation behind it"), series=[*filled, *power], x=seconds, y=watts, behind=use)
        if power
        else Panel(title=_("Utilisation"), series=lines(used), x=seconds, y=use),
        Panel(title=_("Clocks"), series=clocks, x=seconds, y=Axis(label=_("clock, MHz"), low=0)),
        Panel(
            title=_("Temperature"), series=lines("temperature_c"), x=seconds, y=Axis(label=text.label("temperature_c"))
        ),
        Panel(title=_("Power against utilisation"), series=points, x=Axis(label=text.label(used), low=-2), y=watts),
    ]
    intervals = [value for device in devices if (value := device.sampling.get("p50_ms")) is not None]
    fine = [value for device in devices if (value := device.sampling.get("fine_interval_ms")) is not None]
    parts = [" · ".join(dict.fromkeys(_(device.name) for device in devices))]
    parts += [_("samples every {0} ms", f"{np.median(intervals):.0f}")] if intervals else []
    parts += [_("power curve every {0} ms", f"{np.median(fine):.0f}")] if fine else []
    for field_name in ("power_w", "temperature_c"):
        if not any(len(series(device, field_name)[0]) for device in devices):
            why = "; ".join(
                dict.fromkeys(_(device.not_measured.get(field_name, "this device has none")) for device in devices)
            )
            parts.append(_("{0} not measured: {1}", text.title(field_name), why))
    return Chart(
        key="monitor", title=title, panels=[panel for panel in panels if panel.series], caption="\n".join(parts)
    )
