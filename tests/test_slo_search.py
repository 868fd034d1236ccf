"""A search over deployments: which loads it sends, what it keeps, how it goes on and ends; on a virtual server, then through the command."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from pdbench import cli, slo_search
from pdbench.analysis.metrics import timings_of
from pdbench.config import LoadConfig, Options
from pdbench.errors import UserError
from pdbench.load import plan
from pdbench.load.generator import Progress
from pdbench.records import Clock, Flag, RequestError, RequestRecord, Run, Trial, load_run, save_run
from pdbench.report import commands, search_files
from pdbench.report import search as found
from pdbench.report.search import present
from pdbench.report.search_sentence import sentence
from pdbench.search.document import FILE, Document
from pdbench.search.rates import Search
from pdbench.slo_loads import Deployment, LoadJudge, outcome_of, settle_s
from pdbench.slo_search import Goal
from tests.support.servers import Peer, ScriptedServer, stream, tokens

CONSOLE = Console(quiet=True)
LOAD = LoadConfig(slo_ttft_ms=300.0, slo_tbt_ms=50.0, output_tokens=4, requests=300, nonce="n")
TRUTH = 4.924
"""Of a prefill of 100 ms, one at a time, at 95 %."""


class Law:
    """A virtual server with one prefill at a time and a pace of 20 ms; `measure` is what a deployment measures with."""

    def __init__(
        self, prefill_s: float = 0.1, itl_s: float = 0.02, flags: Callable[[float], list[Flag]] | None = None
    ) -> None:
        self.prefill_s, self.itl_s = prefill_s, itl_s
        self.flags = flags or (lambda rate: [])
        self.loads: list[LoadConfig] = []
        self.interrupt_at: int | None = None
        self.spent_s = 0.0

    def measure(self, options: Options, folder: Path, judge: LoadJudge | None) -> Run:
        load = options.load
        plan.check(load)
        self.loads.append(load)
        if len(self.loads) == self.interrupt_at:
            raise KeyboardInterrupt
        records, free_s = [], 0.0
        for each in plan.planned_requests(dataclasses.replace(load, input_tokens=None), None, 0):
            due_s = free_s if each.arrival_s is None else each.arrival_s
            first_s = max(due_s, free_s) + self.prefill_s
            free_s = first_s if load.rate else first_s + 3 * self.itl_s
            token_s = [first_s + self.itl_s * place for place in range(4)]
            name = f"x-0-{each.index:06d}"
            records.append(
                RequestRecord(id=name, planned_s=due_s, due_s=due_s, sent_s=due_s, token_s=token_s, end_s=token_s[-1])
            )
        begin_s = self.spent_s
        end_s = self.send(records, judge)
        self.spent_s = begin_s + end_s
        for record in records:
            assert record.end_s
            if record.end_s > end_s:  # cut off, as the client leaves it
                record.token_s = [at_s for at_s in record.token_s if at_s <= end_s]
                record.end_s, record.error = end_s, RequestError("interrupted", "the load was stopped")
        run = Run(name="single", clock=Clock(0, 0), config={"load": dataclasses.asdict(load)}, host={}, versions={})
        run.requests = [record for record in records if record.planned_s <= end_s]
        run.trials, run.flags = [Trial(index=0, start_s=0.0, end_s=end_s)], self.flags(load.rate or 0.0)
        commands.keep(run, folder / "single_results")
        return run

    def send(self, records: list[RequestRecord], judge: LoadJudge | None) -> float:
        """When the load ended."""
        last_s, now_s = max(record.end_s or 0.0 for record in records), 0.0
        left = sorted(records, key=lambda record: record.end_s or 0.0)
        while now_s < last_s:
            now_s += 0.25
            self.spent_s += 0.25
            ended = [record for record in left if (record.end_s or 0.0) <= now_s]
            left = left[len(ended) :]
            flying = sum(record.planned_s <= now_s for record in left)
            if judge:
                judge.on_progress(Progress(0, None, flying, 0, ended, now_s))
                if judge.decided():
                    return now_s
        return last_s


def search(out: Path, *laws: Law, load: LoadConfig = LOAD, goal: Goal | None = None) -> Document:
    deployments = [Deployment(f"d{place}", Options(load=load), law.measure) for place, law in enumerate(laws)]
    goal = goal or Goal(0.95, 0.06)
    document, earlier = slo_search.start(out, {"names": [each.name for each in deployments]}, goal, load)
    slo_search.find(deployments, goal, out, CONSOLE, document, earlier)
    return document


def test_search_finds_the_rates_and_their_order(tmp_path: Path) -> None:
    slow, fast = Law(), Law(prefill_s=0.05)
    document = search(tmp_path, slow, fast)
    one, two = document.deployments
    assert one.rate_per_s == pytest.approx(TRUTH, rel=0.1) and one.low < TRUTH < one.high * 1.05
    assert two.low > one.high
    # The n-th load of both has the same arrivals, scaled to its rate, and the same prompts.
    pairs = list(zip(slow.loads, fast.loads, strict=False))[: min(len(slow.loads), len(fast.loads)) - 1]
    assert all((a.seed, a.nonce) == (b.seed, b.nonce) for a, b in pairs) and len({a.nonce for a in slow.loads}) == len(
        slow.loads
    )
    instants = [list(plan.planned_instants(load, 0)) for load in (pairs[1][0], pairs[1][1])]
    scale = pairs[1][0].rate / pairs[1][1].rate  # type: ignore[operator]
    assert [at_s * scale for at_s in instants[0]] == pytest.approx(instants[1])  # type: ignore[operator]
    analyses = present(document, tmp_path, CONSOLE)
    assert len(analyses) == 2 and "d1 carries" in document.sentence and "times d0" in document.sentence
    saved = json.loads((tmp_path / FILE).read_text())
    assert {"name", "rate_per_s", "low", "high", "attained_pct", "rate_per_s_per_gpu", "j_per_good_request"} <= saved[
        "deployments"
    ][0].keys()
    assert saved["slo"] == {"slo_ttft_ms": 300.0, "slo_tbt_ms": 50.0} and saved["deployments"][0]["attained_pct"] > 85
    assert (tmp_path / found.PICTURE).read_bytes().startswith(b"\x89PNG")
    for point in saved["points"]:
        assert commands.load_analysis(tmp_path / point["run"]).summary.requests.sent


def test_overload_ends_within_seconds_and_its_cut_requests_count_only_once_they_are_late(tmp_path: Path) -> None:
    document = search(tmp_path, Law(), load=dataclasses.replace(LOAD, rate=40.0), goal=Goal(0.95, 0.2))
    overloaded = document.points[1]
    assert overloaded.rate_per_s == 40.0 and overloaded.held is False
    assert overloaded.requests < 120 and overloaded.limited_by == "slo_ttft_ms"
    run = commands.load_run(tmp_path / overloaded.run)
    outcome = outcome_of(timings_of(run), 40.0, held=False)
    assert len(outcome.score) < len(run.requests) and outcome.missed.mean() > 0.5


def test_queue_that_grows_is_an_overload_without_a_limit_on_time_between_tokens(tmp_path: Path) -> None:
    load = dataclasses.replace(LOAD, rate=40.0, requests=600, slo_tbt_ms=None, slo_ttft_ms=5000.0)
    judge = LoadJudge(Search(0.05, 40.0), load, float("inf"), settle_s(load, 0.2))
    run = Law().measure(Options(load=load), tmp_path, judge)
    assert judge.held is False and run.trials[0].end_s < 5.0  # before anything was missed


def test_idle_beginning_of_an_overload_is_not_called_held(tmp_path: Path) -> None:
    # A backlog of 3 s takes 15 s to build up: until then nothing is missed.
    load = dataclasses.replace(LOAD, rate=12.0, requests=600, slo_ttft_ms=3000.0, slo_tbt_ms=None)
    judge = LoadJudge(Search(0.05, 12.0), load, float("inf"), settle_s(load, 0.2))
    Law().measure(Options(load=load), tmp_path, judge)
    assert judge.held is False


def test_search_resumes_without_sending_again(tmp_path: Path) -> None:
    law = Law()
    law.interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, law)
    known = json.loads((tmp_path / FILE).read_text())
    assert len(known["points"]) == 3 and "search.json" in slo_search.saved(tmp_path)
    document = search(tmp_path, law)
    assert document.deployments[0].rate_per_s == pytest.approx(TRUTH, rel=0.1)
    assert msgspec.to_builtins(document.points[:3]) == known["points"]
    sent = len(law.loads)
    assert search(tmp_path, law).deployments == document.deployments and len(law.loads) == sent
    with pytest.raises(
        UserError, match=r"other options or on another machine \(slo_ttft_ms 300.0 instead of 400.0\).*--out"
    ):  # another question
        search(tmp_path, law, load=dataclasses.replace(LOAD, slo_ttft_ms=400.0))
    assert search(tmp_path, law).deployments == document.deployments and len(law.loads) == sent


def test_search_file_that_cannot_be_read_is_no_reason_to_begin_again(tmp_path: Path) -> None:
    for content in (
        b"{",
        b'{"command": {}, "slo": {}, "attain_pct": 95, "points": [{"rate": 3}]}',
        b'{"command": "\xff"}',
        b"[" * 200_000,
    ):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"search\.json cannot be read .*: move it away, or give another --out"):
            search(tmp_path, Law())
        assert (tmp_path / FILE).read_bytes() == content and list(tmp_path.iterdir()) == [tmp_path / FILE]


@pytest.mark.usefixtures("undrawn")
def test_slo_that_no_rate_holds_names_the_closest_load_and_the_limit(tmp_path: Path) -> None:
    document = search(tmp_path, Law(itl_s=0.09))
    (entry,) = document.deployments
    assert entry.rate_per_s is None and entry.low == 0 and entry.none_holds and entry.limited_by == "slo_tbt_ms"
    assert "No rate keeps" in sentence(document) and "mean TBT breaks it" in sentence(document)
    present(document, tmp_path, CONSOLE)


def test_rate_at_which_the_client_was_the_limit_is_not_held(tmp_path: Path) -> None:
    law = Law(prefill_s=0.001, flags=lambda rate: [Flag("client-limited", "late")] if rate > 900 else [])
    document = search(tmp_path, law)
    (entry,) = document.deployments
    assert entry.client_limited and entry.high is None and entry.low > 100
    assert "the client was the limit of d0" in sentence(document)


@pytest.mark.parametrize(
    ("flag", "prefill_s"),
    [("client-limited", 0.1), ("client-stalled", 1.0), ("gate-failed", 1.0), ("gate-failed", 0.001)],
)
def test_load_that_says_nothing_of_the_servers_is_sent_again(tmp_path: Path, flag: str, prefill_s: float) -> None:
    flagged: list[float] = []

    def once(rate: float) -> list[Flag]:
        law.prefill_s = 0.1 if rate else prefill_s  # of the next load
        if rate and not flagged:
            flagged.append(rate)
            return [Flag(flag, "late")]
        return []

    law = Law(flags=once)
    document = search(tmp_path, law)
    (entry,) = document.deployments
    assert flagged == [5.0] and not entry.client_limited and entry.low < TRUTH < entry.high
    assert ("loads of d0 that do not count: 1 (gate-failed)" in sentence(document)) == (flag == "gate-failed")
    if flag != "gate-failed":
        (again,) = search(tmp_path, Law()).deployments  # all of it saved
        assert again == entry


def test_answers_that_stay_wrong_end_a_search_without_a_rate(tmp_path: Path) -> None:
    law = Law(flags=lambda rate: [Flag("gate-failed", "3 of 4 answers")] if rate else [])
    document = search(tmp_path, law)
    (entry,) = document.deployments
    assert len(document.points) == 3 and entry.rate_per_s is None and not entry.client_limited
    assert sentence(document) == (
        "No rate is known yet within TTFT 300 ms and mean TBT 50 ms for 95 % of requests; loads of d0 that do not count: 2 (gate-failed)."
    )
    present(document, tmp_path, CONSOLE)
    (entry,) = search(tmp_path, Law()).deployments  # what does not count is sent again
    assert entry.low < TRUTH < entry.high


def test_confirming_run_that_does_not_count_or_was_too_short_is_sent_again(tmp_path: Path) -> None:
    document = search(tmp_path, Law())
    entry, last, sent = document.deployments[0], document.points[-1], Law()
    assert search(tmp_path, sent).deployments == [entry] and not sent.loads
    for change in ({"void": "gate-failed: 3 of 4"}, {"load_s": 0.1}):
        points = [*document.points[:-1], msgspec.structs.replace(last, **change)]
        search_files.save(msgspec.structs.replace(document, points=points), tmp_path)
        again = Law()
        search(tmp_path, again)
        assert [load.rate for load in again.loads] == [last.rate_per_s]


def test_time_that_is_up_leaves_a_wider_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law = Law()
    monkeypatch.setattr(time, "monotonic", lambda: law.spent_s)
    whole, begin_s = search(tmp_path / "whole", law), law.spent_s
    cut = search(tmp_path / "cut", law, goal=Goal(0.95, 0.06, until_s=begin_s + 5.0))
    (wide,), (narrow,) = cut.deployments, whole.deployments
    assert wide.loads < narrow.loads and wide.run and law.spent_s - begin_s < 40
    assert wide.high is None and wide.rate_per_s == wide.low == 5.0 and "5.00 requests/s or more" in sentence(cut)


@pytest.mark.parametrize("first_rate", [None, 4.0])
def test_run_at_the_rate_found_leaves_time_for_the_loads_of_slow_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_rate: float | None
) -> None:
    law = Law(prefill_s=1.0)  # 300 requests at the highest rate take ten minutes
    monkeypatch.setattr(time, "monotonic", lambda: law.spent_s)
    load = dataclasses.replace(LOAD, slo_ttft_ms=3000.0, rate=first_rate)  # 4: no rate is known to be held after it
    (entry,) = search(tmp_path, law, load=load, goal=Goal(0.95, 0.06, until_s=480.0)).deployments
    assert entry.low < TRUTH / 10 < entry.high and law.loads[-1].requests < 100


def test_run_at_the_rate_found_that_was_too_short_confirms_nothing(tmp_path: Path) -> None:
    short = Law(flags=lambda rate: [Flag("ramps-in-window", "trial 1: its window is shorter than a request")])
    document = search(tmp_path, short, Law())
    present(document, tmp_path, CONSOLE)
    entry, whole = document.deployments
    assert entry.attained_pct is None and entry.goodput_per_s is None
    assert entry.rate_per_s_per_gpu == whole.rate_per_s_per_gpu
    assert whole.attained_pct is not None and whole.goodput_per_s is not None
    assert document.sentence.endswith("; no run confirms the rate of d0: the last was too short, or does not count.")
    entry.attained_pct = 40.0
    present(document, tmp_path, CONSOLE)
    assert document.sentence.endswith("; d0's confirming run kept it for 40.0 % of its requests.")
    entry.attained_pct = 94.97
    present(document, tmp_path, CONSOLE)
    assert document.sentence.endswith("; d0's confirming run kept it for 94.9 % of its requests.")
    entry.attained_pct = 95.0
    present(document, tmp_path, CONSOLE)
    assert entry.attained_pct is None


def test_time_that_is_up_before_a_load_tells_anything_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    law, now_s = Law(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    measure = law.measure

    def measure_slowly(options: Options, folder: Path, judge: LoadJudge | None) -> Run:
        nonlocal now_s
        now_s += 20.0 if judge else 1.0  # requests warm up
        return measure(options, folder, judge)

    law.measure = measure_slowly  # type: ignore[method-assign]
    monkeypatch.setattr("tests.test_slo_search.CONSOLE", Console(width=200))
    document = search(tmp_path, law, law, goal=Goal(0.95, 0.06, until_s=19.0))
    (entry,) = document.deployments  # for the second, no time is left
    assert entry.rate_per_s is None and entry.low == 0 and entry.loads == len(document.points) == 1
    printed = capsys.readouterr().out
    assert "the time is up; the same command goes on from here" in printed
    assert "d1: not searched, the time is up" in printed
    assert sentence(document) == (
        "No rate is known yet within TTFT 300 ms and mean TBT 50 ms for 95 % of requests; d0 was not loaded for long enough."
    )
    assert "low" not in found.table(document).header


def test_constant_arrivals_end_with_the_requests(tmp_path: Path) -> None:
    load = dataclasses.replace(LOAD, arrival="constant", rate=20.0, requests=300)
    judge = LoadJudge(Search(0.05, 20.0), load, float("inf"))
    run = Law().measure(Options(load=load), tmp_path, judge)
    assert judge.held is False and len(run.requests) <= 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slo", ""], "--slo ttft=300"),
        (["--slo", "ttft=1", "--attain", "100%"], "--attain"),
        (["--slo", "ttft=1", "--attain", "most"], "--attain"),
        (["--slo", "ttft=1", "--stages", "1:2"], "--stages"),
        (["--slo", "ttft=1", "--concurrency", "1"], "--concurrency"),
        (["--slo", "ttft=1", "--requests", "8"], "--requests 8"),
        (["--slo", "speed=1"], "--slo"),
        (["--slo", "tbt=9", "--vary", "slo_ttft_ms=200,400"], "one search has one SLO"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["search", "--url", "http://127.0.0.1:1", "--out", str(tmp_path), *arguments])
    assert ended.value.code and words in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_search_through_the_command_on_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered, turn = stream(tokens(5), pause_s=0.002), threading.Lock()

    def answer(peer: Peer) -> bool:
        with turn:  # at most 66 a second
            time.sleep(0.015)
        return answered(peer)

    with ScriptedServer(answer) as server:
        command = ["search", "--url", server.url, "--model", "m", "--no-power", "--requests", "40", "--warmup", "1"]
        command += ["--slo", "e2e=300", "--rate", "40", "--precision", "50%", "--max-minutes", "2"]

        def exit_code() -> object:
            try:
                cli.main([*command, "--out", str(tmp_path)])
            except SystemExit as ended:
                return ended.code
            return 0

        assert not exit_code()
        saved = json.loads((tmp_path / FILE).read_text())
        (entry,) = saved["deployments"]
        assert entry["name"] == "bench" and "bench" in saved["sentence"]
        if entry["low"] and not entry["client_limited"]:  # else the machine was too busy
            assert "bench carries" in saved["sentence"]
            assert (tmp_path / entry["run"] / "analysis.json").exists()
        # Figures of a load whose answers were wrong do not count, also where nothing is sent again.
        folder = tmp_path / "bench" / "load-01" / "bench_results"
        run, sent = load_run(folder), len(server.requests)
        run.flags.append(Flag("canary-failed", "a wrong answer"))
        save_run(run, folder)
        assert exit_code() == 1
        printed = "".join(capsys.readouterr().err.split("\n"))
        assert "load-01/bench_results: bench: canary-failed: a wrong answer" in printed
        assert not any(peer.method == "POST" for peer in server.requests[sent:])


def test_each_deployment_is_tuned_by_the_options_of_its_roles() -> None:
    power = dataclasses.replace(Options().power, decode_clock=1410)
    options = Options(load=LOAD, power=power)
    tune = ["prefill_clock=1200,990", "decode_clock=990", "single_power_cap=400"]
    assert slo_search.tuning(options, tune, ["disaggregated", "replicas"]) == {
        "disaggregated": {"prefill_clock": [990, 1200, None], "decode_clock": [990, 1410]},
        "replicas": {"single_power_cap": [400, None]},
    }
    assert slo_search.tuning(options, [], ["replicas"]) == {"replicas": {}}
    with pytest.raises(UserError, match="only clocks and power caps can be tuned"):
        slo_search.tuning(options, ["concurrency=1,2"], ["bench"])
    with pytest.raises(UserError, match="nothing of it is for replicas: add single_clock"):
        slo_search.tuning(options, tune[:2], ["disaggregated", "replicas"])
    with pytest.raises(UserError, match="no deployment here has such GPUs"):
        slo_search.tuning(options, tune, ["replicas"])
