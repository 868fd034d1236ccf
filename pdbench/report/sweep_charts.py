"""The curves of a sweep, with the knee marked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pdbench.report import text
from pdbench.report.chart_types import BAD, Axis, Chart, Panel, Series, shades
from pdbench.report.charts import ttft_parts
from pdbench.report.tables import SweepRow


def curves(rows: Sequence[SweepRow]) -> Chart:
    """Latencies against throughput with their knees; goodput and energy (tokens/s without a meter) against the first option; TTFT's parts
    at every point."""
    metered = any(text.value(run, "j_per_output_token") is not None for _varied, run in rows)
    cost = "j_per_output_token" if metered else "output_tokens_per_s"
    limits = text.slo(rows[0][1].config.get("load") or {})
    within = " and ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items())
    panels = [
        _panel(rows, "ttft_p99_ms", "TTFT p99 against throughput"),
        _panel(rows, "tbt_p99_ms", "TBT p99 (every gap) against throughput"),
        _panel(rows, "goodput_requests_per_s", f"Goodput: requests/s with {within or 'the SLO met'}", by_option=True),
        _panel(rows, cost, text.title(cost) + ("" if metered else " (energy is not measured)"), by_option=True),
    ]
    names = [run.name for _varied, run in rows]
    by_deployment = sorted(rows, key=lambda row: names.index(row[1].name))
    parts = ttft_parts({", ".join([run.name, *_settings(varied)]): run for varied, run in by_deployment}).panels[0]
    panels += [parts] if parts.series else []
    keys = [*map(text.option, rows[0][0])]
    caption = f"numbers at the points: {keys[0]}"
    return Chart(key="sweep", title=f"Sweep over {', '.join(keys)}", panels=panels, caption=caption)


def _settings(varied: Mapping[str, Any]) -> list[str]:
    """`rate 16` of each varied option."""
    return [f"{text.option(key)} {text.option_value(value)}" for key, value in varied.items()]


def _panel(rows: Sequence[SweepRow], metric: str, title: str, by_option: bool = False) -> Panel:
    """`metric` against throughput with each curve's knee, or against the first option. A curve per deployment and other options."""
    option, *others = rows[0][0]
    groups: dict[str, list[tuple[Any, float, str]]] = {}
    for varied, run in rows:
        at = varied[option] if by_option else text.value(run, "output_tokens_per_s")
        value = text.value(run, metric)
        if at is not None and value is not None:
            name = " ".join([run.name, *_settings({key: varied[key] for key in others})])
            groups.setdefault(name, []).append((at, value, text.option_value(varied[option])))
    drawn: list[Series] = []
    knees: list[tuple[float, float]] = []
    for (name, points), shade in zip(groups.items(), shades([*groups]), strict=True):
        x, y, labels = zip(*points, strict=True)
        if not all(isinstance(at, int | float) and not isinstance(at, bool) for at in x):
            x = tuple(map(str, x))
        drawn.append(Series(name=name, x=x, y=y, shade=shade, marker="o", labels=() if by_option else labels))
        bend = None if by_option else knee(x, y)
        knees += [] if bend is None else [(x[bend], y[bend])]
    if knees:
        x, y = zip(*knees, strict=True)
        drawn.append(Series(kind="points", name="knee", x=x, y=y, shade=BAD, size=15, hollow=True))
    integer = all(isinstance(at, int) for points in groups.values() for at, _value, _label in points)
    high = max((1.15 * value for points in groups.values() for _at, value, _label in points), default=None)
    return Panel(
        title=title,
        series=drawn,
        x=Axis(label=text.option(option) if by_option else text.label("output_tokens_per_s"), integer=integer),
        y=Axis(label=text.label(metric), low=0, high=high or None),
        not_measured=text.NEEDS_SLO if metric.startswith("goodput") else "",
    )


def knee(throughput: Sequence[float], latency: Sequence[float]) -> int | None:
    """The index of a curve's knee: the inner point farthest below the diagonal of both axes scaled to 0..1; None without.

    Source: Satopaa and others, "Finding a Kneedle in a Haystack" (2011), for one convex curve without smoothing.
    """
    x, y = np.asarray(throughput, dtype=float), np.asarray(latency, dtype=float)
    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or not np.ptp(x) or not np.ptp(y):
        return None
    below = (x - x.min()) / np.ptp(x) - (y - y.min()) / np.ptp(y)
    place = int(below.argmax())
    return place if below[place] > 0 and 0 < place < len(x) - 1 else None
