"""A prediction beside what was measured: another run's arrivals, replayed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from msgspec.structs import replace

from pdbench.analysis.run_analysis import analyze
from pdbench.config import is_open_loop
from pdbench.errors import UserError
from pdbench.plan import fit, seconds
from pdbench.plan.calibration import ALIKE, ALIKE_LIMITS, source_of
from pdbench.plan.deployment import role_of, sized
from pdbench.plan.engine import Demand, Deployment, Kind, Layout, Role
from pdbench.plan.limits import gpus_each, limits_of
from pdbench.plan.predict import DRAWS, UNCOUNTED_SLO, predict
from pdbench.plan.records import Calibration, Check
from pdbench.plan.steps import Part, parts_of
from pdbench.records import Run

LIMIT_WORDS = {"captured": "largest CUDA graph"}


def check(calibration: Calibration, path: Path, run: Run, draws: int = DRAWS) -> Check:
    """Predict `run` from its arrivals and lengths alone, and again with the speed of its own prefill steps known.

    The difference between the two is the machine's from one day to the next; what remains is the model's. Raises UserError for a
    deployment that is none of single, replicas and disaggregated, or a run without token instants.
    """
    if run.name not in get_args(Kind):
        raise UserError(f"{path} is of {run.name}: --check needs a run of single, replicas or disaggregated")
    parts = parts_of(path, run)
    trials = sorted({part.index for part in parts})
    counts: dict[Role, int] = {}
    for (role, _), number in Counter((part.role, part.index) for part in parts).items():
        counts[role] = max(counts.get(role, 0), number)
    layout = Layout(cast(Kind, run.name), counts)
    demands = [demand_of(run, next(part for part in parts if part.index == index)) for index in trials]
    differs = ["--return-kv"] if (run.config.get("serve") or {}).get("return_kv") else []
    for role in counts:
        calibration, limited = _as_served(calibration, run, role)
        differs += [f"{role}'s {LIMIT_WORDS.get(name, name)}" for name in limited]
        if sized(calibration, layout).gpus_each.get(role, 1) != gpus_each(run, role):
            differs.append(f"{role}'s GPUs per instance")
    analysis = analyze(run)
    slo = run.config.get("load") or {}
    limits = slo.get("slo_ttft_ms"), slo.get("slo_tbt_ms")
    if any(slo.get(name) for name in UNCOUNTED_SLO):
        limits = None, None  # the run's goodput is within those, too
    words = f"the arrivals of {path}"
    blind = predict(calibration, layout, lambda draw: demands, words, slo=limits, draws=draws, anyway=True)
    speeds: dict[tuple[int, Role], dict[str, Any]] = {
        (trial, role): own_speed(calibration, [p for p in parts if (p.index, p.role) == (index, role)])
        for trial, index in enumerate(trials)
        for role in counts
        if role != "decode"
    }

    def own(deployment: Deployment, trial: int) -> Deployment:
        engines = {
            role: replace(engine, costs=replace(engine.costs, **speeds.get((trial, role), {})))
            for role, engine in deployment.engines.items()
        }
        return replace(deployment, engines=engines)

    known = predict(calibration, layout, lambda draw: demands, words, slo=limits, speeds=own, draws=draws, anyway=True)
    measured = {name: figure.value for name, figure in analysis.figures.items()}
    tbt, goodput = analysis.summary.mean_tbt_ms, analysis.summary.goodput
    of_requests = (
        ("mean_tbt_p50_ms", tbt.p50 if tbt else None),
        ("slo_met_pct", goodput.met_pct),
        ("j_per_good_request", goodput.j_per_good_request),
    )
    measured |= {name: value for name, value in of_requests if value is not None}
    of_trials = {
        name: [min(figure.trials.values()), max(figure.trials.values())]
        for name, figure in analysis.figures.items()
        if figure.trials
    }
    source, others = source_of(path, run, parts), calibration.sources
    ids = {other.run_id or other.path for other in others}
    differs += [name for name in ALIKE if getattr(source, name) not in {getattr(other, name) for other in others}]
    requests = {
        request.id: request for part in parts for request in part.requests.values() if not request.warmup
    }  # of all trials, each once
    return Check(
        path=str(path),
        held_out=(source.run_id or source.path) not in ids,
        differs=differs,
        measured=measured,
        trials=of_trials,
        seconds_ms=seconds.parts_of_run(run, {*requests}),
        distributions_ms=seconds.distributions_of_requests([*requests.values()], run.config.get("load") or {}),
        predicted=blind,
        at_own_speed=known if blind.figures and all(speeds.values()) else None,
    )


def _as_served(calibration: Calibration, run: Run, role: Role) -> tuple[Calibration, list[str]]:
    """The calibration with this role's engines limited as the run's, and the limits that are not those of the runs that calibrated."""
    try:
        calibrated = role_of(calibration, role)
    except UserError:
        return calibration, []  # predict says what is missing
    limits, before = limits_of(run, role)[0], calibrated.engine.limits
    engine = replace(calibrated.engine, limits=limits)
    roles = {**calibration.roles, role: replace(calibrated, engine=engine)}
    pairs = {name: (getattr(limits, name), getattr(before, name)) for name in (*ALIKE_LIMITS, "kv_cache_tokens")}
    others = [name for name, (now, then) in pairs.items() if now != then and None not in (now, then)]
    return replace(calibration, roles=roles), others


def demand_of(run: Run, part: Part) -> Demand:
    """A trial's measured requests as they were sent; a closed loop as its streams."""
    requests = [request for request in part.requests.values() if not request.warmup]
    load: Mapping[str, object] = run.config.get("load") or {}
    is_open = is_open_loop(load)
    sent_s = np.array([request.sent_s for request in requests], dtype=float)
    split = run.name == "disaggregated"
    streams = load.get("concurrency")
    return Demand(
        t_s=sent_s - sent_s[0] if is_open else np.zeros(len(requests)),
        prompt_tokens=np.array([request.prompt_tokens for request in requests], dtype=int),
        output_tokens=np.array([len(request.token_s) for request in requests], dtype=int),
        cached_tokens=np.array([0 if split else request.cached_prompt_tokens or 0 for request in requests], dtype=int),
        streams=None if is_open else int(str(streams or 1)),
    )


def own_speed(calibration: Calibration, parts: Sequence[Part]) -> dict[str, Any]:
    """Fields of `Costs` with the speed of the prefill steps of a trial's instances of one role, and their series around
    it, one instance's after the other's; none if too few show it."""
    ratios, computing = [np.empty(0)], [np.empty(0, bool)]
    for part in parts:
        engine = role_of(calibration, part.role).engine
        costs = engine.costs
        if part.visits is not None:
            visits, alone = part.visits, part.visits.alone()
            tokens = visits.prompt[alone]
            took_s = (visits.done_s - visits.sent_s)[alone] - costs.way_in_s(tokens)
            ratios.append(took_s / costs.prompt_step_s(tokens, engine.limits.captured))
            computing.append(costs.by_gpu(tokens, engine.limits.captured))
        else:
            assert part.steps is not None
            chains = fit.chains([part.steps], [0], engine)
            if not len(chains.took_s):
                continue
            factors, measured, of_gpu = fit.prompt_factors(chains, costs, engine.limits)
            measured[:, 1:] &= chains.prompt[:, :-1] == 0  # after another prompt it may have waited for the GPU
            ratios.append(factors[measured])
            computing.append(of_gpu[measured])
    ratio = np.concatenate(ratios)
    if len(ratio) < fit.LEAST_STEPS:
        return {}
    speed = float(np.median(ratio))
    return fit.at_speed(costs, speed) | fit.series(ratio / speed, np.concatenate(computing), np.zeros(len(ratio), int))
