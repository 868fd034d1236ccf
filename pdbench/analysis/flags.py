"""What a reader must know wherever a run's figures appear: the run's own flags (a failed gate among them), and its devices'."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from pdbench import failures
from pdbench.analysis.device_flags import clocks_set, device_flags
from pdbench.analysis.energy import Energy, phase_flags
from pdbench.analysis.intervals import intersection, length_s, union
from pdbench.analysis.meter import Meter
from pdbench.analysis.metrics import Timings, inside
from pdbench.analysis.servers import PrefixCache, prefix_cache_flags, server_flags
from pdbench.analysis.slo import undecided_flag
from pdbench.analysis.stalls import server_stalled
from pdbench.analysis.windows import few_per_stream, ramps_in_window, rate_uncertain
from pdbench.events import PromptEvent, ServerSeries, ways_of
from pdbench.records import Flag, Interval, Run

COLD_FACTOR = 2.0
COLD_FIRST, COLD_OTHERS = 4, 8
WHOLE_PCT, WHOLE_TOKENS = 10.0, 4
"""Above this share of answers (of so many tokens or more) that came at one instant, something holds streams back."""
HOST_FACTOR = 2.5
"""A prompt that takes this many times as long as it keeps prefill's GPU busy waits for the host. Prompts that share a step count it each."""
STEP_FACTOR = 1.5
"""... where prefill computes for this many times as long as its GPU is busy, prompts that share a step counted once. Measured on H100 and
H200: 1.6 to 4.4 without graphs of the prompts' length, 1.1 with."""
BEYOND_PCT, BEYOND_FACTOR = 5.0, 1.3
"""So many prompts in steps of more tokens than any CUDA graph, which take so many times as long per token. Measured on four H100s with graphs
of two prompts: steps of one and two took 18 and 14 us per token, of three and four 19 to 25."""
FRONT_STEPS, FRONT_MS, FRONT_FEWEST = 4.0, 20.0, 20
"""An engine takes what has come once per step. Measured on H100s: decode's requests waited 0.9 to 2 steps for it (p50), 8 where its API
server was at its limit."""
STEAL_PCT = 5.0
"""Of the cores' time. Where all cores are busy, servers and client are slower by as much, which is as much as a comparison calls a change."""
DERIVED = {
    "prefix-cache-hit", "cold-start", "answers-at-once", "tokens-together", "prefill-waits-for-host", "steps-beyond-graphs",
    "api-server-busy", "server-stalled", "clocks-set", "device-lost", "cpu-steal",
    "energy-coarse", "energy-residual", "energy-counter-reset", "energy-counter-still", "power-still", "power-gaps", "idle-busy", "short-window", "throttled", "requests-failed", "preempted", "kv-full",
    "kv-not-external", "queue-grows", "other-traffic", "few-per-stream", "ramps-in-window", "slo-undecided", "rate-uncertain",
}  # fmt: skip
"""Flags that come from what is saved alone: with more trials they hold other figures, and may not hold at all."""


def flags_of(
    run: Run, timings: Timings, meters: Sequence[Meter], cache: PrefixCache | None, energy: Energy
) -> list[Flag]:
    """The run's flags, each once, then those of its requests, servers and devices over the measured windows that it lacks yet."""
    windows = [(trial.start_s, trial.end_s) for trial in run.trials if trial.end_s > trial.start_s]
    servers = [*server_flags(run), *server_stalled(run, timings)]
    again = {"requests-failed", *(flag.name for flag in servers)}  # a run that went on has more
    flags = [flag for flag in dict.fromkeys(run.flags) if flag.name not in again]
    # A saved run has its devices' flags already, perhaps in another version's words; a detail begins with the device (once without its host).
    present = {(flag.name, flag.detail.partition(": ")[0]) for flag in flags}
    names = {flag.name for flag in flags}
    found = [
        *prefix_cache_flags(run, cache),
        *cold_start(run, timings),
        *cpu_steal(run),
        *together(run, timings),
        *few_per_stream(run, timings),
        *ramps_in_window(run, timings),
        *rate_uncertain(run, timings),
        *undecided_flag(timings.slo),
        *waits_for_host(run, timings, meters, windows),
        *beyond_graphs(run, windows),
        *api_server_busy(run, timings, windows),
        *servers,
    ]
    flags += [flag for flag in found if flag.name not in names]
    if failed := failures.describe([request for request in run.requests if not request.warmup]):
        flags.insert(0, Flag("requests-failed", failed))
    flags.sort(key=lambda flag: flag.name != "server-died")  # what explains the others comes first
    held = [lock for lock in run.config.get("clocks_held") or () if lock.get("requested_clock_mhz") is not None]
    ours = {(lock.get("role"), lock.get("index")) for lock in held}
    for meter in meters:
        found = [*device_flags(meter, windows)]
        if (meter.device.role, meter.device.index) not in ours:
            found += clocks_set(meter, windows)
        flags += [
            flag
            for flag in found
            if not {(flag.name, name) for name in (meter.device.label, meter.device.id)} & present
        ]
    flags += [flag for flag in phase_flags(energy) if (flag.name, flag.detail.partition(": ")[0]) not in present]
    return flags


def cold_start(run: Run, timings: Timings) -> Iterator[Flag]:
    """A trial whose first requests took far longer than its second half: the warm-up did not reach the load's batch sizes.

    The first are a tenth (4 at least), in a closed loop one per stream. The median of their whole time, or (open loop) of their
    TTFT, is over twice what 90 % of the second half took. Only where the load is the same all the time.
    """
    load = run.config.get("load") or {}
    if any(load.get(name) for name in ("trace", "stages", "ramp_to")):
        return
    streams, requests = 0 if load.get("rate") else load.get("concurrency") or 1, timings.requests
    # In a closed loop all streams begin at once: their first prompts wait for each other, which later ones do not.
    figures = {"took": requests.e2e_ms} | ({} if streams else {"waited for a token": requests.ttft_ms})
    timed = requests.ok & np.isfinite(requests.e2e_ms)  # canaries that a cache may know are not
    for trial in run.trials:
        here = timed & (requests.trial == trial.index)
        first, half = max(COLD_FIRST, -(-int(here.sum()) // 10), streams), int(here.sum()) // 2
        if half < max(first, COLD_OTHERS):
            continue
        for words, values_ms in figures.items():
            early_ms = float(np.median(values_ms[here][:first]))
            usual_ms = float(np.quantile(values_ms[here][half:], 0.9))
            if early_ms > COLD_FACTOR * usual_ms:
                yield Flag(
                    "cold-start",
                    f"trial {trial.index + 1}: the first {first} requests {words} {early_ms:.0f} ms (median), 90 % of the second "
                    f"half at most {usual_ms:.0f} ms: measure again with --warmup {max(first, 2 * (load.get('warmup') or 0))}",
                )
                return


def cpu_steal(run: Run) -> Iterator[Flag]:
    """The trial during which the hypervisor took most of this host's cores, where that is too much: another guest took their time."""
    worst = max(run.trials, key=lambda trial: trial.cpu_steal_pct or 0.0, default=None)
    if worst and (worst.cpu_steal_pct or 0.0) > STEAL_PCT:
        yield Flag(
            "cpu-steal",
            f"trial {worst.index + 1}: the hypervisor took {worst.cpu_steal_pct:.0f} % of this host's CPU time: servers and client waited for cores; "
            "measure again while its other guests are idle, or on a host without",
        )


def together(run: Run, timings: Timings) -> Iterator[Flag]:
    """Answers whose tokens all came at once, so that TTFT is the whole answer's time; else most tokens with the one before, so that
    TBT p50 is 0 (accepted drafts of speculative decoding are meant to come so)."""
    requests = timings.requests
    long = requests.ok & (requests.output_tokens >= WHOLE_TOKENS)
    whole = int(np.count_nonzero(long & np.isnan(requests.mean_tbt_ms)))
    if 100 * whole > WHOLE_PCT * np.count_nonzero(long):
        held = f"{whole} of {np.count_nonzero(long)} answers came at one instant: something before the client holds streams back"
        yield Flag(
            "answers-at-once",
            f"{held}, their TTFT is the time of the whole answer and their TBT unknown: switch buffering off in the gateway or server "
            "(nginx: proxy_buffering off), or measure the server itself",
        )
    elif len(timings.tbt_ms) and not np.median(timings.tbt_ms) and not any(map(_speculates, run.servers)):
        share_pct = 100 * np.count_nonzero(timings.tbt_ms == 0) / len(timings.tbt_ms)
        yield Flag(
            "tokens-together",
            f"{share_pct:.0f} % of the tokens came with the one before: the server or a gateway sends several at a time, or drafts were accepted; "
            "TBT p50 and p90 say nothing: read the mean TBT",
        )


def _speculates(server: ServerSeries) -> bool:
    accepted = [count for count in server.values.get("accepted_tokens", ()) if count is not None]
    return bool(accepted) and accepted[-1] > 0


def waits_for_host(run: Run, timings: Timings, meters: Sequence[Meter], windows: Sequence[Interval]) -> Iterator[Flag]:
    """Prompts longer than prefill's CUDA graphs that take far longer than they keep its GPU busy: the host launches their kernels one by one."""
    engines = [engine for engine in run.engines.values() if engine.role == "prefill" and engine.graph_sizes is not None]
    samples = [each for meter in meters if meter.device.role == "prefill" for each in meter.samples_in(windows)]
    busy_pct = [each.gpu_utilization_pct for each in samples if each.gpu_utilization_pct is not None]
    # Short prompts that decode computed alone were not on this GPU, and neither was what came in ramp-up and drain.
    alone = timings.requests.first_sent_by("decode_alone")
    spans_s = timings.phase_s["compute"]
    here = inside(spans_s[:, 0], windows) & np.isfinite(spans_s[:, 1]) & ~alone
    tokens = timings.requests.prompt_tokens[here]
    if not engines or not busy_pct or not np.isfinite(tokens).any():
        return
    largest = max((size for engine in engines for size in engine.graph_sizes or ()), default=0)
    busy_s = float(np.mean(busy_pct)) / 100 * length_s(union(windows)) * len(engines)
    busy_ms, compute_ms = 1e3 * busy_s / len(tokens), 1e3 * float(np.diff(spans_s[here]).mean())
    # Prompts that share a step, or overlap, count once here.
    ways = ways_of(run.events)
    computed: dict[str | None, list[Interval]] = {}
    for row in np.flatnonzero(here):
        way = ways.get(timings.requests.id[row])
        computed.setdefault(way.prefill if way else None, []).append((spans_s[row, 0], spans_s[row, 1]))
    computing_s = sum(length_s(intersection(spans, windows)) for spans in computed.values())
    if np.nanmedian(tokens) > largest and compute_ms > HOST_FACTOR * busy_ms and computing_s > STEP_FACTOR * busy_s:
        graphs = f"CUDA graphs end at {largest} tokens" if largest else "there are no CUDA graphs"
        remedy = "--cudagraph-capture-sizes in --vllm-args" if largest else "--no-enforce-eager"
        yield Flag(
            "prefill-waits-for-host",
            f"a prompt of {np.nanmedian(tokens):.0f} tokens takes prefill {compute_ms:.0f} ms and keeps its GPU busy for {busy_ms:.0f}: "
            f"{graphs}, so the host launches its kernels one by one; with graphs of its length ({remedy}) TTFT may be far lower",
        )


def beyond_graphs(run: Run, windows: Sequence[Interval]) -> Iterator[Flag]:
    """Prompts that fit into a CUDA graph, computed in steps that do not: they take longer per token, so that a queue keeps itself long."""
    largest = {name: max(engine.graph_sizes) for name, engine in run.engines.items() if engine.graph_sizes}
    steps: dict[tuple[str, float], tuple[float, int, int]] = {}
    for event in run.events:
        if isinstance(event, PromptEvent) and event.prompt_tokens <= largest.get(event.server, 0):
            for begin_s, end_s, tokens in zip(event.begin_s, event.end_s, event.tokens, strict=False):
                _, others, prompts = steps.get((event.server, begin_s), (end_s, 0, 0))
                steps[event.server, begin_s] = end_s, others + tokens, prompts + 1
    here = inside(np.array([begin_s for _, begin_s in steps]), windows)
    steps = {key: step for (key, step), measured in zip(steps.items(), here, strict=True) if measured}
    for role in dict.fromkeys(engine.role for engine in run.engines.values()):
        # Per prompt token, by whether the step fits into a graph: milliseconds of the steps and how many prompts they had.
        rows: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        for (server, begin_s), (end_s, tokens, prompts) in steps.items():
            if run.engines[server].role == role != "decode" and tokens:
                rows[tokens <= largest[server]].append((1e3 * (end_s - begin_s) / tokens, prompts))
        if not rows[True] or not rows[False]:
            continue
        fullest = max(prompts for _, prompts in rows[True])
        within_ms = float(np.median([ms for ms, prompts in rows[True] if prompts == fullest]))
        beyond_ms, beyond = float(np.median([ms for ms, _ in rows[False]])), sum(prompts for _, prompts in rows[False])
        share_pct = 100 * beyond / (beyond + sum(prompts for _, prompts in rows[True]))
        if share_pct > BEYOND_PCT and beyond_ms > BEYOND_FACTOR * within_ms:
            limit = min(largest[server] for server, _ in steps if run.engines[server].role == role)
            yield Flag(
                "steps-beyond-graphs",
                f"{role}: {share_pct:.0f} % of the prompts were computed in steps of more than {limit} tokens, where the CUDA graphs end, and which "
                f"took {beyond_ms / within_ms:.1f} times as long per token: give --max-num-batched-tokens {limit} (or larger "
                "--cudagraph-capture-sizes) in --vllm-args",
            )


def api_server_busy(run: Run, timings: Timings, windows: Sequence[Interval]) -> Iterator[Flag]:
    """Decode instances whose engine gets requests many steps late: their API server is at its limit, the GPU is not."""
    gaps_ms = timings.tbt_ms[timings.tbt_ms > 0]
    arrived = [
        (event.server, event.arrived_s, event.taken_s)
        for event in run.events
        if isinstance(event, PromptEvent) and event.server.startswith("decode") and event.arrived_s and event.taken_s
    ]
    here = inside(np.array([at_s for _, at_s, _ in arrived]), windows)
    waits_ms: dict[str, list[float]] = {}
    for (server, at_s, taken_s), measured in zip(arrived, here, strict=True):
        if measured:
            waits_ms.setdefault(server, []).append(1e3 * (taken_s - at_s))
    medians_ms = {server: float(np.median(waits)) for server, waits in waits_ms.items() if len(waits) >= FRONT_FEWEST}
    if not medians_ms or not len(gaps_ms):
        return
    worst, step_ms = max(medians_ms, key=medians_ms.__getitem__), float(np.median(gaps_ms))
    if medians_ms[worst] > max(FRONT_MS, FRONT_STEPS * step_ms):
        serve = run.config.get("serve") or {}
        given = re.findall(r"--api-server-count[= ](\d+)", f"{serve.get('vllm_args')} {serve.get('decode_args')}")
        count = int(given[-1]) if given else 1
        yield Flag(
            "api-server-busy",
            f"{worst}: half of the requests came to its engine over {medians_ms[worst]:.0f} ms late, where a step takes {step_ms:.0f}: its API server is at "
            f'its limit, not its GPU: --decode-args "--api-server-count {2 * count}", or more decode instances',
        )
