"""A run's time as it is drawn: its trials side by side, the pauses between them left out.

Try: python -c "
from pdbench.records import load_run; from pdbench.report.timeline import Timeline
print(Timeline(load_run('single_results')).stretches)"
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdbench.analysis.metrics import Array
from pdbench.records import RequestRecord, Run

MARGIN_S = 1.0
GAP_SHARE = 0.02
APART_S = 5.0


class Timeline:
    """Maps instants of the run to a drawn axis in seconds; `stretches` are the (start_s, end_s) that are drawn.

    A stretch is a trial with its warm-up and a second on either side; trials less than `APART_S` apart share one.
    """

    def __init__(self, run: Run) -> None:
        starts, ends = _extents(run)
        reached = np.maximum.accumulate(ends)
        breaks = np.flatnonzero(starts[1:] - reached[:-1] >= APART_S)
        edges = starts[[0, *(breaks + 1)]], reached[[*breaks, -1]]
        self.stretches: list[tuple[float, float]] = list(zip(*(edge.tolist() for edge in edges), strict=True))
        self.gap_s = GAP_SHARE * sum(end - start for start, end in self.stretches)
        self.starts: list[float] = []
        drawn = 0.0
        for start, end in self.stretches:
            self.starts.append(drawn)
            drawn += end - start + self.gap_s
        self.length_s = drawn - self.gap_s

    def place(self, instants: Array | Sequence[float]) -> Array:
        """Drawn positions of these instants; NaN for those in a pause that is left out."""
        known = np.asarray(instants, dtype=float)
        placed = np.full(known.shape, np.nan)
        for (start, end), at in zip(self.stretches, self.starts, strict=True):
            inside = (known >= start) & (known <= end)
            placed[inside] = known[inside] - start + at
        return placed

    def curve(self, instants: Array | Sequence[float], values: Array | Sequence[float | None]) -> tuple[Array, Array]:
        """A curve on the drawn axis, broken (NaN) between stretches so that no line crosses a pause."""
        known, heights = np.asarray(instants, dtype=float), np.asarray(values, dtype=float)
        pieces_x: list[Array] = []
        pieces_y: list[Array] = []
        pause = np.array([np.nan])
        for (start, end), at in zip(self.stretches, self.starts, strict=True):
            inside = (known >= start) & (known <= end)
            pieces_x += [known[inside] - start + at, pause]
            pieces_y += [heights[inside], pause]
        return np.concatenate(pieces_x), np.concatenate(pieces_y)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Where ticks stand and their labels: seconds since each stretch's start."""
        step = _round_step(self.length_s / 10)
        places, labels = [], []
        for (start, end), at in zip(self.stretches, self.starts, strict=True):
            for tick in np.arange(0.0, end - start + 1e-9, step):
                places.append(at + float(tick))
                labels.append(f"{tick:g}")
        return places, labels


class Span(NamedTuple):
    """A request as it is drawn: placed instants, the row it lies in, whether it failed."""

    sent: float
    first: float
    end: float
    row: int
    failed: bool


def spans(run: Run, timeline: Timeline) -> list[Span]:
    """Every request, warm-up included, in rows so that no two of one row overlap."""
    requests = sorted(
        (r for r in run.requests if r.sent_s is not None and r.end_s is not None), key=lambda r: r.sent_s or 0.0
    )
    rows, _ = lanes(requests)
    instants = [(r.sent_s or 0.0, r.token_s[0] if r.token_s else r.end_s or 0.0, r.end_s or 0.0) for r in requests]
    placed = timeline.place(np.array(instants, dtype=float).reshape(-1, 3)).tolist()
    return [
        Span(sent, first, end, row, request.error is not None)
        for (sent, first, end), row, request in zip(placed, rows, requests, strict=True)
    ]


def in_flight(run: Run, timeline: Timeline, points: int) -> tuple[Array, Array]:
    """How many requests, warm-up included, were under way at each of `points` places of the drawn axis."""
    known = [(r.sent_s, r.end_s) for r in run.requests if r.sent_s is not None and r.end_s is not None]
    placed = timeline.place(np.array(known, dtype=float).reshape(-1, 2))
    begins, ends = (np.sort(column[np.isfinite(column)]) for column in placed.T)
    grid = np.linspace(0, timeline.length_s, points)
    return grid, np.searchsorted(begins, grid, side="right") - np.searchsorted(ends, grid, side="right").astype(float)


def lanes(requests: Sequence[RequestRecord]) -> tuple[list[int], int]:
    """A row for each request so that no two of one row overlap in time, and the number of rows."""
    free: list[float] = []
    rows = []
    for request in requests:
        start, end = request.sent_s or 0.0, request.end_s or request.sent_s or 0.0
        row = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[row : row + 1] = [end]
        rows.append(row)
    return rows, max(len(free), 1)


def _extents(run: Run) -> tuple[Array, Array]:
    """Starts, rising, and ends of all that happened, with a margin; 0 to 1 s when nothing did."""
    extents = [(trial.start_s, trial.end_s) for trial in run.trials]
    extents += [(r.sent_s, r.end_s) for r in run.requests if r.sent_s is not None and r.end_s is not None]
    if not extents:
        extents = [(s[0].t_s, s[-1].t_s) for s in (device.samples for device in run.devices) if s]
    known = np.array(extents or [(MARGIN_S, 1.0 - MARGIN_S)], dtype=float)
    starts, ends = known[np.argsort(known[:, 0], kind="stable")].T
    return starts - MARGIN_S, ends + MARGIN_S


def _round_step(rough: float) -> float:
    """The next step of 1, 2, 5, 10, ... above `rough`, 0.1 at least."""
    power = 10.0 ** np.floor(np.log10(max(rough, 0.1)))
    return float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999))
