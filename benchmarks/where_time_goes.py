"""Where the time of saved runs went: prefill's steps by their prompts, decode's parts of the pause, and TTFT by who sent the first token.

    python benchmarks/where_time_goes.py RESULTS_FOLDER... [--logs LOG_FOLDER... [--between FIRST_S LAST_S]] [--ttft-ms 300] [--against RESULTS_FOLDER]

Medians and 90 % quantiles in ms, from the events that the runs saved (`--logs`: from a `--log-dir`; `--between`: of prompts that came
so long after the first). `--against`: TTFT of those whose first
token prefill sent, over that of the other run's requests, with the 95 % interval of a paired t over the log ratios of their trials.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from pdbench import events
from pdbench.records import Run, load_run


def spread(values: Iterable[float]) -> str:
    found = [1e3 * value for value in values]
    return "{:.1f} / {:.1f}".format(*np.quantile(found, [0.5, 0.9])) + f" ({len(found)})" if found else "none"


def steps(found: list[events.Event]) -> None:
    """Steps of engines that prefill, by how many prompts they computed."""
    prompts: dict[tuple[str, float], list[float]] = defaultdict(list)
    for event in found:
        if isinstance(event, events.PromptEvent) and not event.server.startswith("decode"):
            for begin_s, end_s in zip(event.begin_s, event.end_s, strict=False):
                prompts[event.server, begin_s].append(end_s - begin_s)
    by_number: dict[int, list[float]] = defaultdict(list)
    for ends in prompts.values():
        by_number[len(ends)].append(ends[0])
    print("  steps:", *(f"{number} prompts {spread(took)};" for number, took in sorted(by_number.items())))


def pause(found: list[events.Event], *, by_decode: bool) -> None:
    """From the proxy's request to decode until the proxy has its first byte; and what passes on decode until the step begins that uses the KV."""
    received = {
        each.transfer_id: each for each in found if isinstance(each, events.TransferEvent) and each.side == "receive"
    }
    ways = {each.transfer_id: each for each in found if isinstance(each, events.ProxyEvent) and each.transfer_id}
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(where: str, names: Sequence[str], instants: Sequence[float | None]) -> None:
        for name, first, last in zip(names, instants, instants[1:], strict=False):
            if first is not None and last is not None:
                parts[where][name].append(last - first)

    for event in found:
        if not isinstance(event, events.PromptEvent) or not event.server.startswith("decode"):
            continue
        way = ways.get(event.transfer_id or "")
        if way is None or not event.begin_s or not event.end_s:
            continue
        instants = [
            way.decode_sent_s,
            event.arrived_s,
            event.taken_s,
            event.begin_s[0],
            event.end_s[-1],
            way.first_byte_s,
        ]
        server = event.server if by_decode else "decode"
        add(server, ("to API server", "to engine", "to step", "step", "to proxy"), instants)
        if kv := received.get(event.transfer_id or ""):
            names = ("to asking for KV", "until it is in the blocks", "until that is told", "until the step begins")
            instants = [event.taken_s, kv.asked_s, kv.end_s, kv.reported_s, event.begin_s[0]]
            add(f"{server}, to step", names, instants)
    for server, named in parts.items():
        print(f"  {server}:", *(f"{name} {spread(took)};" for name, took in named.items()))


def between(found: list[events.Event], first_s: float, last_s: float) -> list[events.Event]:
    """All events, but only the prompts that came so long after the first one."""
    prompts = {id(each): each.arrived_s for each in found if isinstance(each, events.PromptEvent) and each.arrived_s}
    begin_s = min(prompts.values())
    return [each for each in found if id(each) not in prompts or first_s <= prompts[id(each)] - begin_s < last_s]


def ttft(run: Run, limit_ms: float) -> None:
    by_origin: dict[str, list[float]] = defaultdict(list)
    for trial_ms in (values for _, values in sorted(first_tokens(run).items())):
        for origin, values in trial_ms.items():
            by_origin[origin] += values
    for origin, values in by_origin.items():
        p50, p99 = np.quantile(values, [0.5, 0.99])
        over = sum(value > limit_ms for value in values)
        print(
            f"  first token from {origin}: {len(values)}, TTFT p50 {p50:.1f}, p99 {p99:.1f}, over {limit_ms:g} ms: {over}"
        )


def first_tokens(run: Run) -> dict[int, dict[str, list[float]]]:
    """TTFT in ms by trial and by who sent the first token."""
    ways = events.ways_of(run.events)
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for request in run.requests:
        if request.warmup or request.error or not request.token_s or request.sent_s is None:
            continue
        way = ways.get(request.id)
        both = way is not None and way.prefill and way.decode
        origin = ("prefill" if way.first_token_s else "decode") if way and both else "the instance"
        found[request.trial][origin].append(1e3 * (request.token_s[0] - request.sent_s))
    return found


def ratio(run: Run, other: Run) -> None:
    ours, theirs = first_tokens(run), first_tokens(other)
    trials = sorted(ours.keys() & theirs.keys())
    for share in (0.5, 0.99):
        logs = [
            np.log(
                np.quantile(ours[each]["prefill"], share) / np.quantile(np.concatenate([*theirs[each].values()]), share)
            )
            for each in trials
        ]
        half = stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / len(logs) ** 0.5
        low, middle, high = np.exp([np.mean(logs) - half, np.mean(logs), np.mean(logs) + half])
        print(
            f"  TTFT p{100 * share:g} over the other run's: {middle:.3f} ({low:.3f} to {high:.3f}), {len(logs)} trials"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--logs", nargs="*", type=Path, default=[])
    parser.add_argument("--between", nargs=2, type=float, default=(0.0, float("inf")))
    parser.add_argument("--ttft-ms", type=float, default=300.0)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    for folder in options.runs:
        print(folder)
        run = load_run(folder)
        steps(run.events)
        pause(run.events, by_decode=False)
        ttft(run, options.ttft_ms)
        if options.against:
            ratio(run, load_run(options.against))
    for folder in options.logs:
        print(folder)
        lines = [line for path in sorted(folder.glob("*.events.jsonl")) for line in path.read_bytes().splitlines()]
        logged = between(events.parse(lines), *options.between)
        steps(logged)
        pause(logged, by_decode=True)


if __name__ == "__main__":
    main()
