"""A saved run boiled down to what a report draws, so that a hundred runs fit: quantile curves, thinned curves, summaries.

Try: python -c "from pdbench.report.digest import digest; print(digest('single_results').summary['ttft_ms'])"
"""

import gc
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pdbench.analysis.metrics import Array, Measured, mean_ttft_parts_ms, measure
from pdbench.analysis.run_analysis import RunAnalysis, analyze
from pdbench.analysis.summary import summarize
from pdbench.records import Gate, Run, load_run
from pdbench.report.curves import curves_of, reasons, series
from pdbench.report.export import requests_csv
from pdbench.report.timeline import Span, Timeline, in_flight, spans
from pdbench.report.words import load_in_words, machine_in_words

Points = tuple[list[float | None], list[float | None]]
CURVE_POINTS, BIN_COUNT, SPANS = 700, 160, 300
SHARES = np.concatenate([np.linspace(0, 0.98, 120), np.linspace(0.981, 1, 60)])
CURVES = ("power_w", "cpu_utilization_pct", "sm_clock_mhz", "cpu_clock_mhz", "temperature_c")


@dataclass
class Digest:
    """What is kept of a run. `skeleton` is the run without requests, devices and events, for comparing how it was measured.

    `load` and `machine` are in words. `distributions` maps ttft, tbt, e2e to (ms, share) points; `parts_ms` is the mean TTFT taken apart; `tbt_over_time` maps
    p50 and p99 to a curve; `curves` maps a field to {label: (role, curve)}; `spans` or `in_flight` its requests behind.
    """

    name: str
    folder: str
    skeleton: Run
    summary: dict[str, Any]
    analysis: RunAnalysis
    load: str
    machine: str
    distributions: dict[str, Points]
    parts_ms: dict[str, float] | None
    tbt_over_time: dict[str, Points]
    ticks: tuple[list[float], list[str]] = ([], [])
    curves: dict[str, dict[str, tuple[str, Points]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    in_flight: Points = ([], [])


def digest(
    folder: Path | str,
    with_curves: bool = True,
    csv: Path | None = None,
    with_estimates: bool = True,
    language: str = "en",
) -> Digest:
    """Read one run and keep what is drawn; with `csv`, write all its requests there on the way."""
    run = load_run(folder)
    measured, timeline = measure(run), Timeline(run)
    if csv is not None:
        csv.write_text(requests_csv(run, measured, header=False))
    made = Digest(
        name=run.name,
        folder=str(folder),
        skeleton=_skeleton(run),
        summary=summarize(run, measured),
        analysis=analyze(run),
        load=load_in_words(run, language),
        machine=machine_in_words(run, language),
        distributions={
            "ttft": _quantile_curve(measured.ttft_ms),
            "tbt": _quantile_curve(measured.tbt_ms),
            "e2e": _quantile_curve(measured.e2e_ms),
        },
        parts_ms=mean_ttft_parts_ms(measured),
        tbt_over_time=_tbt_over_time(measured, timeline),
    )
    if with_curves:
        _add_curves(made, run, timeline)
    return made


def digests(
    folders: Sequence[Path], with_curves: int, with_estimates: int, csv_parts: Sequence[Path | None], language: str
) -> list[Digest]:
    """All of them, read by as many processes as there are cores; only the first ones get device curves and estimates."""
    jobs = [
        (folder, place < with_curves, part, place < with_estimates, language)
        for place, (folder, part) in enumerate(zip(folders, csv_parts, strict=True))
    ]
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers < 2 or len(jobs) < 8:
        return [digest(*job) for job in jobs]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the processes fill the cores already
    # Records hold no cycles, and looking for some among millions of them takes long.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        return list(pool.map(digest, *zip(*jobs, strict=True), chunksize=1))


def _skeleton(run: Run) -> Run:
    bare = Run(name=run.name, clock=run.clock, config=run.config, host=run.host, versions=run.versions, roles=run.roles)
    bare.flags = list(dict.fromkeys(run.flags))
    bare.gate = run.gate and Gate(**{name: getattr(run.gate, name) for name in Gate.__struct_fields__})
    return bare


def _quantile_curve(values: Array) -> Points:
    known = values[np.isfinite(values)]
    if not len(known):
        return [], []
    shares = SHARES if len(known) > len(SHARES) else np.linspace(0, 1, len(known))
    return _plain(_at(known, shares)), _plain(shares * 100, 2)


def _at(values: Array, shares: Array | Sequence[float]) -> Array:
    """Their quantiles, as numpy's but quicker for many."""
    return np.interp(np.asarray(shares) * (len(values) - 1), np.arange(len(values)), np.sort(values))


def _tbt_over_time(measured: Measured, timeline: Timeline) -> dict[str, Points]:
    """p50 and p99 of the gaps in each of 160 stretches of the drawn time that hold at least 5."""
    edges = np.linspace(0, timeline.length_s, BIN_COUNT + 1)
    stretch = np.clip(timeline.place(measured.tbt_s) / edges[1], 0, BIN_COUNT)  # a NaN stays one
    # Of 16-bit integers numpy makes a radix sort, several times faster than sorting the instants.
    stretch = np.nan_to_num(stretch, nan=BIN_COUNT).astype(np.int16)
    order = np.argsort(stretch, kind="stable")
    gaps = measured.tbt_ms[order]
    cuts = np.searchsorted(stretch[order], np.arange(BIN_COUNT + 1))
    held = [_at(gaps[first:last], (0.5, 0.99)) if last - first >= 5 else None for first, last in pairwise(cuts)]
    middles = _plain((edges[:-1] + edges[1:]) / 2)

    def curve(which: int) -> list[float | None]:
        return [None if part is None else round(float(part[which]), 4) for part in held]

    return {"p50": (middles, curve(0)), "p99": (middles, curve(1))} if len(gaps) else {"p50": ([], []), "p99": ([], [])}


def _add_curves(made: Digest, run: Run, timeline: Timeline) -> None:
    made.ticks = timeline.ticks()
    for name in CURVES:
        found: dict[str, tuple[str, Points]] = {}
        for device in curves_of(run):
            instants, values = series(device, name)
            if len(instants):
                label = f"{device.role or device.name} ({device.id})"
                found[label] = (device.role or "host", _thin(*timeline.curve(instants, values)))
        if found:
            made.curves[name] = found
        else:
            made.missing[name] = reasons(run, name)
    if len(run.requests) <= SPANS:
        made.spans = [
            Span(round(one.sent, 4), round(one.first, 4), round(one.end, 4), one.row, one.failed)
            for one in spans(run, timeline)
        ]
    else:
        grid, flying = in_flight(run, timeline, CURVE_POINTS)
        made.in_flight = (_plain(grid), _plain(flying))


def _thin(x: Array, y: Array) -> Points:
    """At most 700 points: of each stretch its lowest and its highest, so that no peak is lost; breaks stay breaks."""
    if len(x) > CURVE_POINTS:
        kept: list[int] = []
        for part in np.array_split(np.arange(len(x)), CURVE_POINTS // 2):
            known = part[np.isfinite(y[part])]
            broken = part[~np.isfinite(y[part])][:1]
            ends = {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])} if len(known) else set()
            kept += sorted({*ends, *map(int, broken)})
        x, y = x[kept], y[kept]
    return _plain(x), _plain(y, 2)


def _plain(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """Plain rounded numbers for JSON; NaN, which JSON lacks, as None."""
    return [None if value != value else round(float(value), digits) for value in values]
