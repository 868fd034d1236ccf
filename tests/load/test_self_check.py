"""The client's check of itself: windows, steadiness, and when a run is flagged."""

import heapq
from math import inf, nextafter

import numpy
import pytest

from pdbench.load import self_check
from pdbench.load.generator import ClientResult, steady_since
from pdbench.records import RequestError, RequestRecord


def record(identity: int, sent_s: float, end_s: float, **more) -> RequestRecord:
    return RequestRecord(id=str(identity), planned_s=sent_s, sent_s=sent_s, end_s=end_s, **more)


def result_of(records: list[RequestRecord], streams: int | None) -> ClientResult:
    """A process's records as the window sees them."""
    return ClientResult(requests=records, streams=streams)


def test_windows_leave_out_ramp_up_and_drain():
    closed = [record(0, 0.0, 2.0), record(1, 0.5, 3.0), record(2, 2.0, 5.0), record(3, 3.0, 6.0)]
    warmup = record(9, -3.0, -1.0, warmup=True)
    assert self_check.window([result_of([warmup, *closed], 2)], False) == (
        nextafter(2.0, inf),
        5.0,
        "all 2 streams in flight",
    )
    assert self_check.window([result_of(closed[:3], 2)], False)[:2] == (0.0, 5.0)
    assert "whole run" in self_check.window([result_of(closed[:3], 2)], False)[2]
    opened = [record(index, index * 1.0, index + 2.5) for index in range(10)]
    assert self_check.window([result_of(opened, None)], True)[:2] == (nextafter(2.5, inf), 8.5)
    assert self_check.window([result_of(opened[:2], None)], True)[:2] == (0.0, 3.5)
    assert self_check.window([result_of([warmup], 1)], False)[2].startswith("empty")
    lone = [record(0, 1.0, 2.0), record(1, 2.0, 3.0)]
    assert self_check.window([result_of(lone, 1)], False)[:2] == (1.0, 3.0)


def test_split_window_ends_with_the_first_process_to_run_dry():
    quick = [record(index, index * 1.0, index + 1.0) for index in range(6)]
    slow = [record(index, 0.5 + index * 1.5, 2.0 + index * 1.5) for index in range(6)]
    both = [result_of(quick, 1), result_of(slow, 1)]
    assert self_check.window(both, False) == (nextafter(1.0, inf), 6.0, "all 2 streams in flight")
    assert "whole run" in self_check.window([*both, result_of(slow[:1], 2)], False)[2], (
        "two streams of one were never in flight"
    )


def test_steady_means_equal_halves():
    flat = [(index * 0.25, index * 100, 8) for index in range(41)]
    assert steady_since(flat, 5.0) == pytest.approx(5.0)
    assert steady_since(flat, 60.0) is None
    growing = [(index * 0.25, index * index, 8) for index in range(41)]
    assert steady_since(growing, 5.0) is None
    filling = [(index * 0.25, index * 100, index) for index in range(41)]
    assert steady_since(filling, 5.0) is None


def checked(
    delays_ms: list[float], *, cpu_s: float = 0.1, merged: int = 0, stamp: str = "kernel", late_ms: float = 0.0
) -> ClientResult:
    records = [
        record(index, float(index), index + 0.5, stamp=stamp, token_s=[index + 0.1], due_s=float(index) - late_ms / 1e3)
        for index in range(10)
    ]
    packed = (numpy.array(delays_ms) / 1e3).tobytes()
    return ClientResult(
        requests=records,
        streams=4,
        begin_s=-0.1,
        busy_s=packed,
        read_delays_s=packed,
        merged_reads=merged,
        cpu_s=cpu_s,
        wall_s=10.0,
    )


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (checked([0.1] * 10), None),
        (checked([30.0] * 10), "read 30.0 ms late"),
        (checked([8.0] * 10, merged=5), "held several chunks"),
        (checked([8.0] * 10), None),
        (checked([3.0] * 10, stamp="user"), "no kernel stamps"),
        (checked([0.1] * 10, cpu_s=9.8), "98% of its core"),
        (checked([0.1] * 10, late_ms=12.0), "left 12.0 ms late"),
    ],
)
def test_client_limited_flag_names_reason_and_remedy(result, reason):
    client = self_check.describe([result], result.requests, streams=4, open_loop=False)
    flags = self_check.flags(client)
    assert [flag.name for flag in flags] == (["client-limited"] if reason else [])
    assert reason is None or (reason in flags[0].detail and "--client-processes" in flags[0].detail)


def test_streams_that_begin_at_once_are_no_lateness_unless_a_clock_wants_them() -> None:
    burst = [record(index, 0.0001 * index, 1.0, due_s=0.0) for index in range(200)]
    later = [record(200 + index, 1.001, 2.0, due_s=1.0) for index in range(200)]
    result = result_of(burst + later, 200)
    closed = self_check.describe([result], result.requests, streams=200, open_loop=False)
    assert closed["send_delay_ms"]["p99"] > self_check.SEND_DELAY_P99_MS and self_check.flags(closed) == []
    assert closed["send_delay_after_start_ms"]["max"] == pytest.approx(1.0)
    opened = self_check.describe([result], result.requests, streams=None, open_loop=True)
    assert "late at p99" in self_check.flags(opened)[0].detail


def test_self_check_without_successful_requests():
    empty = result_of([], 1)
    failed = RequestRecord(id="x", planned_s=0.0, error=RequestError("refused", "no"))
    client = self_check.describe([empty], [failed], streams=1, open_loop=False)
    assert client["user_minus_kernel_ms"] is None and client["cpu_us_per_token"] is None
    assert client["failures"] == {"refused": 1} and self_check.flags(client) == []


def test_decode_window_excludes_prefill_and_drain() -> None:
    batch = [RequestRecord(id=str(i), planned_s=0.0, token_s=[1.0 + i, 5.0, 9.0 - i]) for i in range(3)]
    assert self_check.decode_window(batch) == (3.0, 7.0, "every request of the batch decodes")
    assert self_check.decode_window([*batch, RequestRecord(id="x", planned_s=0.0, token_s=[8.0])]) is None
    assert self_check.decode_window([*batch, RequestRecord(id="x", planned_s=0.0)]) is None


def test_window_of_an_open_loop_does_not_begin_at_a_failure() -> None:
    refused = record(0, 0.0, 0.001, error=RequestError("http_503", "full"))
    opened = [refused, *(record(index, index * 1.0, index + 2.5) for index in range(1, 10))]
    assert self_check.window([result_of(opened, None)], True)[:2] == (nextafter(3.5, inf), 8.5)


def open_rate(sent_s: numpy.ndarray, lasts_s: numpy.ndarray) -> tuple[int, float]:
    """Requests that ended in an open loop's window, and its seconds."""
    records = [record(index, *span) for index, span in enumerate(zip(sent_s, sent_s + lasts_s, strict=True))]
    start_s, end_s, name = self_check.window([result_of(records, None)], True)
    assert name.startswith("completion to completion")
    return sum(start_s <= each.end_s <= end_s for each in records), end_s - start_s


@pytest.mark.parametrize("count", [4, 6, 16, 50, 200])
@pytest.mark.parametrize("lasts", [0.05, 0.4, 0.95, 1.5, 5.3, 20.0])
def test_even_open_loop_has_its_rate_however_few_its_requests(count: int, lasts: float) -> None:
    if lasts > count - 3:
        return  # the window is the whole run
    ended, length_s = open_rate(numpy.arange(count) / 10, numpy.full(count, lasts / 10))
    assert ended / length_s == pytest.approx(10.0)


@pytest.mark.parametrize(("count", "lasts"), [(16, 0.05), (16, 0.4), (16, 1.5), (50, 5.3), (200, 20.0)])
def test_poisson_open_loop_has_its_rate_over_many_seeds(count: int, lasts: float) -> None:
    random = numpy.random.default_rng(count)
    parts = [
        open_rate(numpy.cumsum(random.exponential(0.1, count)), numpy.full(count, lasts / 10)) for _ in range(2000)
    ]
    ended, length_s = numpy.sum(parts, axis=0)
    assert ended / length_s == pytest.approx(10.0, rel=0.03)


@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize(("spread", "within"), [(0.0, 0.001), (0.02, 0.02), (0.3, 0.03)])
def test_closed_loop_has_its_rate_although_its_streams_begin_together(streams, spread, within) -> None:
    """Of 16 streams that stay together, 10 requests each, requests/s were 9 % too low."""
    random, ended, length_s = numpy.random.default_rng(streams), 0, 0.0
    for _ in range(200):
        free_s, records = [0.0] * streams, []
        for index in range(10 * streams):
            sent_s = heapq.heappop(free_s)
            heapq.heappush(
                free_s, end_s := sent_s + max(0.1, random.normal(1.0, spread)) + 1e-6 * (index < streams) * index
            )
            records.append(record(index, sent_s, end_s))
        first_s, last_s, name = self_check.window([result_of(records, streams)], False)
        assert name == f"all {streams} streams in flight"
        ended += sum(first_s <= each.end_s <= last_s for each in records)
        length_s += last_s - first_s
    assert ended / length_s == pytest.approx(streams, rel=within)


def in_step(requests: int, streams: int) -> list[RequestRecord]:
    """A batch of 1 s per round: all streams end in one step, each 20 us after the one before, and send again 1 ms later."""
    records = []
    for index in range(requests):
        begin_s, behind_s = index // streams * 1.001, index % streams * 20e-6
        records.append(record(index, begin_s + behind_s, begin_s + behind_s + 1.0))
    return records


@pytest.mark.parametrize(("streams", "requests"), [(8, 17), (8, 20), (8, 49), (16, 100), (64, 200)])
def test_window_of_streams_in_step_cuts_no_round(streams: int, requests: int) -> None:
    """Where the last round is not full, it had counted 44 % too few or 50 % too many requests."""
    start_s, end_s, _ = self_check.window([result_of(in_step(requests, streams), streams)], False)
    ended = sum(start_s <= each.end_s <= end_s for each in in_step(requests, streams))
    assert ended % streams == 0 and ended / (end_s - start_s) == pytest.approx(streams, rel=0.002)
    assert end_s < requests // streams * 1.001 + 0.002, "no stream is empty"


def test_window_of_a_closed_loop_does_not_begin_at_a_failure() -> None:
    whole = in_step(160, 16)
    refused = record(999, 1e-3, 2e-3, error=RequestError("http_503", "full"))
    windows = [self_check.window([result_of(records, 16)], False) for records in (whole, [refused, *whole[1:]])]
    assert windows[0][0] == pytest.approx(windows[1][0], abs=1e-3)


@pytest.mark.parametrize("bursts", [6, 10, 20])
def test_window_of_bursts_has_as_many_ends_as_sendings(bursts: int) -> None:
    """A window from the first end of a burst to the last one of another had 10 to 22 % too many."""
    records = [
        record(burst * 32 + index, at_s := burst * 10 + index * 0.02, at_s + 1.3)
        for burst in range(bursts)
        for index in range(32)
    ]
    start_s, end_s, _ = self_check.window([result_of(records, None)], True)
    ended = sum(start_s <= each.end_s <= end_s for each in records)
    assert ended / (end_s - start_s) == pytest.approx(3.2, rel=0.01)


def test_window_begins_when_the_long_requests_are_in_flight_too() -> None:
    """Of lognormal durations, the first to end is a short one: tokens/s had been 17 % too low."""
    random, shares = numpy.random.default_rng(1), []
    for _ in range(100):
        sent_s, lasts_s = numpy.arange(200) / 8, 1.3 * numpy.exp(random.standard_normal(200) - 0.5)
        records = [
            record(i, at_s, at_s + lasted_s) for i, (at_s, lasted_s) in enumerate(zip(sent_s, lasts_s, strict=True))
        ]
        start_s, end_s, _ = self_check.window([result_of(records, None)], True)
        worked = sum(max(0.0, min(each.end_s, end_s) - max(each.sent_s, start_s)) for each in records)
        shares.append(worked / (end_s - start_s) / (8 * 1.3))
    assert numpy.mean(shares) > 0.94
