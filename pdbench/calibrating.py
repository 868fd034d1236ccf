"""`pdbench calibrate`: the loads that identify the planner's costs, one deployment after the other, on the servers of one start each.

A load at full speed says where the ramps end and shows the largest steps, a burst of prompts shows prefill's steps with several of them, the
ramps pass through every load below. Sent and resumed as the points of a sweep.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from pdbench import sweep
from pdbench.analysis.run_analysis import load_analysis
from pdbench.config import DeploymentKind, LoadConfig, Options, flag_of
from pdbench.errors import UserError, WriteError, span
from pdbench.load.generator import Progress
from pdbench.plan.remedy import FULL_STREAMS
from pdbench.turns import START_S, TURN_S

FULL_REQUESTS = 96
BURST_STREAMS, BURST_REQUESTS = 8, 48
OTHERS_S = 60.0
"""What the full load and the burst take together, for estimates."""
LEAST_RAMPS, LEAST_RAMP_S = 2, 20.0
LEAST_REQUESTS = 40
"""Of a ramp; with fewer than 30 answers a trial calibrates nothing."""
FROM = 0.1
"""A ramp begins at this share of the rate at which it ends."""
SPREAD = 0.8
GIVEN = (
    "trace", "stages", "duration_s", "steady_s", "concurrency", "requests", "prompt_file", "shared_prefix", "phase",
)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """So many ramps of so many seconds for each deployment; `expected_s` for all of it."""

    ramps: int
    ramp_s: float
    expected_s: float


class Deadline:
    """Ends a load when the time is up (`trial.Judge`)."""

    def __init__(self, until_s: float) -> None:
        self._until_s = until_s

    def on_progress(self, progress: Progress) -> None: ...

    def decided(self) -> str | None:
        return "the time is up" if self.left_s <= 0 else None

    @property
    def left_s(self) -> float:
        return self._until_s - time.monotonic()


Measure = Callable[[DeploymentKind, Options, Path, Deadline], Path]


def spread(load: LoadConfig, max_model_len: int) -> LoadConfig:
    """The load with lengths that differ, as long as the model takes where none are given.

    Raises UserError for options that the calibration sets.
    """
    if given := load.given(GIVEN):
        raise UserError(f"{flag_of(given[0])}: a calibration decides it; leave it out (docs/plan.md)")
    if load.rate and not load.ramp_to:
        raise UserError("--rate without --ramp-to: give both for the ramps, or neither: then they are measured")
    longest_output = load.max_output_tokens or min(max_model_len // 3, 8 * load.output_tokens)
    longest_input = load.max_input_tokens or max(1, max_model_len - longest_output - 16)
    load = replace(load, input_tokens=load.input_tokens or max(1, longest_input // 4))
    if load.input_distribution == "fixed":
        load = replace(load, input_distribution="lognormal", input_spread=SPREAD)
    if load.output_distribution == "fixed":
        load = replace(load, output_distribution="lognormal", output_spread=SPREAD)
    return replace(load, max_input_tokens=longest_input, max_output_tokens=longest_output)


def schedule(kinds: Sequence[DeploymentKind], ramps: int, ramp_s: float, limit_s: float, *, on_gpu: bool) -> Schedule:
    """What fits into the time: shorter ramps first, then fewer. Raises UserError where too little does, and for what plan does not model."""
    if "tensor-parallel" in kinds or len(set(kinds)) < len(kinds):
        raise UserError(f"--against {','.join(kinds)}: give single, replicas and disaggregated, each once at most")
    fixed_s = START_S[on_gpu] + OTHERS_S
    each_s = limit_s / len(kinds) - fixed_s

    def expected_s(ramps: int, ramp_s: float) -> float:
        return len(kinds) * (fixed_s + ramps * (ramp_s + TURN_S))

    least_ramps, least_s = min(ramps, LEAST_RAMPS), min(ramp_s, LEAST_RAMP_S)
    ramps = max(least_ramps, min(ramps, int(each_s / (least_s + TURN_S))))
    ramp_s = max(least_s, min(ramp_s, float(int(each_s / ramps - TURN_S))))
    if expected_s(ramps, ramp_s) > limit_s:
        needed = span(round(expected_s(least_ramps, least_s)))
        raise UserError(
            f"--max-minutes {limit_s / 60:g}: {' and '.join(kinds)} with {least_ramps} ramps of {least_s:g} s each take about {needed}: "
            "give more time, or one deployment (--against)"
        )
    return Schedule(ramps, ramp_s, expected_s(ramps, ramp_s))


def points(kind: DeploymentKind, options: Options, plan: Schedule) -> list[sweep.Point]:
    """The loads of one deployment, without what the time decides: the same command with more of it goes on with them. A ramp without a rate
    gets it from the full load, once that is measured."""
    load = replace(options.load, rate=None, ramp_to=None, ramp_s=LoadConfig().ramp_s)
    full = replace(load, concurrency=FULL_STREAMS, requests=FULL_REQUESTS)
    loads = {"full": full}
    if kind == "disaggregated":
        loads["burst"] = replace(load, phase="prefill", concurrency=BURST_STREAMS, requests=BURST_REQUESTS)
    # More client processes are for the ramps: here each has at least one stream.
    loads = {
        name: replace(each, client_processes=min(each.client_processes, each.concurrency or 1))
        for name, each in loads.items()
    }
    for number in range(plan.ramps):
        seed = options.load.seed + 1 + number  # other arrivals and lengths in each
        loads[f"ramp-{number + 1}"] = replace(options.load, seed=seed)
    return [sweep.Point({"load": name}, replace(options, load=each)) for name, each in loads.items()]


def ramp(load: LoadConfig, out: Path, kind: DeploymentKind, most_s: float = math.inf) -> LoadConfig:
    """A ramp up to the throughput of the full load, in `most_s` where its servers took longer to start than was expected. Raises UserError where
    that throughput was not measured, or is too low for this time."""
    load = replace(load, ramp_s=min(load.ramp_s, max(LEAST_RAMP_S, round(most_s, 1))))
    if load.rate is None:
        folder = out / "load=full" / f"{kind}_results"
        if not folder.exists():
            raise UserError(
                f"{kind}: its full load was not measured, so nobody knows where the ramps end: give --rate and --ramp-to"
            )
        reached = load_analysis(folder).summary.throughput.requests_per_s
        if not reached:
            raise UserError(
                f"{folder}: no request ended, so nobody knows where the ramps end: give --rate and --ramp-to"
            )
        load = replace(load, rate=float(f"{FROM * reached:.3g}"), ramp_to=float(f"{reached:.3g}"))
    assert load.rate is not None and load.ramp_to is not None
    requests = (load.rate + load.ramp_to) / 2 * load.ramp_s
    if requests < LEAST_REQUESTS:
        raise UserError(
            f"{kind}: a ramp of {load.ramp_s:g} s from {load.rate:g} to {load.ramp_to:g} requests/s has {requests:.0f} requests, and a trial needs "
            f"{LEAST_REQUESTS}: give --ramp-s {2 * LEAST_REQUESTS / (load.rate + load.ramp_to):.0f} with more --max-minutes, or shorter lengths"
        )
    return load


def run(
    kinds: Sequence[DeploymentKind],
    options: Options,
    plan: Schedule,
    limit_s: float,
    out: Path,
    measure: Measure,
    console: Console,
) -> tuple[list[Path], list[str]]:
    """Measure what is missing in `out` until the time is up, the same time for each deployment that is left; returns the results folders, and
    what could not be measured: that of one deployment is no reason to leave out the next."""
    until_s = time.monotonic() + limit_s
    loads = {kind: points(kind, options, plan) for kind in kinds}
    console.print(
        f"calibration of {', '.join(kinds)}: one start each, {plan.ramps} ramps of {plan.ramp_s:g} s each: about {span(round(plan.expected_s))} "
        f"in all, at most {span(round(limit_s))}",
        soft_wrap=True,
    )
    found: list[Path] = []
    gaps: list[str] = []
    for place, kind in enumerate(kinds):
        now_s = time.monotonic()
        deadline = Deadline(now_s + (until_s - now_s) / (len(kinds) - place))
        failed: dict[str, list[str]] = {}  # why -> loads

        def send(
            options: Options,
            folder: Path,
            name: str,
            kind: DeploymentKind = kind,
            deadline: Deadline = deadline,
            failed: dict[str, list[str]] = failed,
        ) -> list[Path]:
            try:
                if deadline.left_s <= 0:
                    raise UserError("the time is up: give more --max-minutes")
                if options.load.concurrency is None:
                    left = plan.ramps - int(folder.name.rpartition("-")[2]) + 1
                    most_s = min(plan.ramp_s, deadline.left_s / left - TURN_S)
                    options = replace(options, load=ramp(options.load, out, kind, most_s))
                return [measure(kind, options, folder, deadline)]
            except UserError as error:
                failed.setdefault(str(error), []).append(folder.name.removeprefix("load="))
                raise

        try:
            for _, folders in sweep.run(loads[kind], out, send, console, {"calibration of": kind}, [kind]):
                found += folders
                if deadline.left_s < plan.ramp_s / 2:
                    console.print(f"{kind}: the time is up")
                    break
        except UserError as error:
            if not failed or isinstance(error, WriteError):  # nothing was tried, as `out` holds another calibration
                raise
        gaps += [f"{kind} ({', '.join(names)}): {why}" for why, names in failed.items()]
    return found, gaps


def saved(out: Path) -> str:
    """What is left of a calibration that was interrupted, for its last line."""
    done = len([*out.glob("*/point-*.json")])
    words = f"{done} {'load is' if done == 1 else 'loads are'} saved"
    whole = f"{words}: `pdbench plan {out}/*/*_results` reads them, the same command goes on" if done else ""
    return "; ".join(filter(None, (whole, sweep.cut_short(out))))
