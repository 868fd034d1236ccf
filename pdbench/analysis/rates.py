"""Figures that a trial has once: throughput, goodput, power, energy a token; with the luck that trials and their parts show.

Try: python -c "
from pdbench.records import load_run; from pdbench.analysis.metrics import measure; from pdbench.analysis.rates import rates
run = load_run('single_results'); print(rates(run, measure(run)))"
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from pdbench.analysis import statistics
from pdbench.analysis.energy import Meter
from pdbench.analysis.metrics import Array, Measured
from pdbench.analysis.statistics import Estimate
from pdbench.analysis.summary import device_count, meets_slo, meters
from pdbench.records import Run

PARTS = 5
_RATIOS = {
    "output_tokens_per_s": ("tokens", "length_s"),
    "output_tokens_per_s_per_device": ("tokens", "device_s"),
    "goodput_requests_per_s": ("good", "length_s"),
    "j_per_output_token": ("joules", "tokens"),
    "mean_power_w": ("joules", "length_s"),
}


def rates(run: Run, measured: Measured) -> dict[str, Estimate]:
    """Each of these figures that the run has, over all trials' windows together, with its variance."""
    tally = _tally_of(run, measured)
    trials = [np.array([trial.start_s, trial.end_s]) for trial in measured.trials]
    whole = [tally(edges, False) for edges in trials]
    parts = [tally(np.linspace(edges[0], edges[1], PARTS + 1), True) for edges in trials]
    found = {}
    for name, (above, below) in _RATIOS.items():
        top, bottom = (np.array([one[key][0] for one in whole]) for key in (above, below))
        if len(whole) and np.isfinite(top).all() and (bottom > 0).all():
            value = float(top.sum() / bottom.sum())
            within = statistics.of_parts(*(np.array([one[key] for one in parts]) for key in (above, below)))
            found[name] = statistics.of_trials(value, top / bottom, within)
    return found


def _tally_of(run: Run, measured: Measured) -> Callable[[Array, bool], dict[str, Array]]:
    """A function that says what came between neighbouring edges, an array a kind; NaN where that was not measured."""
    devices, count, met = [Meter(device) for device in meters(run)], device_count(run), meets_slo(run, measured)
    arrivals = np.sort(measured.token_s)
    start, end = (np.array([]) if met is None else instants[met] for instants in (measured.sent_s, measured.end_s))

    def tally(edges: Array, shared: bool) -> dict[str, Array]:
        """`shared` counts a good request in every part by its share of time there, else whole where it ended."""
        length_s = np.diff(edges)
        done = np.clip((edges[:, None] - start) / np.maximum(end - start, 1e-9), 0, 1).sum(axis=1)
        good = np.diff(done) if shared else _counts(np.sort(end), edges)
        return {
            "length_s": length_s,
            "device_s": length_s * (count or np.nan),
            "tokens": _counts(arrivals, edges),
            "good": length_s * np.nan if met is None else good,
            "joules": np.array([_joules(devices, *pair) for pair in pairwise(edges)]),
        }

    return tally


def _counts(rising: Array, edges: Array) -> Array:
    """How many of these instants lie between neighbouring edges, both ends included."""
    places = np.searchsorted(rising, edges)
    places[-1] = np.searchsorted(rising, edges[-1], side="right")
    return np.diff(places).astype(float)


def _joules(devices: list[Meter], start_s: float, end_s: float) -> float:
    """All meters together; NaN when there is none or one of them was not read."""
    each = [device.energy_in([(start_s, end_s)]).energy_j for device in devices]
    return float(np.sum([np.nan if joules is None else joules for joules in each or [None]]))
