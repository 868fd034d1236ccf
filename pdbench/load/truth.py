"""The client's truth about itself: how late it sent and read, what it cost, which window counts, and when not to trust it.

Pure functions over records and counters. Beyond the bounds below a run is marked "client-limited", with the remedy.
Try: pytest tests/test_load_generator.py
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import msgspec
import numpy

from pdbench.records import Flag, RequestRecord

SEND_DELAY_P99_MS = 10.0
READ_DELAY_P99_MS = 20.0
MERGED_READ_DELAY_P99_MS = 5.0
MERGED_READS_SHARE = 0.01
USER_STAMP_LAG_P99_MS = 2.0
CPU_SHARE = 0.95
RATE_SHARE = 0.95
SHARE_OVER_S = 0.5
REMEDY = (
    "send fewer streams (--concurrency, --rate), raise --client-processes where cores are free, "
    "or run `pdbench bench --url` on another host"
)


class Part(msgspec.Struct, kw_only=True):
    """What one client process measured. `due_s` is, by request id, when it could have been sent; `streams` is how many it may
    have in flight (None: no bound); delays are raw float64 arrays."""

    requests: list[RequestRecord]
    due_s: dict[str, float]
    streams: int | None
    begin_s: float
    busy_s: bytes
    read_delays_s: bytes
    merged_reads: int
    cpu_s: float
    wall_s: float
    real_time: bool = False
    interrupted: bool = False
    steady_window: tuple[float, float] | None = None
    token_ids_refused: bool = False


def quantiles_ms(delays_s: Sequence[float] | numpy.ndarray) -> dict[str, float] | None:
    """{"p50", "p99", "max"} in milliseconds of delays in seconds; None of none."""
    if not len(delays_s):
        return None
    p50, p99, worst = numpy.quantile(numpy.asarray(delays_s, dtype=float), [0.5, 0.99, 1.0]) * 1e3
    return {"p50": float(p50), "p99": float(p99), "max": float(worst)}


def describe(
    parts: Sequence[Part], measured: Sequence[RequestRecord], *, streams: int | None, open_loop: bool
) -> dict[str, Any]:
    """What `Trial.client` holds: delays in ms, rates a second, CPU, how tokens were stamped and counted, failures by class."""
    due_s = {key: value for part in parts for key, value in part.due_s.items()}
    sent = [(record, record.sent_s) for record in measured if record.sent_s is not None]
    begin_s = min(part.begin_s for part in parts)
    read_delays = numpy.concatenate([numpy.frombuffer(part.read_delays_s) for part in parts])
    tokens = sum(len(record.token_s) for record in measured)
    cpu_s = sum(part.cpu_s for part in parts)
    return {
        "processes": len(parts),
        "streams": streams,
        "real_time": all(part.real_time for part in parts),
        "schedule_delay_ms": quantiles_ms([at_s - record.planned_s for record, at_s in sent]),
        "send_delay_ms": quantiles_ms([at_s - due_s[record.id] for record, at_s in sent]),
        "loop_lag_ms": quantiles_ms(numpy.concatenate([numpy.frombuffer(part.busy_s) for part in parts])),
        "user_minus_kernel_ms": quantiles_ms(read_delays),
        "reads": len(read_delays),
        "merged_reads": sum(part.merged_reads for part in parts),
        "asked_rate_per_s": _rate([record.planned_s for record, _ in sent], begin_s) if open_loop else None,
        "achieved_rate_per_s": _rate([at_s for _, at_s in sent], begin_s),
        "cpu_s": cpu_s,
        "cpu_share": max((part.cpu_s / part.wall_s for part in parts if part.wall_s > SHARE_OVER_S), default=None),
        "cpu_us_per_token": cpu_s / tokens * 1e6 if tokens else None,
        "stamps": dict(Counter(record.stamp for record in measured if record.stamp)),
        "counted_by": dict(Counter(record.counted_by for record in measured if record.counted_by)),
        "failures": dict(Counter(record.error.kind for record in measured if record.error)),
    }


def flags(client: dict[str, Any]) -> list[Flag]:
    """What a reader must know: client-limited with the reasons and the remedy, tokens that could not be counted."""
    reasons = _limits(client)
    found = [Flag("client-limited", f"{'; '.join(reasons)}: {REMEDY}")] if reasons else []
    if chunks := client["counted_by"].get("chunks", 0) + client["counted_by"].get("mixed", 0):
        detail = f"{chunks} answers without token ids: their token instants are those of chunks with text"
        found.append(Flag("tokens-counted-by-chunks", detail))
    asked, achieved = client["asked_rate_per_s"], client["achieved_rate_per_s"]
    if asked and achieved and client["streams"] and achieved < RATE_SHARE * asked:
        detail = f"{achieved:.2f} of {asked:.2f} requests/s sent: --concurrency {client['streams']} capped the streams"
        found.append(Flag("rate-not-reached", detail))
    return found


def _limits(client: dict[str, Any]) -> list[str]:
    reasons = []
    send, read, lag = client["send_delay_ms"], client["user_minus_kernel_ms"], client["loop_lag_ms"]
    if send and send["p99"] > SEND_DELAY_P99_MS:
        reasons.append(f"requests left {send['p99']:.1f} ms late at p99 (bound {SEND_DELAY_P99_MS:g})")
    if read and read["p99"] > READ_DELAY_P99_MS:
        reasons.append(f"bytes were read {read['p99']:.1f} ms late at p99 (bound {READ_DELAY_P99_MS:g})")
    elif (
        read
        and read["p99"] > MERGED_READ_DELAY_P99_MS
        and client["merged_reads"] > MERGED_READS_SHARE * client["reads"]
    ):
        share = client["merged_reads"] / client["reads"]
        reasons.append(f"{share:.0%} of reads held several chunks and reading was {read['p99']:.1f} ms late at p99")
    if client["stamps"].get("user") and lag and lag["p99"] > USER_STAMP_LAG_P99_MS:
        reasons.append(
            f"no kernel stamps and the loop lagged {lag['p99']:.1f} ms at p99 (bound {USER_STAMP_LAG_P99_MS:g})"
        )
    if client["cpu_share"] is not None and client["cpu_share"] > CPU_SHARE:
        reasons.append(f"the client used {client['cpu_share']:.0%} of its core (bound {CPU_SHARE:.0%})")
    asked, achieved = client["asked_rate_per_s"], client["achieved_rate_per_s"]
    if asked and achieved and not client["streams"] and achieved < RATE_SHARE * asked:
        reasons.append(f"{achieved:.2f} of {asked:.2f} requests/s were sent (bound {RATE_SHARE:.0%})")
    return reasons


def window(parts: Sequence[Part], open_loop: bool) -> tuple[float, float, str]:
    """(start_s, end_s, what it is): the time at full load, without ramp-up and drain; the whole run where that is no time.

    Closed loop: from the instant the asked streams were all in flight to the first that stayed empty, in whichever process. Open
    loop: from the first completion (until then the system only fills) to the last sending.
    """
    sent, ended = _sent_and_ended(record for part in parts for record in part.requests)
    if not sent or not ended:
        return 0.0, 0.0, "empty: no request was sent"
    whole = (sent[0], max(ended[-1], sent[-1]))
    if open_loop:
        start_s, end_s, name = ended[0], sent[-1], "first completion to last sending"
        enough = sum(start_s <= at_s <= end_s for at_s in ended) >= 2
    else:
        asked = sum(part.streams or 1 for part in parts)
        full = [_full(part.requests, part.streams or 1) for part in parts]
        start_s, end_s = max(start for start, _ in full), min(end for _, end in full)
        name = f"all {asked} streams in flight"
        enough = len(sent) >= 2 * asked
    if not enough or end_s <= start_s:
        return *whole, "whole run, ramp-up and drain included: too few requests for a time at full load"
    return start_s, end_s, name


def _sent_and_ended(records: Iterable[RequestRecord]) -> tuple[list[float], list[float]]:
    """When the measured requests were sent and when they ended, each in order."""
    sent = [record for record in records if not record.warmup and record.sent_s is not None]
    return (
        sorted(record.sent_s for record in sent if record.sent_s is not None),
        sorted(record.end_s for record in sent if record.end_s is not None),
    )


def _full(records: Sequence[RequestRecord], streams: int) -> tuple[float, float]:
    """From when to when all streams of one process were in flight; nothing (inf, -inf) if they never were."""
    sent, ended = _sent_and_ended(records)
    if not ended or len(sent) < streams:
        return inf, -inf
    return sent[streams - 1], next((at_s for at_s in ended if at_s > sent[-1]), max(ended[-1], sent[-1]))


def decode_window(measured: Sequence[RequestRecord]) -> tuple[float, float, str] | None:
    """The time in which every request of the batch decodes: last first token to first last token; None when there is none."""
    spans = [(record.token_s[0], record.token_s[-1]) for record in measured if record.token_s]
    if len(spans) < len(measured) or not spans:
        return None
    start_s, end_s = max(first for first, _ in spans), min(last for _, last in spans)
    return (start_s, end_s, "every request of the batch decodes") if end_s > start_s else None


def steady_since(samples: Sequence[tuple[float, int, int]], span_s: float, tolerance: float = 0.1) -> float | None:
    """The start of the last `span_s` (or a sample more) if the load held steady through it, else None.

    `samples` are (instant, tokens received so far, requests in flight). Steady: both halves of the span have token rates and
    mean requests in flight within `tolerance` of each other (or one request).
    """
    if not samples or samples[-1][0] - samples[0][0] < span_s:
        return None
    begin = max(index for index, sample in enumerate(samples) if sample[0] <= samples[-1][0] - span_s)
    recent = samples[begin:]
    middle = len(recent) // 2
    first, second = recent[: middle + 1], recent[middle:]
    if len(first) < 3 or len(second) < 3:
        return None
    rates = [(half[-1][1] - half[0][1]) / (half[-1][0] - half[0][0]) for half in (first, second)]
    flights = [sum(sample[2] for sample in half) / len(half) for half in (first, second)]
    steady_rate = min(rates) > 0 and abs(rates[1] - rates[0]) <= tolerance * max(rates)
    steady_flight = abs(flights[1] - flights[0]) <= max(1.0, tolerance * max(flights))
    return recent[0][0] if steady_rate and steady_flight else None


def _rate(instants_s: Sequence[float], begin_s: float) -> float | None:
    span_s = max(instants_s) - begin_s if instants_s else 0.0
    return len(instants_s) / span_s if span_s > 0 else None
