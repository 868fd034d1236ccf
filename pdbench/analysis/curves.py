"""What charts draw of a run: quantile curves, time series on one drawn axis, request spans; thinned so that many runs fit."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from pdbench.analysis.energy import ROLE_ORDER, why_not_measured
from pdbench.analysis.intervals import union
from pdbench.analysis.metrics import Array, BoolArray, IntArray, Timings, mean_ttft_parts_ms, quantiles
from pdbench.analysis.power_curve import power_curve, sampled
from pdbench.analysis.servers import marks_of
from pdbench.records import Interval, RequestRecord, Run

FIELDS = (
    "power_w",
    "gpu_utilization_pct",
    "cpu_utilization_pct",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "cpu_clock_mhz",
    "temperature_c",
)
SERVER_FIELDS = {"running": 1.0, "waiting": 1.0, "kv_used": 100.0}
"""What is drawn of servers, and by what it is multiplied: requests, requests, per cent."""
SHARES = np.concatenate([np.linspace(0, 0.98, 120), np.linspace(0.981, 1, 60)])
CURVE_POINTS, BINS, SPANS, GAPS = 1000, 160, 3000, 10_000
MARGIN_S, APART_S, GAP_SHARE = 1.0, 5.0, 0.02
UNSAMPLED_S, UNSAMPLED_STEPS = 1.0, 5.0
"""Nothing was read, so a line is broken, where neighbouring points are further apart than this and than so many usual steps."""


class Curve(msgspec.Struct, frozen=True, eq=False):
    """Points of one line; NaN in `y` breaks it."""

    x: Array
    y: Array


class TimeAxis(msgspec.Struct, frozen=True, kw_only=True):
    """The run's time as drawn, in seconds: its trials side by side, the pauses between them left out.

    `stretches` (run clock) begin at `starts` (drawn), with drawn `pauses` between. Ticks are labelled in seconds of their trial, which
    begins with a stretch or at one of the `joints` (drawn).
    """

    stretches: list[Interval]
    starts: list[float]
    pauses: list[Interval]
    joints: list[float]
    length_s: float
    ticks: list[float]
    tick_labels: list[str]

    def place(self, instants: Array) -> Array:
        """Drawn positions of instants of the run's clock; NaN for those in a pause."""
        placed = np.full(instants.shape, np.nan)
        for (start, end), drawn in zip(self.stretches, self.starts, strict=True):
            inside = (instants >= start) & (instants <= end)
            placed[inside] = instants[inside] - start + drawn
        return placed


class Spans(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Requests as drawn boxes, warm-up included: drawn instants, a row such that boxes of one row do not overlap."""

    sent_s: Array
    first_s: Array
    end_s: Array
    row: IntArray
    failed: BoolArray


class Gaps(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """At most 10,000 gaps between tokens, evenly chosen; `x` drawn seconds, `request` the row in `RunAnalysis.requests`."""

    x: Array
    request: IntArray
    ms: Array


class Curves(msgspec.Struct, frozen=True, kw_only=True):
    """All lines of a run.

    `quantiles`: ttft, tbt (every gap), mean_tbt, e2e -> x in ms, y the per cent of values at or below. `tbt_over_time`: p50, p99 -> x
    drawn seconds, y ms. `devices`: a field of `FIELDS` -> a line per device, named as in `Summary.devices`, prefill first;
    `not_measured`: a field that no device has -> why. `servers`: a field of `SERVER_FIELDS` -> a line per server; `server_marks`: a flag (preempted, those of log lines) -> drawn instants. `spans` is None for more than 3,000 requests; `in_flight` (x drawn
    seconds, y requests, warm-up included) is always there.
    `ttft_parts_ms`: mean TTFT split into the phases that were reported and `other` (metrics.mean_ttft_parts_ms), None where none was.
    """

    axis: TimeAxis
    quantiles: dict[str, Curve]
    gaps: Gaps
    tbt_over_time: dict[str, Curve]
    ttft_parts_ms: dict[str, float] | None
    devices: dict[str, dict[str, Curve]]
    servers: dict[str, dict[str, Curve]]
    server_marks: dict[str, Array]
    not_measured: dict[str, str]
    spans: Spans | None
    in_flight: Curve


def curves_of(run: Run, timings: Timings) -> Curves:
    axis = time_axis(run)
    devices = sorted(run.devices, key=lambda device: (ROLE_ORDER.get(device.role or "", 2), device.label))
    lines = {
        field: {
            device.label: line
            for device in devices
            # Power is the driver's fine buffer where there is one.
            if (line := _line(power_curve(device) if field == "power_w" else sampled(device, field), axis))
        }
        for field in FIELDS
    }
    counted = {
        field: {
            series.server: line
            for series in run.servers
            if field in series.values
            and (line := _line(np.array([series.t_s, series.values[field]], dtype=float).T * (1.0, factor), axis))
        }
        for field, factor in SERVER_FIELDS.items()
    }
    chosen = np.linspace(0, len(timings.tbt_ms) - 1, min(len(timings.tbt_ms), GAPS)).astype(np.int64)
    requests = [request for request in run.requests if request.sent_s is not None and request.end_s is not None]
    requests.sort(key=lambda request: request.sent_s or 0.0)
    placed = axis.place(np.array([(r.sent_s, r.end_s) for r in requests], dtype=float).reshape(-1, 2))
    begins, ends = (np.sort(column[np.isfinite(column)]) for column in placed.T)
    grid = np.linspace(0, axis.length_s, CURVE_POINTS)
    in_flight = np.searchsorted(begins, grid, side="right") - np.searchsorted(ends, grid, side="right")
    return Curves(
        axis=axis,
        quantiles={name: _quantile_curve(latency.rising) for name, latency in timings.latencies.items()},
        gaps=Gaps(x=axis.place(timings.tbt_s[chosen]), request=timings.tbt_request[chosen], ms=timings.tbt_ms[chosen]),
        tbt_over_time=_tbt_over_time(timings, axis),
        ttft_parts_ms=mean_ttft_parts_ms(timings),
        devices={field: of_field for field, of_field in lines.items() if of_field},
        servers={field: of_field for field, of_field in counted.items() if of_field},
        server_marks={flag: axis.place(instants) for flag, instants in marks_of(run).items()},
        not_measured={field: why_not_measured(devices, (field,)) for field, of_field in lines.items() if not of_field},
        spans=_spans(requests, axis) if len(requests) <= SPANS else None,
        in_flight=Curve(grid, in_flight.astype(float)),
    )


def time_axis(run: Run) -> TimeAxis:
    """A stretch is a trial with its warm-up and a second on either side; trials less than 5 s apart share one. Samples alone begin with the first."""
    extents: list[Interval] = [(trial.start_s, trial.end_s) for trial in run.trials]
    extents += [(r.sent_s, r.end_s) for r in run.requests if r.sent_s is not None and r.end_s is not None]
    extents = extents or [(sample.t_s + MARGIN_S, sample.t_s) for device in run.devices for sample in device.samples]
    extents = extents or [(MARGIN_S, 1.0 - MARGIN_S)]
    joined = union([(start - MARGIN_S, end + MARGIN_S + APART_S) for start, end in extents])
    stretches = [(start, end - APART_S) for start, end in joined]
    lengths = np.array([end - start for start, end in stretches])
    gap_s = GAP_SHARE * float(lengths.sum())
    drawn = [0.0, *np.cumsum(lengths[:-1] + gap_s).tolist()]
    length_s = float(lengths.sum()) + gap_s * (len(stretches) - 1)
    rough = length_s / 10
    power = 10.0 ** np.floor(np.log10(max(rough, 0.1)))
    step = float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999))
    began: dict[int, float] = {trial.index: trial.start_s for trial in run.trials}
    for request in run.requests:  # warm-ups come before their trial's start
        if request.sent_s is not None:
            began[request.trial] = min(began.get(request.trial, request.sent_s), request.sent_s)
    joints, ticks = [], list[tuple[float, float]]()
    for (start, end), at in zip(stretches, drawn, strict=True):
        later = sorted(
            began_s - MARGIN_S - start + at for began_s in began.values() if start + MARGIN_S < began_s < end
        )
        joints += later
        for begin, until in pairwise([at, *later, at + end - start]):
            last = until not in later
            room = 0.0 if last else 0.4 * step  # so that two labels do not touch
            ticks += [(begin, tick) for tick in np.arange(0, until - begin - room + 1e-9, step)]
    return TimeAxis(
        stretches=stretches,
        starts=drawn,
        pauses=[(at - gap_s, at) for at in drawn[1:]],
        joints=joints,
        length_s=length_s,
        ticks=[at + float(tick) for at, tick in ticks],
        tick_labels=[f"{tick:g}" for _, tick in ticks],
    )


def _quantile_curve(rising: Array) -> Curve:
    if not len(rising):
        return Curve(rising, rising)
    shares = SHARES if len(rising) > len(SHARES) else np.linspace(0, 1, len(rising))
    return Curve(quantiles(rising, shares), shares * 100)


def _tbt_over_time(timings: Timings, axis: TimeAxis) -> dict[str, Curve]:
    """p50 and p99 of the gaps in each of 160 stretches of the drawn time that hold at least 5."""
    edges = np.linspace(0, axis.length_s, BINS + 1)
    place = np.clip(axis.place(timings.tbt_s) / edges[1], 0, BINS)
    # Of 16-bit integers numpy makes a radix sort, several times faster than sorting the instants.
    stretch = np.nan_to_num(place, nan=BINS).astype(np.int16)
    order = np.argsort(stretch, kind="stable")
    gaps = timings.tbt_ms[order]
    cuts = np.searchsorted(stretch[order], np.arange(BINS + 1))
    held = np.full((BINS, 2), np.nan)
    for number, (first, last) in enumerate(pairwise(cuts)):
        if last - first >= 5:
            held[number] = quantiles(np.sort(gaps[first:last]), np.array([0.5, 0.99]))
    middles = (edges[:-1] + edges[1:]) / 2
    return {"p50": Curve(middles, held[:, 0]), "p99": Curve(middles, held[:, 1])}


def _line(points: Array, axis: TimeAxis) -> Curve | None:
    """Rows of instant and value over the drawn axis, broken at each pause and where nothing was read; None without any. At most 1,000
    points: of each part its lowest and its highest, so that no peak is lost; breaks stay breaks."""
    if not len(points):
        return None
    x = axis.place(points[:, 0])
    points, x = points[np.isfinite(x)], x[np.isfinite(x)]
    steps = np.diff(points[:, 0])
    usual_s = float(np.median(steps)) if len(steps) else 0.0
    unsampled = np.flatnonzero(steps > max(UNSAMPLED_S, UNSAMPLED_STEPS * usual_s)) + 1
    ends = np.searchsorted(points[:, 0], [end for _, end in axis.stretches], side="right")
    breaks = np.union1d(ends, unsampled)
    x, y = np.insert(x, breaks, np.nan), np.insert(points[:, 1], breaks, np.nan)
    if len(x) <= CURVE_POINTS:
        return Curve(x, y)
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), CURVE_POINTS // 2):
        measured, broken = part[np.isfinite(y[part])], part[~np.isfinite(y[part])]
        extremes = [measured[y[measured].argmin()], measured[y[measured].argmax()]] if len(measured) else []
        kept += sorted({*map(int, extremes), *broken[:1].tolist()})
    return Curve(x[kept], y[kept])


def _spans(requests: Sequence[RequestRecord], axis: TimeAxis) -> Spans:
    free: list[float] = []
    rows = []
    for request in requests:
        sent_s, end_s = request.sent_s or 0.0, request.end_s or 0.0
        row = next((i for i, until in enumerate(free) if until <= sent_s), len(free))
        free[row : row + 1] = [end_s]
        rows.append(row)
    instants = [(r.sent_s, r.token_s[0] if r.token_s else r.end_s, r.end_s) for r in requests]
    sent, first, end = axis.place(np.array(instants, dtype=float).reshape(-1, 3)).T
    failed = np.array([request.error is not None for request in requests], dtype=bool)
    return Spans(sent_s=sent, first_s=first, end_s=end, row=np.array(rows, dtype=np.int64), failed=failed)
