"""Whole loads against a scripted server: warm-up, ends, windows, the self-check, split processes, Ctrl-C."""

import hashlib
import multiprocessing
import os
import signal
import threading

import numpy
import pytest

from pdbench.config import LoadConfig
from pdbench.errors import UserError
from pdbench.load import generator
from pdbench.load.client import Client
from pdbench.load.clients import LoadResult, run_load
from pdbench.load.generator import run_client
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, RequestRecord
from tests.load.test_client import finish
from tests.support.processes import wait_until
from tests.support.servers import Peer, ScriptedServer, refusal, stream, token, tokens, usage


def load(server: ScriptedServer, on_progress=None, **options) -> LoadResult:
    return run_load(TrialLoad(LoadConfig(**options), server.url, "m", Clock.start()), on_progress)


def measured(result: LoadResult) -> list[RequestRecord]:
    return [record for record in result.requests if not record.warmup]


def most_in_flight(records: list[RequestRecord]) -> int:
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    return int(max(numpy.cumsum([change for _, change in changes])))


def test_closed_loop_keeps_its_streams_in_flight():
    done = []
    with ScriptedServer(stream(tokens(5), pause_s=0.002)) as server:
        config = LoadConfig(concurrency=4, requests=24, warmup=3)
        result = run_load(TrialLoad(config, server.url, "m", Clock.start(), trial=2), done.append)
    records = measured(result)
    assert len(records) == 24 and len(result.requests) == 27
    assert (done[-1].done, done[-1].total, done[-1].in_flight, done[-1].tokens) == (24, 24, 0, 120)
    assert sorted(each.id for progress in done for each in progress.ended) == sorted(each.id for each in records)
    assert all(record.error is None and record.trial == 2 for record in result.requests)
    assert len({record.id for record in result.requests}) == 27
    # A slot's next request is planned at the end of its last: one may go out while another's end is still unread.
    assert 3 <= most_in_flight(records) <= 5
    warmed = max(record.end_s for record in result.requests if record.warmup)
    assert warmed <= min(record.planned_s for record in records)
    assert result.trial.client["window"] == "all 4 streams in flight"
    assert min(r.sent_s for r in records) < result.trial.start_s < result.trial.end_s <= max(r.end_s for r in records)


def test_open_loop_sends_by_the_clock():
    with ScriptedServer(stream(tokens(3), pause_s=0.05)) as server:
        result = load(server, rate=100.0, requests=40, warmup=0)
    client = result.trial.client
    assert client["asked_rate_per_s"] == pytest.approx(100, rel=0.5)
    assert client["send_delay_ms"]["p50"] >= 0 and client["schedule_delay_ms"] == client["send_delay_ms"]
    # Each answer takes 150 ms or more and one is due every 10 ms: nobody waited for an earlier one to end.
    assert most_in_flight(measured(result)) > 5


def test_capped_open_loop_keeps_planned_instants():
    with ScriptedServer(stream(tokens(2), pause_s=0.02)) as server:
        result = load(server, rate=500.0, concurrency=2, requests=20, warmup=0)
    client = result.trial.client
    assert most_in_flight(measured(result)) <= 3
    # The last of 20 waits for nine others of its stream, 40 ms each.
    assert (
        client["schedule_delay_ms"]["max"] > 200 and client["schedule_delay_ms"]["p50"] > client["send_delay_ms"]["p50"]
    )
    assert "rate-not-reached" in {flag.name for flag in result.flags}


def test_load_ends_after_duration():
    with ScriptedServer(stream(tokens(3), pause_s=0.01)) as server:
        result = load(server, concurrency=3, duration_s=2.0, warmup=0)
        open_loop = load(server, rate=100.0, duration_s=0.4, warmup=0)
    records = measured(result)
    begin_s = min(record.planned_s for record in records)
    assert len(records) > 3 and max(record.planned_s for record in records) - begin_s < 4
    assert 0 < len(measured(open_loop)) < 70  # a busy client may be late, and stops by the clock


def test_load_ends_once_steady():
    with ScriptedServer(stream(tokens(4), pause_s=0.005)) as server:
        result = load(server, concurrency=2, steady_s=2.0, duration_s=20.0, warmup=0)
    if "not-steady" in {flag.name for flag in result.flags}:
        assert max(record.end_s for record in result.requests) > 19
    else:
        assert "held steady" in result.trial.client["window"]
        assert 2.0 <= result.trial.end_s - result.trial.start_s < 20


def test_failures_are_counted_and_the_load_goes_on():
    calls = iter(range(100))

    def answer(peer: Peer) -> bool:
        if next(calls) % 3 == 0:
            peer.reset()
            return False
        return stream(tokens(3))(peer)

    with ScriptedServer(answer) as server:
        result = load(server, concurrency=1, requests=12, warmup=0)
    kinds = [record.error.kind if record.error else None for record in measured(result)]
    assert len(kinds) == 12 and result.trial.client["failures"] == {"reset": 1, "reset_reused": 3}
    # The first came on a new connection, the others on one that an earlier answer had left open.
    assert kinds == ["reset", None, None] + ["reset_reused", None, None] * 3


def test_server_that_refuses_token_ids_gets_the_request_without():
    def answer(peer: Peer) -> bool:
        if "return_token_ids" in peer.json:
            return refusal(b"400 Bad Request", "Unrecognized request argument: return_token_ids")(peer)
        return stream([{"choices": [{"text": "a", "finish_reason": "stop"}]}])(peer)

    with ScriptedServer(answer) as server:
        result = load(server, requests=4, warmup=1)
    assert all(record.error is None and record.counted_by == "chunks" for record in result.requests)
    assert {"token-ids-refused", "tokens-counted-by-chunks"} <= {flag.name for flag in result.flags}


def plain(record: RequestRecord) -> tuple:
    return record.id.rpartition("-")[2], record.warmup, record.text, len(record.token_s), record.prompt_tokens


def test_split_client_sends_and_records_what_one_does():
    with ScriptedServer(stream(tokens(4))) as server:
        one = load(server, rate=200.0, requests=30, warmup=4)
        bodies = sorted(peer.body for peer in server.requests)
        server.requests.clear()
        two = load(server, rate=200.0, requests=30, warmup=4, client_processes=2)
        assert sorted(peer.body for peer in server.requests) == bodies
    assert [plain(record) for record in one.requests] == [plain(record) for record in two.requests]
    begins = [min(record.planned_s for record in measured(result)) for result in (one, two)]
    planned = [
        [record.planned_s - begin for record in measured(r)] for r, begin in zip((one, two), begins, strict=True)
    ]
    assert planned[0] == pytest.approx(planned[1], abs=1e-6)
    assert two.trial.client["processes"] == 2


def test_partial_results_are_complete_whenever_progress_is_told():
    told, counts, clock = [], [], Clock.start()
    with ScriptedServer(stream(tokens(3), pause_s=0.02)) as server:
        run_client(
            TrialLoad(LoadConfig(rate=8.0, requests=20, warmup=2), server.url, "m", clock),
            begin=clock.now,
            interrupted=threading.Event(),
            on_progress=lambda progress: counts.append((progress.done, len(told))),
            on_partial=lambda result: told.extend(each for each in result.requests if not each.warmup),
        )
    assert len(counts) > 2 and all(done == known for done, known in counts)


def test_split_closed_loop_shares_the_streams():
    with ScriptedServer(stream(tokens(3), pause_s=0.005)) as server:
        result = load(server, concurrency=3, requests=20, client_processes=2)
    assert len(measured(result)) == 20 and most_in_flight(measured(result)) <= 4


def test_client_process_error_reaches_the_user():
    with pytest.raises(UserError, match="--url"):
        config = LoadConfig(client_processes=2, rate=5.0)
        run_load(TrialLoad(config, "nonsense", "m", Clock.start()))


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_was_measured(processes):
    arrived = [0]
    with ScriptedServer(stream(tokens(1000), pause_s=0.01)) as server:

        def press() -> None:
            wait_until(lambda: arrived[-1] >= 100, 60)  # of both streams, which have the same pace
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()
        options = {"concurrency": 2, "requests": 50, "warmup": 0, "client_processes": processes}
        result = load(server, lambda progress: arrived.append(progress.tokens), **options)
    assert [flag.name for flag in result.flags if flag.name == "interrupted"] == ["interrupted"]
    assert len(result.requests) == 2
    assert all(record.error.kind == "interrupted" and record.token_s for record in result.requests)


def test_second_ctrl_c_soon_after_the_first_loses_nothing_and_a_later_one_ends_all(monkeypatch):
    before = [signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(generator, "AGAIN_S", 600.0)
    try:
        with generator.interruption() as interrupted:
            assert not interrupted.is_set()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
                assert interrupted.is_set()
        signal.raise_signal(signal.SIGINT)  # while it is saved
        monkeypatch.setattr(generator, "AGAIN_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        with generator.interruption():
            pass
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_during_warm_up_measures_nothing(processes):
    with ScriptedServer(stream(tokens(100), pause_s=0.05)) as server:

        def press() -> None:
            wait_until(lambda: len(server.requests) >= 2, 30)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press).start()
        result = load(server, concurrency=2, requests=50, warmup=2, client_processes=processes)
        assert len(server.requests) == 2
    assert "interrupted" in [flag.name for flag in result.flags]
    assert measured(result) == []


@pytest.mark.parametrize("after_s", [0.1, 0.6])
def test_ctrl_c_while_client_processes_start_is_an_interruption(after_s):
    with ScriptedServer(stream(tokens(3))) as server:
        timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            # By then they have begun: an interruption that keeps what came.
            result = load(server, concurrency=2, duration_s=5.0, warmup=0, client_processes=2)
            assert "interrupted" in [flag.name for flag in result.flags]
        except KeyboardInterrupt:
            assert not server.requests
        finally:
            timer.cancel()


def test_client_process_that_dies_ends_the_run_and_all_partial_results_are_kept():
    ended: list[RequestRecord] = []
    with ScriptedServer(stream(tokens(20), pause_s=0.01)) as server:

        def kill_one() -> None:
            wait_until(lambda: {int(record.id[-6:]) % 2 for record in ended} == {0, 1}, 60)
            multiprocessing.active_children()[0].kill()

        threading.Thread(target=kill_one).start()
        options = {"concurrency": 4, "requests": 4000, "warmup": 0, "client_processes": 2}
        result = load(server, lambda progress: ended.extend(progress.ended), **options)
    (lost,) = [flag for flag in result.flags if flag.name == "client-lost"]
    assert "--client-processes" in lost.detail and "until then" in lost.detail
    assert "interrupted" not in [flag.name for flag in result.flags]
    clients = {int(record.id[-6:]) % 2 for record in measured(result) if record.error is None}
    assert clients == {0, 1} and len(measured(result)) < 1000


def test_client_process_that_dies_before_the_start_is_an_error():
    with ScriptedServer(stream(tokens(100), pause_s=0.05)) as server:

        def kill_one() -> None:
            wait_until(lambda: len(server.requests) >= 2, 30)
            multiprocessing.active_children()[0].kill()

        threading.Thread(target=kill_one).start()
        with pytest.raises(UserError, match=r"client [01]: the process died: free memory or lower --client-processes"):
            load(server, concurrency=2, requests=50, warmup=2, client_processes=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_records_keep_due_instants_and_short_prompts(processes):
    with ScriptedServer(stream(tokens(2), pause_s=0.02)) as server:
        options = {"rate": 500.0, "concurrency": 2, "requests": 16, "warmup": 0, "client_processes": processes}
        records = measured(load(server, **options))
        sent = {peer.fields["x-request-id"]: peer.json["prompt"] for peer in server.requests}
        whole = measured(load(server, **options, save_prompts=True))
    for record in records:
        prompt = sent[record.id]
        assert record.planned_s <= record.due_s <= record.sent_s
        assert record.prompt_sha256 == hashlib.sha256(prompt.encode()).hexdigest()
        assert record.prompt == (prompt if len(prompt) <= 200 else None)
    assert {record.prompt is None for record in records} == {True, False}
    assert [record.prompt for record in whole] == [sent[record.id] for record in records]


def test_request_is_sent_again_without_token_ids_only_once():
    with ScriptedServer(refusal(b"400 Bad Request", "return_token_ids: unknown")) as server:
        result = load(server, concurrency=1, requests=1, warmup=0)
        assert len(server.requests) == 2
    assert [record.error.kind for record in result.requests] == ["http_400"]


def test_progress_counts_the_tokens_of_chunks_by_usage():
    done = []
    with ScriptedServer(
        stream([token("a few words ", None), token("and more ", None, "stop"), usage(5, 8), b"[DONE]"])
    ) as server:
        load(server, done.append, concurrency=2, requests=6, warmup=0)
    assert done[-1].tokens == 6 * 8
    assert [progress.tokens for progress in done] == sorted(progress.tokens for progress in done)


def test_odd_answers_are_counted_in_flags():
    payloads = [token("a ", None), token("b ", None, "stop"), usage(-1, 10**14)]
    whole, calls = stream(payloads), iter(range(100))

    def answer(peer: Peer) -> bool:
        return stream(payloads[:1])(peer) if next(calls) == 2 else whole(peer)

    with ScriptedServer(answer) as server:
        result = load(server, concurrency=1, requests=4, warmup=0)
    names = {flag.name for flag in result.flags}
    assert {"usage-refused", "finish-missing", "tokens-counted-by-chunks"} <= names
    assert result.trial.client["finish_reasons"] == {"stop": 3, "none": 1}
    assert [record.output_tokens for record in result.requests] == [2, 2, 1, 2]
    assert result.trial.client["addresses"] == ["127.0.0.1"]


def test_short_answers_of_a_forced_load_are_failures():
    with ScriptedServer(stream(tokens(3))) as server:
        result = load(server, requests=3, warmup=0, output_tokens=8, ignore_eos=True)
        assert result.trial.client["failures"] == {"short": 3}
        assert load(server, requests=3, warmup=0, output_tokens=8).trial.client["failures"] == {}


def test_threads_beside_the_client_have_real_time_priority_while_it_runs():
    threads = [threading.main_thread(), threading.Thread(target=(ended := threading.Event()).wait, args=(60,))]
    threads[1].start()
    seen = []

    def schedulers() -> list[tuple[int, int]]:
        numbers = [thread.native_id for thread in threads]
        return [
            (os.sched_getscheduler(n) & ~os.SCHED_RESET_ON_FORK, os.sched_getparam(n).sched_priority) for n in numbers
        ]

    before = schedulers()
    with ScriptedServer(stream(tokens(3))) as server:
        trial = TrialLoad(LoadConfig(concurrency=1, requests=3, warmup=0), server.url, "m", Clock.start())
        result = run_load(trial, lambda _: seen.append(schedulers()))
    after = schedulers()
    ended.set()
    expected = [(os.SCHED_RR, 2), (os.SCHED_RR, 1)] if result.trial.client["real_time"] else before
    assert seen and all(each == expected for each in seen)
    assert after == before


def test_server_that_ignores_the_limit_is_flagged():
    for count, flagged in ((8, False), (9, False), (40, True)):
        with ScriptedServer(stream(tokens(count))) as server:
            result = load(server, requests=2, warmup=0, output_tokens=8)
        assert ("answers-too-long" in {flag.name for flag in result.flags}) == flagged


@pytest.mark.parametrize(
    ("counted", "cached", "prompt_tokens", "flagged"),
    [
        (1000, None, 1000, False),
        (1000, 500, 1000, False),
        (1030, None, 1030, False),
        (500, 500, 1000, False),
        (600, 400, 1000, False),
        (512, None, 512, True),
        (1200, None, 1200, True),
    ],
)
def test_server_that_counts_other_prompt_tokens_is_noted(counted, cached, prompt_tokens, flagged):
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
    last = {"choices": [], "usage": {"prompt_tokens": counted, "completion_tokens": 1, **details}}
    with ScriptedServer(stream([token("x", [1], "stop"), last])) as server, Client(server.url) as client:
        record = finish(client, RequestRecord(id="r", planned_s=0.0, prompt_tokens=1000))
    assert record.error is None and record.prompt_tokens == prompt_tokens
    assert record.notes == ["prompt-tokens-differ"] * flagged
