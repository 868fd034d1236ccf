"""An instance's power from what it does, fitted over windows of 1 s; the joules of a simulated schedule."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from pdbench.analysis.arrivals import Array, IntArray
from pdbench.analysis.device_flags import IDLE_BUSY_PCT
from pdbench.analysis.energy import ENGINE_READY
from pdbench.analysis.intervals import union
from pdbench.analysis.meter import Meter
from pdbench.plan.engine import Costs, Limits
from pdbench.plan.instance import Instance
from pdbench.plan.records import PowerCosts
from pdbench.plan.steps import Steps, Visits
from pdbench.records import DeviceRecord, Interval

WINDOW_S = 1.0
LEAST_WINDOWS = 20


def windows_in(trial: Interval) -> Array:
    """The edges of a trial's whole windows."""
    return np.arange(trial[0], trial[1] + 1e-9, WINDOW_S, dtype=np.float64)


def use_of_steps(steps: Steps, limits: Limits, edges: Array) -> Array:
    """Rows of (decode share, sequences, prefill share, prompt tokens per second), one per window, of an instance that decodes."""
    lag, since, handed = limits.lag, steps.since, steps.handed_s
    running = since >= 1
    ends, begins = handed[running], handed[np.flatnonzero(running) - 1]
    # A prompt's step k takes the time from its scheduling, as step k - lag was handed out, to the next one's.
    holds = np.zeros(len(handed) + lag, dtype=bool)
    holds[: len(handed)][steps.prompt > 0] = True
    prefill = holds[lag - 1 :][: len(handed)][running]
    return np.stack(
        [
            _share(begins[~prefill], ends[~prefill], 1.0, edges),
            _share(begins, ends, steps.sequences[running], edges),
            _share(begins[prefill], ends[prefill], 1.0, edges),
            np.histogram(handed, edges, weights=steps.prompt)[0] / WINDOW_S,
        ],
        axis=1,
    )


def use_of_visits(visits: Visits, costs: Costs, edges: Array) -> Array:
    """The same of an instance that only prefills: it works as long as a prompt is there."""
    busy = np.array(
        union(list(zip(visits.sent_s + costs.way_in_s(visits.prompt), visits.done_s, strict=True)))
    ).reshape(-1, 2)
    nothing = np.zeros(len(edges) - 1)
    tokens = np.histogram(visits.done_s, edges, weights=visits.prompt)[0] / WINDOW_S
    return np.stack([nothing, nothing, _share(busy[:, 0], busy[:, 1], 1.0, edges), tokens], axis=1)


def _share(begins: Array, ends: Array, weights: Array | IntArray | float, edges: Array) -> Array:
    """Of each window the weighted share that the intervals, which follow each other, cover."""
    if not len(begins):
        return np.zeros(len(edges) - 1)
    parts = (ends - begins) * weights
    covered = np.cumsum(parts)
    at_s = np.maximum.accumulate(np.stack([begins, ends], axis=1).ravel())
    before = np.interp(edges, at_s, np.stack([covered - parts, covered], axis=1).ravel(), left=0.0)
    return np.diff(before) / WINDOW_S


def fit_power(measured: Sequence[tuple[Sequence[DeviceRecord], Array, Array]]) -> PowerCosts | None:
    """Least squares without negative costs; `measured` are (an instance's devices, window edges, use of the windows). None with too few
    windows, or without the idle power of a GPU that was idle."""
    watts, rows, idle = [], [], []
    for devices, edges, use in measured:
        meters = [Meter(device) for device in devices]
        for place, row in enumerate(use):
            window = [(float(edges[place]), float(edges[place + 1]))]
            powers_w = [meter.energy_in(window).mean_power_w for meter in meters]
            known_w = [power_w for power_w in powers_w if power_w is not None]
            if len(known_w) == len(devices):
                watts.append(sum(known_w))
                rows.append(row)
        ready_w = [
            watts_ready
            for device in devices
            if (watts_ready := device.idle_power_w.get(ENGINE_READY)) is not None
            and (device.idle_utilization_pct.get(ENGINE_READY) or 0.0) <= IDLE_BUSY_PCT
        ]
        if len(ready_w) == len(devices):
            idle.append(sum(ready_w))
    if len(rows) < LEAST_WINDOWS or not idle:
        return None
    idle_w, matrix = float(np.mean(idle)), np.array(rows)
    scale = np.maximum(matrix.max(axis=0), 1e-12)
    costs = nnls(matrix / scale, np.array(watts) - idle_w)[0] / scale
    residual = np.array(watts) - idle_w - matrix @ costs
    return PowerCosts(
        idle_w=idle_w,
        decode_w=idle_w + float(costs[0]),
        sequence_w=float(costs[1]),
        prefill_w=float(costs[2]),
        prompt_token_j=float(costs[3]),
        windows=len(rows),
        residual_w=float(np.sqrt(np.mean(residual**2))),
    )


def work_joules(use: Instance, costs: PowerCosts, window: Interval) -> float:
    """What an instance draws for its simulated work in a window, its idle power apart."""
    at_s, *work = np.array([(0.0,) * 5, *use.done]).T
    joules = np.array([costs.decode_w - costs.idle_w, costs.sequence_w, costs.prefill_w, costs.prompt_token_j]) @ work
    begin_j, end_j = np.interp(window, at_s, joules)
    return float(end_j - begin_j)
