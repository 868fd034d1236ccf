"""The client's check of itself: how late it sent and read, what it cost, which window counts, and when not to trust it.

Pure functions over records and counters. Beyond the bounds below a run is flagged "client-limited", with the remedy.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf, nextafter
from typing import Any

import numpy
from numpy.typing import NDArray

from pdbench.load.generator import ClientResult
from pdbench.records import Flag, Interval, RequestRecord

Instants = Sequence[float] | NDArray[numpy.float64]
SEND_DELAY_P99_MS = 10.0
READ_DELAY_P99_MS = 20.0
MERGED_READ_DELAY_P99_MS = 5.0
MERGED_READS_SHARE = 0.01
USER_STAMP_LAG_P99_MS = 2.0
CPU_SHARE = 0.95
RATE_SHARE = 0.95
SHARE_OVER_S = 0.5
STALLED_SHARE = 0.01
REFUSED_SHARE = 0.01
FILLED_SHARE, LEAST_ENDS = 0.9, 8
"""An open loop is full after this quantile of its requests' durations, where at least so many ends come later."""
_OWN = ("timeout", "stall", "interrupted")
"""Classes of failures that a slow client could have caused, or the user; in all others, a server failed at once."""
NOTES = {
    "usage-refused": "the server's usage holds a count that cannot be (negative, 0, no number, far beyond what came): not used",
    "usage-contradicts": "the server's usage contradicts what arrived; where there are no token ids, output tokens are unknown",
    "tokens-unknown": "several tokens per chunk and neither token ids nor usage: output tokens are unknown",
    "answers-too-long": "more tokens than were asked for: the server ignores the limit, figures are of longer answers",
    "prompt-tokens-differ": "the server counts over 2 % more or fewer prompt tokens than the tokenizer: it cuts prompts, or is of "
    "another model (--tokenizer); lengths are the server's",
    "tokens-held-back": "usage counts over 5 % more tokens than came: a parser of the server (tool calls, reasoning) sent several as one; gaps "
    "of these answers are not between tokens, they count as gaps between chunks",
    "reasoning-unknown": "usage counts reasoning, and neither text nor chunks tell whether it was sent: mean TBT of these answers is unknown",
    "unsent-unknown": "usage counts more tokens than chunks came, and nothing tells whether chunks hold several or these were not sent (a stop string, "
    "choices beside those sent): mean TBT of these answers is unknown",
    "malformed-after-finish": "an event after the finish_reason could not be read",
    "ended-by-usage": "neither finish_reason nor [DONE], only a usage event at the end: they may have been cut",
    "held-open": "the server ended neither the stream ([DONE]) nor the response after the finish_reason: the client waited 0.25 to 5 s each time "
    "before it used the stream again, so that requests/s and tokens/s of a closed loop are too low; latencies hold",
}
"""What is said of each of `RequestRecord.notes`."""
REMEDY = (
    "send fewer streams (--concurrency, --rate), raise --client-processes where cores are free, "
    "or run `pdbench bench --url` on another host"
)
REMEDY_OF_ONE = "end what else uses this host's cores, or run `pdbench bench --url` on another host"
"""For a single stream, of which there cannot be fewer."""


def quantiles_ms(delays_s: Sequence[float] | numpy.ndarray) -> dict[str, float] | None:
    """{"p50", "p99", "max"} in milliseconds of delays in seconds; None when there are no delays."""
    if not len(delays_s):
        return None
    quantiles = numpy.quantile(numpy.asarray(delays_s, dtype=float), [0.5, 0.99, 1.0]) * 1e3
    return dict(zip(("p50", "p99", "max"), quantiles.tolist(), strict=True))


def describe(
    results: Sequence[ClientResult], measured: Sequence[RequestRecord], *, streams: int | None, open_loop: bool
) -> dict[str, Any]:
    """`Trial.client`: delays in ms, rates per second, CPU, how tokens were stamped and counted, failures by class."""
    sent = [(record, record.sent_s) for record in measured if record.sent_s is not None]
    # Servers that refuse or end their connections make many requests due at once: no lateness of the client's.
    answered = [(record, at_s) for record, at_s in sent if record.error is None]
    begin_s = min(result.begin_s for result in results)
    late = [(record.due_s, at_s - record.due_s) for record, at_s in answered if record.due_s is not None]
    read_delays = numpy.concatenate([numpy.frombuffer(result.read_delays_s) for result in results])
    tokens = sum(len(record.token_s) for record in measured)
    cpu_s = sum(result.cpu_s for result in results)
    return {
        "processes": len(results),
        "streams": streams,
        "real_time": all(result.real_time for result in results),
        "schedule_delay_ms": quantiles_ms([at_s - record.planned_s for record, at_s in answered]),
        "send_delay_ms": quantiles_ms([delay_s for _, delay_s in late]),
        # Streams of a closed loop all begin at once, and leave one after the other: that is its ramp-up, no lateness.
        "send_delay_after_start_ms": quantiles_ms([delay_s for due_s, delay_s in late if open_loop or due_s > begin_s]),
        "loop_lag_ms": quantiles_ms(numpy.concatenate([numpy.frombuffer(result.busy_s) for result in results])),
        "user_minus_kernel_ms": quantiles_ms(read_delays),
        "reads": len(read_delays),
        "merged_reads": sum(result.merged_reads for result in results),
        "asked_rate_per_s": _rate([record.planned_s for record, _ in sent], begin_s) if open_loop else None,
        "achieved_rate_per_s": _rate([at_s for _, at_s in sent], begin_s),
        "cpu_s": cpu_s,
        "cpu_share": max(
            (result.cpu_s / result.wall_s for result in results if result.wall_s > SHARE_OVER_S), default=None
        ),
        "stalled_s": max(result.stalled_s for result in results),
        "stalled_share": max((result.stalled_s / result.wall_s for result in results if result.wall_s), default=0.0),
        "cpu_us_per_token": cpu_s / tokens * 1e6 if tokens else None,
        "stamps": dict(Counter(record.stamp for record in measured if record.stamp)),
        "counted_by": dict(Counter(record.counted_by for record in measured if record.counted_by)),
        "refused_share": sum(record.error is not None and record.error.kind not in _OWN for record, _ in sent)
        / max(1, len(sent)),
        "failures": dict(Counter(record.error.kind for record in measured if record.error)),
        "finish_reasons": dict(Counter(record.finish_reason or "none" for record in measured if not record.error)),
        "notes": dict(Counter(note for record in measured for note in record.notes)),
        "addresses": list(dict.fromkeys(address for result in results for address in result.addresses)),
    }


def flags(client: dict[str, Any]) -> list[Flag]:
    """What a reader must know: client-limited with the reasons and the remedy, tokens that could not be counted."""
    reasons = []
    send, read, lag = client["send_delay_after_start_ms"], client["user_minus_kernel_ms"], client["loop_lag_ms"]
    if send and send["p99"] > SEND_DELAY_P99_MS:
        reasons.append(f"requests left {send['p99']:.1f} ms late at p99 (limit {SEND_DELAY_P99_MS:g})")
    merged = client["merged_reads"] / max(1, client["reads"])
    if read and read["p99"] > READ_DELAY_P99_MS:
        reasons.append(f"bytes were read {read['p99']:.1f} ms late at p99 (limit {READ_DELAY_P99_MS:g})")
    elif read and read["p99"] > MERGED_READ_DELAY_P99_MS and merged > MERGED_READS_SHARE:
        reasons.append(f"{merged:.0%} of reads held several chunks and reading was {read['p99']:.1f} ms late at p99")
    if client["stamps"].get("user") and lag and lag["p99"] > USER_STAMP_LAG_P99_MS:
        reasons.append(
            f"no kernel stamps and the loop lagged {lag['p99']:.1f} ms at p99 (limit {USER_STAMP_LAG_P99_MS:g})"
        )
    refused = client["refused_share"] > REFUSED_SHARE  # then streams spin: each failure is followed by the next at once
    if client["cpu_share"] is not None and client["cpu_share"] > CPU_SHARE and not refused:
        reasons.append(f"the client used {client['cpu_share']:.0%} of its core (limit {CPU_SHARE:.0%})")
    asked, achieved = client["asked_rate_per_s"], client["achieved_rate_per_s"]
    too_slow = asked and achieved and achieved < RATE_SHARE * asked
    if too_slow and not client["streams"]:
        reasons.append(f"{achieved:.2f} of {asked:.2f} requests/s were sent (limit {RATE_SHARE:.0%})")
    remedy = REMEDY_OF_ONE if client["streams"] == 1 else REMEDY
    result = [Flag("client-limited", f"{'; '.join(reasons)}: {remedy}")] if reasons else []
    if client["stalled_share"] > STALLED_SHARE:
        detail = (
            f"the client stood still for {client['stalled_s']:.1f} s, {client['stalled_share']:.0%} of the load: it was stopped, or had no core; "
            "nothing was sent meanwhile, so that throughput is too low and requests came late: measure again"
        )
        result.append(Flag("client-stalled", detail))
    if chunks := client["counted_by"].get("chunks", 0) + client["counted_by"].get("mixed", 0):
        detail = (
            f"{chunks} responses without token ids: instants are those of chunks. Tokens, throughput, J per token and mean "
            "TBT follow the server's usage, where there is none a chunk counts as a token; how many tokens the first chunk held is estimated by its share of the text; per-gap TBT is given only where a chunk holds one token"
        )
        result.append(Flag("tokens-counted-by-chunks", detail))
    result += [Flag(note, f"{count} responses: {NOTES.get(note, note)}") for note, count in client["notes"].items()]
    if (missing := client["finish_reasons"].get("none", 0)) and len(client["finish_reasons"]) > 1:
        detail = (
            f"{missing} answers ended without a finish_reason, others of this server have one: they may have been cut"
        )
        result.append(Flag("finish-missing", detail))
    if too_slow and client["streams"]:
        detail = f"{achieved:.2f} of {asked:.2f} requests/s sent: --concurrency {client['streams']} capped the streams"
        result.append(Flag("rate-not-reached", detail))
    return result


def window(results: Sequence[ClientResult], open_loop: bool) -> tuple[float, float, str]:
    """(start_s, end_s, what it is): the time at full load, without ramp-up and drain; the whole run where there is none.

    Closed loop: from after the first completion with all streams in flight, whole rounds of them, to before the first that stayed empty, in any
    process. Open loop: from after the first completion, or after nine tenths of the requests' time (until then the system only fills), to one of
    the last before the last sending.
    """
    requests = [request for result in results for request in result.requests]
    sent, ended = _instants(requests, "sent_s"), _instants(requests, "end_s")
    if not sent or not ended:
        return 0.0, 0.0, "empty: no request was sent"
    if open_loop:
        well = [each for each in requests if _ended_well(each)]
        lasted_s = [each.end_s - each.sent_s for each in well if each.end_s is not None and each.sent_s is not None]
        filled_s = sent[0] + (float(numpy.quantile(lasted_s, FILLED_SHARE)) if lasted_s else 0.0)
        found = open_window(sent, ended, (_instants(well, "end_s") or ended)[0], filled_s)
        name = "completion to completion at full load"
    else:
        clients = [
            (
                _instants(result.requests, "sent_s"),
                _instants(result.requests, "end_s"),
                _instants(filter(_ended_well, result.requests), "end_s"),
                result.streams or 1,
            )
            for result in results
        ]
        found, name = closed_window(clients), f"all {sum(streams for *_, streams in clients)} streams in flight"
    if found is None:
        name = "whole run, ramp-up and drain included: too few requests for a time at full load"
        return sent[0], max(ended[-1], sent[-1]), name
    return *found, name


def open_window(sent: Instants, ended: Instants, first_end_s: float, filled_s: float) -> Interval | None:
    """An open loop's time at full load, from sorted instants, in one of which a request ended well first; None with hardly any end in it.

    It begins after an end and ends with one: n ends in the n intervals between them. It begins after `filled_s`, when the longest requests
    are in flight, too, if half of the ends come later. Of the ends in the last quarter it takes one after which about as many requests are
    in flight as at its beginning: then as many were sent as ended, also where arrivals come in bursts.
    """

    def in_flight(place: int) -> int:
        return bisect_right(sent, ended[place]) - bisect_right(ended, ended[place])

    begin, last = bisect_right(ended, first_end_s) - 1, bisect_right(ended, sent[-1]) - 1
    filled = bisect_left(ended, filled_s)
    if filled > begin and last - filled >= max(LEAST_ENDS, (last - begin) / 2):
        begin = filled
    if last - begin < 2:
        return None
    at_first, quarter = in_flight(begin), max(begin + 2, last - (last - begin) // 4)
    end = min(range(last, quarter - 1, -1), key=lambda place: 2 * abs(in_flight(place) - at_first) + last - place)
    return nextafter(float(ended[begin]), inf), float(ended[end])


def closed_window(clients: Sequence[tuple[Instants, Instants, Instants, int]]) -> Interval | None:
    """A closed loop's time at full load, from each client's sorted instants of sending, end and good end, and its streams; None where not all
    streams were in flight at once, or for too few requests.

    It ends before the first stream stays empty. Several streams begin together: it begins after an end, a good one, as the first failure
    may come at once, and ends with one, a number of whole rounds later, so that it cuts no round of streams that stay in step.
    """
    start_s, end_s, every, good = -inf, inf, [], []
    for sent, ended, well, streams in clients:
        if not len(ended) or len(sent) < streams:
            return None
        # Each request but the first ones follows an end.
        empty = len(sent) - streams
        start_s = max(start_s, float(sent[streams - 1]))
        end_s = min(end_s, float(ended[empty] if empty < len(ended) else sent[-1]))
        every += list(ended)
        good += list(well)
    total = sum(streams for *_, streams in clients)
    if total > 1:
        every.sort()
        first_s = min((at_s for at_s in good or every if at_s >= start_s), default=inf)
        begin, last = bisect_left(every, first_s), bisect_right(every, end_s) - 1
        if last <= begin:
            return None
        rounds = (last - begin) // total
        start_s, end_s = nextafter(first_s, inf), float(every[begin + rounds * total if rounds else last])
    return (start_s, end_s) if sum(len(sent) for sent, *_ in clients) >= 2 * total and start_s < end_s else None


def _ended_well(record: RequestRecord) -> bool:
    return not record.warmup and record.error is None


def _instants(records: Iterable[RequestRecord], name: str) -> list[float]:
    """One instant of each measured request, in order."""
    instants = (getattr(record, name) for record in records if not record.warmup)
    return sorted(at_s for at_s in instants if at_s is not None)


def decode_window(measured: Sequence[RequestRecord]) -> tuple[float, float, str] | None:
    """The time in which every request of the batch decodes: last first token to first last token; None without such a time."""
    spans = [(record.token_s[0], record.token_s[-1]) for record in measured if record.token_s]
    if len(spans) < len(measured) or not spans:
        return None
    start_s, end_s = max(first for first, _ in spans), min(last for _, last in spans)
    return (start_s, end_s, "every request of the batch decodes") if end_s > start_s else None


def _rate(instants_s: Sequence[float], begin_s: float) -> float | None:
    span_s = max(instants_s) - begin_s if instants_s else 0.0
    return len(instants_s) / span_s if span_s > 0 else None
